"""Request ids: the client's own where it can pass through headers and logs, else one of ours."""

from __future__ import annotations

import itertools
import re
import secrets

from modelpool.gateway.request import Request

_HEADER = b"x-request-id"
_LINE = b"X-Request-Id: %b\r\n"
_SANE = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """Random per process, then counted: unique without asking the system for randomness at each request."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(8).encode() + b"-"
        self._count = itertools.count(1)

    def give(self, request: Request) -> None:
        """Set the request's `id`, and see that its headers have it, once, and its answer's: so all sides know it."""
        given = request.by_name.get(_HEADER)
        if given is not None:
            if _SANE.fullmatch(given) and sum(name == _HEADER for name, _ in request.headers) == 1:
                request.id = given
                request.added += _LINE % given
                return
            request.headers = [each for each in request.headers if each[0] != _HEADER]
        request.id = self._new()
        request.added += _LINE % request.id
        request.headers.append((_HEADER, request.id))

    def line(self) -> bytes:
        """The header line for an answer to what is no request."""
        return _LINE % self._new()

    def _new(self) -> bytes:
        return b"%b%x" % (self._prefix, next(self._count))
