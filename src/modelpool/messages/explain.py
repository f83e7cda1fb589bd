"""Gateway → whoever asks: what was decided for a recent request (`GET /admin/explain/{request_id}`)."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    RUNNING = "running"
    ANSWERED = "answered"
    FAILED = "failed"
    """With an error of the pool's, before the answer or in its middle."""
    CLIENT_LEFT = "client_left"
    LOST = "lost"
    """The gateway process that served it ended before the request did."""


class Role(StrEnum):
    CHOSEN = "chosen"
    RUNNER_UP = "runner_up"
    AVOIDED = "avoided"
    """It kept failing, so it was left alone."""
    TRIED = "tried"
    """It did not take the request before."""


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """An instance of the model and its load when the choice was made. `load` is `inflight` by `capacity`."""

    instance: str
    inflight: int
    capacity: int
    load: float
    role: Role | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was sent in vain, and why it went on."""

    instance: str
    why: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds: `accepted_at` since 1970, the others since then; None where it did not come to that.

    `model` is what the client named, which need not exist. `reason` is that of the choice, `code` that of an error.
    `words` says all of it in sentences.
    """

    request_id: str
    outcome: Outcome
    words: tuple[str, ...]
    accepted_at: float
    path: str
    model: str
    caller: str
    status: int | None
    code: str
    reason: str
    instance: str
    runner_up: str
    considered: tuple[Considered, ...]
    retries: tuple[Attempt, ...]
    waited_s: float
    sent_s: float | None
    first_byte_s: float | None
    ended_s: float | None
    bytes_in: int
    bytes_out: int
    pieces: int
    streamed: bool
    gateway: int
    """The slot of the process that served it."""
