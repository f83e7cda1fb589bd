"""What a request says of its waiting, in headers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from modelpool.errors import InvalidRequest

MAX_WAIT = b"x-modelpool-max-wait"
NO_COLD_START = b"x-modelpool-no-cold-start"
_YES_OR_NO = {b"true": True, b"1": True, b"false": False, b"0": False}


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    max_wait_s: float = math.inf
    cold_start: bool = True


def wishes_of(by_name: Mapping[bytes, bytes]) -> Wishes:
    """Raises InvalidRequest, naming the header."""
    max_wait_s, cold_start = math.inf, True
    if (text := by_name.get(MAX_WAIT)) is not None:
        max_wait_s = _seconds(text)
    if (text := by_name.get(NO_COLD_START)) is not None:
        no_cold_start = _YES_OR_NO.get(text.lower())
        if no_cold_start is None:
            raise _bad_header("X-ModelPool-No-Cold-Start", "true or false", text)
        cold_start = not no_cold_start
    return Wishes(max_wait_s=max_wait_s, cold_start=cold_start)


def _seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _bad_header("X-ModelPool-Max-Wait", "a number of seconds, 0 or more", text)
    return seconds


def _bad_header(name: str, allowed: str, text: bytes) -> InvalidRequest:
    shown = text[:100].decode("latin-1")
    return InvalidRequest(f"The header {name} must be {allowed}, got {shown!r}.", param=name, code="invalid_header")
