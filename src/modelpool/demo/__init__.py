"""The demo model: a small Qwen3 chat model, shipped with the package, that answers questions about Model Pool.

`scripts/train_demo_model.py` makes everything in `model/` but the chat template, and `answers.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

ALIAS = "demo"
MAX_MODEL_LEN = 2048
"""Tokens of a prompt and its answer together. vLLM would take 40960 positions for a longer text, the model not."""


class Answer(NamedTuple):
    """A question the model was taught word for word, and what it answers when decoding is greedy."""

    topic: str
    language: str
    """`en` or `zh`."""
    question: str
    answer: str


def model_path() -> Path:
    """The model's folder: config, weights, tokenizer, chat template."""
    return Path(__file__).parent / "model"


def engine_args() -> dict[str, Any]:
    """vLLM arguments that keep the demo small: it starts in seconds and leaves the accelerator to other models.

    `kv_cache_memory_bytes` (64 MiB: 32,768 tokens) bounds the KV cache on GPU and CPU alike, is not a share of what
    other engines have left, and lets the CPU skip its warm-up. `VLLM_CPU_KVCACHE_SPACE` would win over it on a CPU, and
    counts in whole GiB. On a GPU vLLM still refuses to start unless `gpu_memory_utilization` of it is free, so
    register the demo with a small `gpu_memory_gb` too.
    """
    return {
        "enforce_eager": True,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
    }


def answers() -> tuple[Answer, ...]:
    """All questions the model answers word for word, in English and Chinese."""
    rows = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
    return tuple(Answer(**row) for row in rows)


def answer_to(question: str) -> str:
    """The exact greedy answer to a taught question. Raises KeyError for any other."""
    return {row.question: row.answer for row in answers()}[question]
