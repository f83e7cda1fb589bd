"""Responses that the gateway makes itself, as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from modelpool.errors import PoolError, error_body, error_headers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def encode_answer(
    status: int, body: bytes, headers: Iterable[tuple[str, str]] = (), *, close: bool, head_only: bool
) -> bytes:
    """A JSON response. `close`: the connection ends after it; `head_only`: the method was HEAD."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    if close:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if head_only else head + body


def encode_error(error: PoolError, *, close: bool, head_only: bool) -> bytes:
    return encode_answer(error.status, error_body(error), error_headers(error), close=close, head_only=head_only)


def error_event(error: PoolError, *, chunked: bool) -> bytes:
    """The last event of a stream that cannot go on, which ends the body too; after whatever event came half."""
    event = b"\n\ndata: " + error_body(error) + b"\n\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event
