"""What the gateway reads of a body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.errors import InvalidRequest
from modelpool.gateway.body import model_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.text(min_size=1), st.booleans())
def test_the_model_is_found_whatever_else_there_is(rest: dict[str, Any], model: str, ascii_only: bool) -> None:
    body = json.dumps({**rest, "model": model}, ensure_ascii=ascii_only)
    assert model_of(body.encode("utf-8", "surrogatepass")) == model


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_it_is_a_model_or_a_refusal(body: bytes) -> None:
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    if isinstance(decoded, dict) and isinstance(decoded.get("model"), str) and decoded["model"]:
        return
    with pytest.raises(InvalidRequest):
        model_of(body)


def test_of_two_models_the_last_counts_as_it_does_for_the_engine() -> None:
    body = b'{"model": "a", "model": "b"}'
    assert model_of(body) == json.loads(body)["model"] == "b"
