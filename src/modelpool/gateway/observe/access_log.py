"""The access log: a JSON line for a sample of the requests, and for every one that failed and was not at fault."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from time import monotonic

import msgspec

from modelpool.gateway.observe.journey import Journey, Record
from modelpool.gateway.observe.log_file import LogFile


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`time` is when the request came, UTC; the times after it are seconds since then."""

    time: str
    request_id: str
    path: str
    status: int
    total_s: float
    gateway: int
    model: str = ""
    key: str = ""
    code: str = ""
    instance: str = ""
    reason: str = ""
    retries: tuple[str, ...] = ()
    waited_s: float = 0.0
    first_byte_s: float | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    pieces: int = 0
    streamed: bool = False
    client_left: bool = False


class AccessLog:
    """An Observer that puts lines into a file. `sample`: of how many of all requests, 0 to 1."""

    def __init__(self, file: LogFile[Record], sample: float) -> None:
        self._file = file
        self._sample = sample

    def waits(self, journey: Journey) -> None:
        """All is said at the end."""

    def waited(self, journey: Journey) -> None:
        """All is said at the end."""

    def chosen(self, journey: Journey) -> None:
        """All is said at the end."""

    def not_taken(self, journey: Journey) -> None:
        """All is said at the end."""

    def ended(self, journey: Journey) -> None:
        self.put(journey.record)

    def put(self, record: Record) -> None:
        if record.status >= 500 or record.broken or random.random() < self._sample:
            self._file.put(record)


def line_of(record: Record, slot: int) -> bytes:
    came = datetime.fromtimestamp(time.time() - (monotonic() - record.accepted), UTC)
    return msgspec.json.encode(
        Line(
            time=came.isoformat(timespec="milliseconds"),
            request_id=record.id.decode("latin-1"),
            path=record.path.decode("latin-1"),
            status=record.status,
            total_s=round(record.ended - record.accepted, 6),
            gateway=slot,
            model=record.alias,
            key=record.caller,
            code=record.code,
            instance=record.instance,
            reason=record.reason,
            retries=tuple(f"{instance}: {why}" for instance, why in record.tries),
            waited_s=round(record.waited, 6),
            first_byte_s=round(record.first_byte - record.accepted, 6) if record.first_byte else None,
            bytes_in=record.bytes_in,
            bytes_out=record.bytes_out,
            pieces=record.segments,
            streamed=record.streamed,
            client_left=record.left,
        )
    )
