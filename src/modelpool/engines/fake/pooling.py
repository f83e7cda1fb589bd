"""The answers of models that make no text: embeddings, scores, classes. They depend on the texts alone."""

from __future__ import annotations

import base64
import hashlib
import struct
import time
import uuid
from typing import Any

from modelpool.engines.fake.exchange import bad_request
from modelpool.engines.fake.requests import EmbeddingRequest, InputRequest, RerankRequest, ScoreRequest
from modelpool.engines.fake.text import detokenized, tokens

_DIMENSIONS = 16
_CLASSES = 2


def prompts(prompt: str | list[Any], param: str) -> list[str]:
    """A prompt in any of its four shapes, as texts: text, texts, token ids, lists of token ids. Raises Refused."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, str) for item in prompt):
        return prompt
    if prompt and all(isinstance(item, int) for item in prompt):
        return [detokenized(prompt)]
    if prompt and all(isinstance(item, list) and all(isinstance(number, int) for number in item) for item in prompt):
        return [detokenized(item) for item in prompt]
    raise bad_request(f"`{param}` must be a text, texts, token ids, or lists of token ids.", param)


def embeddings(alias: str, request: EmbeddingRequest) -> dict[str, Any]:
    """/v1/embeddings"""
    if request.encoding_format not in ("float", "base64"):
        raise bad_request("`encoding_format` must be float or base64.", "encoding_format")
    inputs = prompts(request.input, "input")
    vectors = [_vector(text, request.dimensions or _DIMENSIONS) for text in inputs]
    shown = [_base64(vector) if request.encoding_format == "base64" else vector for vector in vectors]
    data = [{"index": index, "object": "embedding", "embedding": each} for index, each in enumerate(shown)]
    return _listed("embd", alias, data, inputs)


def pooled(alias: str, request: InputRequest) -> dict[str, Any]:
    """/pooling: a vector for each token."""
    inputs = prompts(request.input, "input")
    data = [
        {"index": index, "object": "pooling", "data": [_vector(token, _DIMENSIONS) for token in tokens(text)]}
        for index, text in enumerate(inputs)
    ]
    return _listed("pool", alias, data, inputs)


def classified(alias: str, request: InputRequest) -> dict[str, Any]:
    """/classify"""
    inputs = prompts(request.input, "input")
    data = []
    for index, text in enumerate(inputs):
        first = (1 + _vector(text, 2)[0]) / 2
        probs = [first, 1 - first]
        label = f"LABEL_{probs.index(max(probs))}"
        data.append({"index": index, "label": label, "probs": probs, "num_classes": _CLASSES})
    return _listed("classify", alias, data, inputs)


def scored(alias: str, request: ScoreRequest) -> dict[str, Any]:
    """/score, /v1/score: one with one, one with each, or each with its own."""
    one = _some(request.text_1, request.queries, request.data_1)
    other = _some(request.text_2, request.documents or request.items, request.data_2)
    if len(one) not in (1, len(other)):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N.")
    pairs = list(zip(one * (len(other) // len(one)), other, strict=True))
    data = [{"index": index, "object": "score", "score": _likeness(*pair)} for index, pair in enumerate(pairs)]
    return _listed("score", alias, data, [*one, *other])


def reranked(alias: str, request: RerankRequest) -> dict[str, Any]:
    """/rerank, /v1/rerank, /v2/rerank: the most like ones first."""
    documents = [request.documents] if isinstance(request.documents, str) else request.documents
    results = [
        {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": score}
        for index, text in enumerate(documents)
        for score in [_likeness(request.query, text)]
    ]
    results.sort(key=lambda result: -result["relevance_score"])  # type: ignore[operator]
    used = sum(len(tokens(text)) for text in [request.query, *documents])
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": alias,
        "usage": {"prompt_tokens": used, "total_tokens": used},
        "results": results[: request.top_n or None],
    }


def _some(*given: str | list[str] | None) -> list[str]:
    """The texts under whichever of their names they came."""
    for each in given:
        if each:
            return [each] if isinstance(each, str) else each
    raise bad_request("Give `queries` and `documents`, or `text_1` and `text_2`.")


def _listed(kind: str, alias: str, data: list[Any], inputs: list[str]) -> dict[str, Any]:
    used = sum(len(tokens(text)) for text in inputs)
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": alias,
        "data": data,
        "usage": {
            "prompt_tokens": used,
            "total_tokens": used,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def _likeness(one: str, other: str) -> float:
    """1 for the same words, 0 for none in common."""
    left, right = set(one.lower().split()), set(other.lower().split())
    return len(left & right) / len(left | right) if left | right else 1.0


def _vector(text: str, dimensions: int) -> list[float]:
    """A unit vector."""
    stream = hashlib.shake_256(text.encode()).digest(4 * dimensions)
    raw = [number / 2**31 - 1 for (number,) in struct.iter_unpack("<I", stream)]
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return [value / norm for value in raw]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
