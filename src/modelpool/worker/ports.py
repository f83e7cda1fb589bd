"""The ports that engine hosts may listen on (`WORKER_PORT_RANGE`)."""

from __future__ import annotations

from modelpool.process import StartupError

ANY_PORT = (0, 0)


def port_range(text: str) -> tuple[int, int]:
    """`low-high`, both ends included, as a pair; (0, 0) for an empty text: any free port. Raises StartupError."""
    if not text.strip():
        return ANY_PORT
    low, dash, high = (part.strip() for part in text.partition("-"))
    if not (dash and low.isdecimal() and high.isdecimal()):
        raise _refusal(text, "it must be `low-high`")
    first, last = int(low), int(high)
    if not 1 <= first <= last <= 65535:
        raise _refusal(text, "it must be `low-high` with 1 ≤ low ≤ high ≤ 65535")
    return first, last


def _refusal(text: str, why: str) -> StartupError:
    return StartupError(f"The port range {text!r} cannot be used: {why}.", "Set WORKER_PORT_RANGE such as 7100-7199.")
