"""The request log: what clients asked for, with lengths in place of what was said, and never a credential."""

from __future__ import annotations

import random
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from modelpool.gateway.observe.log_file import LogFile
from modelpool.gateway.request import Request

BODY_BYTES_MAX = 256 << 10
"""Larger bodies are not decoded: that would hold up other requests."""
TEXT_MAX = 4096
_NAME_MAX = 64
_REDACTED = "[redacted]"
_CREDENTIALS = frozenset(
    {"authorization", "proxyauthorization", "apikey", "xapikey", "key", "token", "accesstoken", "refreshtoken"}
    | {"idtoken", "authtoken", "bearer", "secret", "clientsecret", "password", "passwd", "cookie", "setcookie"}
    | {"privatekey", "credential", "credentials", "accesskey", "secretkey"}
)
"""Names of fields, with what is no letter left out; or how such a name ends."""
_SUFFIXES = ("apikey", "password", "secret", "accesstoken", "authtoken", "headers")
_IN_URL = re.compile(
    r"(?<=://)[^/@\s]+@|(?<=[?&])([\w-]*(?:token|key|sig|signature|secret|credential)[\w-]*=)[^&\s]+", re.I
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{16,}", re.I)
# What is chosen from a list, or names something; short, so that nothing can be said in it.
_TOLD = frozenset(
    {"model", "role", "type", "object", "status", "tool_choice", "encoding_format", "reasoning_effort"}
) | {
    *("truncation", "service_tier", "effort", "detail", "format", "voice", "response_format", "language", "mode"),
}


class Asked(NamedTuple):
    """What is kept of a request until a thread makes a line of it."""

    at: float
    request_id: bytes
    method: bytes
    path: bytes
    key: str
    content_type: bytes
    body: bytes


class RequestLog:
    """`sample`: of how many of all requests for a model, 0 to 1."""

    def __init__(self, file: LogFile[Asked], sample: float) -> None:
        self._file = file
        self._sample = sample

    def put(self, request: Request) -> None:
        if random.random() < self._sample:
            key = request.caller.name if request.caller is not None else ""
            content_type = request.by_name.get(b"content-type", b"")
            asked = Asked(time.time(), request.id, request.method, request.path, key, content_type, request.body)
            self._file.put(asked)


def line_of(asked: Asked, *, content: bool) -> bytes:
    """`content`: with what was said, too."""
    line: dict[str, Any] = {
        "time": datetime.fromtimestamp(asked.at, UTC).isoformat(timespec="milliseconds"),
        "request_id": asked.request_id.decode("latin-1"),
        "method": asked.method.decode("latin-1"),
        "path": asked.path.decode("latin-1"),
        "key": asked.key,
        "content_type": asked.content_type.decode("latin-1"),
        "bytes": len(asked.body),
    }
    if len(asked.body) <= BODY_BYTES_MAX:
        # What cannot be decoded is a form, or refused by the gateway anyway.
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            line["body"] = redacted(msgspec.json.decode(asked.body), content=content)
    return msgspec.json.encode(line)


def redacted(value: Any, *, content: bool, name: str = "") -> Any:
    """A decoded body without credentials; without `content`, texts and lists of numbers are their lengths."""
    if value is not None and _is_credential(name):
        return _REDACTED
    if isinstance(value, dict):
        return {_text(key, _NAME_MAX): redacted(each, content=content, name=key) for key, each in value.items()}
    if isinstance(value, list):
        if not content and value and all(isinstance(each, int | float) for each in value):
            return f"[{len(value)} numbers]"
        return [redacted(each, content=content, name=name) for each in value]
    if not isinstance(value, str):
        return value
    if content:
        return _text(value)
    return value if name in _TOLD and len(value) <= _NAME_MAX else f"[{len(value)} characters]"


def _is_credential(name: str) -> bool:
    letters = re.sub(r"[^a-z]", "", name[:_NAME_MAX].lower())
    return letters in _CREDENTIALS or letters.endswith(_SUFFIXES)


def _text(text: str, longest: int = TEXT_MAX) -> str:
    """Cut, and without what looks like a credential in it."""
    text = text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"
    text = _IN_URL.sub(lambda match: f"{match[1] or ''}{_REDACTED}" + ("" if match[1] else "@"), text)
    return _BEARER.sub(lambda match: f"{match[1]} {_REDACTED}", text)
