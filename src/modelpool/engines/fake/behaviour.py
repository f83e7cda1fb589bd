"""How a fake request behaves: what the model was registered with, and what the request's headers say instead."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from modelpool.messages.models import ModelSpec

PREFIX = "X-Fake-"


class InvalidHeader(ValueError):
    """A header whose value is not a number, or is one out of range."""


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """Times in milliseconds. `tokens`: generate exactly as many, whatever the text."""

    delay_ms: float = 0
    token_ms: float = 0
    crash_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    tokens: int | None = None


_FIELDS = {f"{PREFIX}{name.replace('_', '-').title()}".lower().encode(): name for name in Behaviour.__struct_fields__}


def behaviour(model: ModelSpec, headers: Iterable[tuple[bytes, bytes]]) -> Behaviour:
    """Raises InvalidHeader, naming the header, its value and what is allowed."""
    asked = {_FIELDS[name]: _number(name, value) for name, value in headers if name in _FIELDS}
    registered = {
        "delay_ms": model.fake_delay_ms,
        "token_ms": model.fake_token_ms,
        "crash_after_tokens": model.fake_crash_after_tokens,
        "stall_after_tokens": model.fake_stall_after_tokens,
    }
    return msgspec.convert({**registered, **asked}, Behaviour)


def _number(name: bytes, value: bytes) -> float | int:
    text = value.decode("latin-1").strip()
    field = _FIELDS[name]
    shown = f"{PREFIX}{field.replace('_', '-').title()}"
    whole = not field.endswith("_ms")
    try:
        number: float | int = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        kind = "a whole number" if whole else "a number of milliseconds"
        raise InvalidHeader(f"{shown}: {kind} from 0 to 10^9, got {text!r}")
    return number
