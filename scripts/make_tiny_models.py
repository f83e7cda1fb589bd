"""Makes tiny random models to test with: FOLDER/text, FOLDER/embedding, and FOLDER/lora, an adapter for FOLDER/text.

python -m scripts.make_tiny_models FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from modelpool.testing.tiny_models import make_embedding_model, make_lora_adapter, make_text_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other weights")
    options = parser.parse_args()
    text = make_text_model(options.folder / "text", seed=options.seed)
    made = [
        text,
        make_embedding_model(options.folder / "embedding", seed=options.seed),
        make_lora_adapter(options.folder / "lora", base=text, seed=options.seed),
    ]
    print("\n".join(str(path) for path in made))


if __name__ == "__main__":
    main()
