"""Responses that the gateway makes itself, as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

from modelpool.errors import PoolError, error_body, error_headers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
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
    """The last event of a stream that cannot go on, which ends the body too; after whatever event came half."""
    return last_event(_body(error, path), path, error=True, chunked=chunked)


def last_event(body: bytes, path: bytes, *, error: bool, chunked: bool) -> bytes:
    """An event of JSON in one line, and the end of the stream.

    Where a stream's events have names, in Anthropic's and the Responses API, an error has one too.
    """
    name = b"event: error\n" if error and (_MESSAGES.search(path) or b"/responses" in path) else b""
    event = b"\n\n" + name + b"data: " + body + b"\n\n"
    return framed(event, chunked=True) + LAST_CHUNK if chunked else event


def stream_head(added: bytes, *, chunked: bool, close: bool) -> bytes:
    """The head of an event stream that begins before there is an instance to answer. `added`: more header lines."""
    lines = [b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream", b"Cache-Control: no-cache"]
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    if close:
        lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n" + added + b"\r\n"


def comment(text: bytes, *, chunked: bool) -> bytes:
    """What readers of an event stream ignore."""
    return framed(b": %b\n\n" % text, chunked=chunked)


def framed(data: bytes, *, chunked: bool) -> bytes:
    """A piece of a body. An empty one would end it."""
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data


def _body(error: PoolError, path: bytes) -> bytes:
    """OpenAI's envelope; Anthropic's, which is the same with a type of its own, for Anthropic's routes."""
    body = error_body(error)
    return b'{"type":"error",' + body[1:] if _MESSAGES.search(path) else body
