"""What can be wrong with a model's folder, found before vLLM is, and said with the name of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONFIGS = ("config.json", "params.json")
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tiktoken.model"),
)
# Of safetensors itself: the length of the header, and the most it may be.
_LENGTH_BYTES = 8
_HEADER_MAX = 100_000_000


def folder_problem(path: Path, engine_args: Mapping[str, Any]) -> str | None:
    """What is wrong with a model's folder, or None. `engine_args` may name a tokenizer elsewhere."""
    if not path.exists():
        return f"The model path {path} does not exist."
    if path.is_file() and path.suffix == ".gguf":
        return None
    if not path.is_dir():
        return f"The model path {path} is not a folder."
    if not _has(path, _CONFIGS):
        return f"The folder {path} has no config.json: it is not a model in Hugging Face format."
    if not _has(path, _TOKENIZERS) and not {"tokenizer", "skip_tokenizer_init"} & set(_normal(engine_args)):
        return f"The folder {path} has no tokenizer (tokenizer.json or the like)."
    return next((problem for file in sorted(path.glob("*.safetensors")) if (problem := _weights_problem(file))), None)


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return any(any(folder.glob(name)) for name in names)


def _normal(engine_args: Mapping[str, Any]) -> list[str]:
    return [name.replace("-", "_") for name, value in engine_args.items() if value]


def _weights_problem(file: Path) -> str | None:
    """Whether a safetensors file is as long as its header says: one that was cut off is the common damage."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_HEADER_MAX, size - _LENGTH_BYTES):
            return f"The weights file {file} is damaged: it has no valid header."
        header = opened.read(length)
    try:
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        expected = _LENGTH_BYTES + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return f"The weights file {file} is damaged: its header cannot be read."
    if size < expected:
        return f"The weights file {file} is damaged: it has {size} bytes, its header speaks of {expected}."
    return None
