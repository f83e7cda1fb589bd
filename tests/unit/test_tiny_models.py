"""The random models that tests use."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from modelpool.testing.tiny_models import make_embedding_model, make_lora_adapter, make_text_model


def shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="np") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def test_the_same_seed_gives_the_same_model_and_another_one_another(tmp_path: Path) -> None:
    first, same, other = (
        (make_text_model(tmp_path / str(index), seed=seed) / "model.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    )
    assert first == same
    assert first != other
    assert len(first) < 3_000_000


def test_weights_have_the_shapes_that_the_config_says(tmp_path: Path) -> None:
    model = make_text_model(tmp_path / "text", max_model_len=512)
    config = json.loads((model / "config.json").read_text())
    found = shapes(model / "model.safetensors")
    assert config["max_position_embeddings"] == 512
    assert found["model.embed_tokens.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert found["model.layers.1.self_attn.q_proj.weight"] == [
        config["num_attention_heads"] * config["head_dim"],
        config["hidden_size"],
    ]
    assert len(found) == 2 + 11 * config["num_hidden_layers"]


def test_an_adapter_fits_its_base(tmp_path: Path) -> None:
    base = make_text_model(tmp_path / "base")
    adapter = make_lora_adapter(tmp_path / "lora", base=base, rank=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = shapes(base / "model.safetensors")
    changes = shapes(adapter / "adapter_model.safetensors")
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == "base"
    for name, shape in changes.items():
        layer = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        rows, columns = weights[f"{layer}.weight"]
        assert shape == ([4, columns] if "lora_A" in name else [rows, 4])
        assert layer.rpartition(".")[2] in config["target_modules"]


def test_an_embedding_model_says_how_it_pools(tmp_path: Path) -> None:
    model = make_embedding_model(tmp_path / "embedding")
    pooling = json.loads((model / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True}
    modules = json.loads((model / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
