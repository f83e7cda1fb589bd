"""Models with random weights that vLLM serves like any other: a text model, a mixture of experts, an embedding model,
a LoRA adapter.

They are made without torch, in milliseconds, and speak through the demo model's tokenizer and chat template. The same
arguments give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelpool import demo

Weights = dict[str, npt.NDArray[np.float32]]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model, named as in its config.json. `head_dim` must be one that attention kernels know."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 64

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(rows out, columns in) of each linear layer of a block, by its name below `model.layers.N.`."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, self.hidden_size),
            "self_attn.k_proj": (key, self.hidden_size),
            "self_attn.v_proj": (key, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, query),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }


def make_text_model(
    folder: Path, *, seed: int = 0, max_model_len: int = demo.MAX_MODEL_LEN, shape: Mapping[str, int] | None = None
) -> Path:
    """A chat model of about 1 MB. It answers nonsense, up to `max_tokens`; other seeds give other answers.

    `shape` changes sizes (the fields of Shape), for one whose weights show in a process's memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(demo.model_path() / name, folder / name)
    config = _read(demo.model_path() / "config.json")
    sizes = Shape(vocab_size=config["vocab_size"], **(shape or {}))
    _write(folder / "config.json", _config(sizes, config, max_model_len))
    _save(
        folder / "model.safetensors",
        _text_weights(sizes, np.random.default_rng(seed), mute=(config["eos_token_id"], config["pad_token_id"])),
    )
    return folder


def make_mixture_model(folder: Path, *, seed: int = 0, experts: int = 4) -> Path:
    """A chat model as `make_text_model` has it, with so many experts in each layer, of which two speak for a token."""
    make_text_model(folder, seed=seed)
    config, shape = _read(folder / "config.json"), _shape_of(folder)
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": shape.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    _write(folder / "config.json", config)
    random = np.random.default_rng(seed)
    weights = _text_weights(shape, random, mute=(config["eos_token_id"], config["pad_token_id"]))
    for layer in range(shape.num_hidden_layers):
        block = f"model.layers.{layer}."
        weights[block + "mlp.gate.weight"] = _normal(random, (experts, shape.hidden_size), 1.0)
        for name, (rows, columns) in shape.linear_layers().items():
            if name.startswith("mlp."):
                del weights[f"{block}{name}.weight"]
                for number in range(experts):
                    expert = f"{block}mlp.experts.{number}.{name.removeprefix('mlp.')}.weight"
                    weights[expert] = _normal(random, (rows, columns), columns**-0.5)
    _save(folder / "model.safetensors", weights)
    return folder


def make_embedding_model(folder: Path, *, seed: int = 0) -> Path:
    """A model for /v1/embeddings: 128 numbers of length one, from the last token, as Qwen3-Embedding does it."""
    make_text_model(folder, seed=seed)
    (folder / "generation_config.json").unlink()
    # How sentence-transformers says that a model embeds; vLLM then pools by itself.
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(modules)
        ],
    )
    width = _shape_of(folder).hidden_size
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, "pooling_mode_lasttoken": True})
    return folder


def make_lora_adapter(folder: Path, *, base: Path, rank: int = 8, seed: int = 0) -> Path:
    """An adapter for the Qwen3 model at `base`, strong enough that its answers differ from those of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = _shape_of(base)
    random = np.random.default_rng(seed)
    weights: Weights = {}
    for layer in range(shape.num_hidden_layers):
        for name, (rows, columns) in shape.linear_layers().items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = _normal(random, (rank, columns), columns**-0.5)
            weights[f"{prefix}.lora_B.weight"] = _normal(random, (rows, rank), rank**-0.5)
    _save(folder / "adapter_model.safetensors", weights)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in shape.linear_layers()),
    }
    _write(folder / "adapter_config.json", config)
    return folder


def _config(shape: Shape, like: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    """A config.json of `shape`, with the token ids of the model whose tokenizer it shares."""
    tokens = {name: like[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return asdict(shape) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": max_model_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "use_cache": True,
        **tokens,
    }


def _text_weights(shape: Shape, random: np.random.Generator, *, mute: tuple[int, ...]) -> Weights:
    """Random weights. Tokens in `mute` are never the likeliest: a tied embedding of zeros gives the logit zero."""
    ones = np.ones(shape.hidden_size, np.float32)
    head = np.ones(shape.head_dim, np.float32)
    embedding = _normal(random, (shape.vocab_size, shape.hidden_size), 0.1)
    embedding[list(mute)] = 0
    weights: Weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ones,
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = ones
        weights[prefix + "post_attention_layernorm.weight"] = ones
        weights[prefix + "self_attn.q_norm.weight"] = head
        weights[prefix + "self_attn.k_norm.weight"] = head
        for name, (rows, columns) in shape.linear_layers().items():
            weights[f"{prefix}{name}.weight"] = _normal(random, (rows, columns), columns**-0.5)
    return weights


def _normal(random: np.random.Generator, shape: tuple[int, int], spread: float) -> npt.NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(spread)


def _shape_of(model: Path) -> Shape:
    config = _read(model / "config.json")
    return Shape(**{name: config[name] for name in Shape.__dataclass_fields__})


def _save(file: Path, weights: Weights) -> None:
    """Writes `weights` in the safetensors format, as bfloat16, which is the upper half of a float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, weight in weights.items():
        begin = len(data)
        data += (weight.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _read(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
