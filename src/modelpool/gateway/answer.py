"""Responses that the gateway makes itself, as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from modelpool.errors import PoolError, error_body, error_headers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_MESSAGES = re.compile(rb"^(/v1)?/messages\b")


def encode_answer(
    status: int,
    body: bytes,
    headers: Iterable[tuple[str, str]] = (),
    *,
    close: bool,
    head_only: bool,
    added: bytes = b"",
    content_type: str = "application/json",
) -> bytes:
    """A response. `close`: the connection ends after it; `head_only`: the method was HEAD; `added`: header lines."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    if close:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n" + added + b"\r\n"
    return head if head_only else head + body


def encode_error(error: PoolError, path: bytes, *, close: bool, head_only: bool, added: bytes = b"") -> bytes:
    """The answer to a request for `path` that failed."""
    body = _body(error, path)
    return encode_answer(error.status, body, error_headers(error), close=close, head_only=head_only, added=added)


def error_event(error: PoolError, path: bytes, *, chunked: bool) -> bytes:
    """The last event of a stream that cannot go on, which ends the body too; after whatever event came half.

    Where a stream's events have names, in Anthropic's and the Responses API, this one has too.
    """
    name = b"event: error\n" if _MESSAGES.search(path) or b"/responses" in path else b""
    event = b"\n\n" + name + b"data: " + _body(error, path) + b"\n\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event) if chunked else event


def _body(error: PoolError, path: bytes) -> bytes:
    """OpenAI's envelope; Anthropic's, which is the same with a type of its own, for Anthropic's routes."""
    body = error_body(error)
    return b'{"type":"error",' + body[1:] if _MESSAGES.search(path) else body
