"""Cross-origin requests: which web pages' scripts may use the gateway, and what browsers are told about it."""

from __future__ import annotations

import re

from modelpool.errors import Forbidden
from modelpool.gateway.request import Request
from modelpool.settings import SettingsError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^/\s,:@?#\[\]]+)(:\d+)?")
_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]*")
_MAX_AGE_S = 600


class Cors:
    """The allowed origins. Without any, browsers are told nothing, so that they keep to pages of the gateway's own."""

    def __init__(self, origins: frozenset[bytes] = frozenset()) -> None:
        self._origins = origins
        self._any = b"*" in origins

    @classmethod
    def parse(cls, text: str) -> Cors:
        """From `https://a.example,https://b.example:8443`, or `*`. Raises SettingsError."""
        origins = [each.strip().lower() for each in text.split(",") if each.strip()]
        for each in origins:
            if each != "*" and not _ORIGIN.fullmatch(each):
                raise SettingsError(
                    f"MODELPOOL_CORS_ALLOWED_ORIGINS: {each!r} is no origin: scheme://host or scheme://host:port, or *"
                )
        return cls(frozenset(each.encode() for each in origins))

    @property
    def active(self) -> bool:
        return bool(self._origins)

    def allows(self, origin: bytes) -> bool:
        return self._any or origin.lower() in self._origins

    def lines(self, request: Request) -> bytes:
        """Header lines for the answer to any request."""
        origin = request.by_name.get(b"origin")
        if origin is None or not self.allows(origin):
            return b"" if self._any else b"Vary: Origin\r\n"
        if self._any:
            return b"Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n"
        return b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: *\r\nVary: Origin\r\n" % origin

    def preflight(self, request: Request) -> list[tuple[str, str]]:
        """Headers of the answer to a browser that asks before it sends. Raises Forbidden."""
        if not self.allows(request.by_name[b"origin"]):
            raise Forbidden("Pages of this Origin may not use this gateway (MODELPOOL_CORS_ALLOWED_ORIGINS).")
        asked = request.by_name.get(b"access-control-request-headers", b"")
        headers = [
            ("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE"),
            ("Access-Control-Max-Age", str(_MAX_AGE_S)),
        ]
        if _NAMES.fullmatch(asked) and asked:
            headers.append(("Access-Control-Allow-Headers", asked.decode()))
        return headers


def is_preflight(request: Request) -> bool:
    by_name = request.by_name
    return request.method == b"OPTIONS" and b"origin" in by_name and b"access-control-request-method" in by_name
