"""multipart/form-data read in place: where the fields of a body are. Nothing is decoded or copied.

What counts as a boundary is what counts for python-multipart, by which vLLM reads forms; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

FIELDS_MAX = 1000
HEAD_BYTES_MAX = 16 << 10
"""Of one field."""
LOOKALIKES_MAX = 1000
"""Lines in a value that begin with the boundary and go on otherwise: each costs a step."""

_PARAMETER = re.compile(rb';[ \t]*([!#-+\--9A-Z^-z|~-]+)=(?:"((?:[^"\\\r\n]|\\[^\r\n])*)"|([^\s;"]+))[ \t]*')
_ESCAPED = re.compile(rb"\\(.)")


class MalformedForm(ValueError):
    """Not multipart/form-data. Says why."""


class Field(NamedTuple):
    """A field and where its value lies in the body. `filename` is None for one that is no file."""

    name: str
    filename: str | None
    start: int
    end: int


def fields(content_type: bytes, body: bytes) -> Iterator[Field]:
    """The fields in their order. Raises MalformedForm, at once or when that place is reached."""
    kind, parameters = _parameters(content_type)
    if kind != b"multipart/form-data":
        raise MalformedForm("the Content-Type is not multipart/form-data")
    boundary = parameters.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise MalformedForm("the Content-Type has no boundary of 1 to 70 characters")
    return _fields(body, b"\r\n--" + boundary)


def _fields(body: bytes, delimiter: bytes) -> Iterator[Field]:
    at = 2 if body.startswith(delimiter) else 0
    if not body.startswith(delimiter[2:], at):
        raise MalformedForm("it does not begin with its boundary")
    at += len(delimiter) - 2
    for _ in range(FIELDS_MAX):
        if body.startswith(b"--", at):
            return
        if not body.startswith(b"\r\n", at):
            raise MalformedForm("something stands behind its boundary")
        name, filename, start = _head(body, at + 2)
        end = _end(body, delimiter, start)
        yield Field(name, filename, start, end)
        at = end + len(delimiter)
    raise MalformedForm(f"it has more than {FIELDS_MAX} fields")


def _head(body: bytes, at: int) -> tuple[str, str | None, int]:
    """Name and file name of the field whose head begins at `at`, and where its value begins."""
    end = body.find(b"\r\n\r\n", at, at + HEAD_BYTES_MAX)
    if end < 0:
        raise MalformedForm("a field's head has no end")
    for line in body[at:end].split(b"\r\n"):
        header, _, value = line.partition(b":")
        if header.lower() == b"content-disposition":
            _, parameters = _parameters(value)
            if b"name" not in parameters:
                break
            filename = parameters.get(b"filename", parameters.get(b"filename*"))
            return _text(parameters[b"name"]), None if filename is None else _text(filename), end + 4
    raise MalformedForm("a field has no name")


def _end(body: bytes, delimiter: bytes, start: int) -> int:
    """Where the value that begins at `start` ends: at a boundary, not at text that only begins like one."""
    at = start
    for _ in range(LOOKALIKES_MAX):
        if (at := body.find(delimiter, at)) < 0:
            break
        behind = at + len(delimiter)
        if body.startswith((b"\r\n", b"--"), behind):
            return at
        at = behind
    raise MalformedForm("it breaks off before its last boundary")


def _parameters(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """A header's value, and its parameters by name, both in lower case. Raises MalformedForm."""
    head, mark, rest = value.partition(b";")
    rest = (mark + rest).rstrip(b" \t;")
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(rest):
        if (match := _PARAMETER.match(rest, at)) is None:
            raise MalformedForm("a header of it makes no sense")
        name = match[1].lower()
        if name in found:
            raise MalformedForm("a header of it names something twice")
        found[name] = match[3] if match[2] is None else _ESCAPED.sub(rb"\1", match[2])
        at = match.end()
    return head.strip().lower(), found


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
