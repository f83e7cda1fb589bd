"""The request that goes upstream, as bytes."""

from __future__ import annotations

from collections.abc import Iterable

from modelpool.relay.endpoint import Endpoint

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"}
    | {b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"expect"}
)
# Ours to set: the upstream has another name, another secret, and gets the body in one piece. The origin too: what web
# pages may do is for the gateway to say, and vLLM would let them all.
_REPLACED = HOP_BY_HOP | {b"host", b"content-length", b"authorization", b"x-api-key", b"origin"}


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers (names in lower case) that belong to the message, not to one connection."""
    headers = list(headers)
    dropped = HOP_BY_HOP | connection_options(headers)
    return [(name, value) for name, value in headers if name not in dropped]


def connection_options(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The names, in lower case, that `Connection` lists: those headers are for the next hop only."""
    values = [value for name, value in headers if name == b"connection"]
    return frozenset(option.strip().lower() for value in values for option in value.split(b","))


def fixed_headers(endpoint: Endpoint, token: str = "") -> bytes:
    """The header lines that are the same for every request to an endpoint: its name, and the token it wants."""
    lines = f"Host: {endpoint.host_header}\r\n"
    if token:
        lines += f"Authorization: Bearer {token}\r\n"
    return lines.encode("latin-1")


def encode_request(
    method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], *, fixed: bytes, body: bytes = b""
) -> bytes:
    """An HTTP/1.1 request: the client's end-to-end headers (names in lower case), `fixed_headers`, and the body.

    The client's credentials are left out; `fixed` has ours.
    """
    parts = [method, b" ", target, b" HTTP/1.1\r\n", fixed]
    for name, value in headers:
        if name not in _REPLACED:
            parts += (name, b": ", value, b"\r\n")
        elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            return encode_request(method, target, end_to_end(headers), fixed=fixed, body=body)
    if body or method not in (b"GET", b"HEAD"):
        parts.append(b"Content-Length: %d\r\n" % len(body))
    parts.append(b"\r\n")
    parts.append(body)
    return b"".join(parts)
