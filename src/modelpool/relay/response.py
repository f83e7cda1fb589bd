"""What is known of a response: its head, and its body without the framing."""

from __future__ import annotations

import httptools

from modelpool.relay.request import HOP_BY_HOP, Headers, connection_options


class ResponseHead:
    """A final (not 1xx) response head as it came: status line, header lines and the blank line."""

    __slots__ = ("_lower", "raw", "status")

    def __init__(self, status: int, raw: bytes) -> None:
        self.status = status
        self.raw = raw
        self._lower = b""

    @property
    def lower(self) -> bytes:
        """`raw` in lower case, for looking whether a header is there at all."""
        if not self._lower:
            self._lower = self.raw.lower()
        return self._lower

    @property
    def names_ours(self) -> bool:
        """Whether there are headers that are for whoever asked: for the next hop only, or the request's id, of which
        clients get our word. Then the head cannot pass as it is."""
        lower = self.lower
        return b"\r\nconnection:" in lower or b"\r\nx-request-id:" in lower

    @property
    def chunked(self) -> bool:
        return b"\r\ntransfer-encoding:" in self.lower

    @property
    def announces_trailers(self) -> bool:
        return b"\r\ntrailer:" in self.lower

    @property
    def ends_with_connection(self) -> bool:
        """Whether the body has no length of its own, so that only the connection's end shows it is complete."""
        if self.status in (204, 304):
            return False
        return not self.chunked and b"\r\ncontent-length:" not in self.lower

    @property
    def event_stream(self) -> bool:
        return b"\r\ncontent-type: text/event-stream" in self.lower

    def headers(self) -> Headers:
        """All header lines in order, names in lower case."""
        headers: Headers = []
        for line in self.raw.split(b"\r\n")[1:-2]:
            name, _, value = line.partition(b":")
            headers.append((name.lower(), value.strip()))
        return headers

    def rewritten(self, *, close: bool, framed: bool = True, added: bytes = b"") -> bytes:
        """This head for another connection: headers for one hop left out, `Connection: close` added if it closes.

        With `added` header lines, which have the request's id, the upstream's own id is left out.

        Without `framed` chunked framing is announced no more: the caller sends the bare body (to HTTP/1.0 clients).
        """
        headers = self.headers()
        dropped = (HOP_BY_HOP | connection_options(headers)) - ({b"transfer-encoding"} if framed else set())
        if added:
            dropped |= {b"x-request-id"}
        lines = [self.raw[: self.raw.index(b"\r\n")]]
        lines += [b"%b: %b" % (name, value) for name, value in headers if name not in dropped]
        if close:
            lines.append(b"Connection: close")
        return b"\r\n".join(lines) + b"\r\n" + added + b"\r\n"


class BodyDecoder:
    """Takes the framing off: raw bytes of one response in (its head first), pieces of its body out."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def feed(self, raw: bytes) -> list[bytes]:
        """Raises httptools.HttpParserError for what is no HTTP; what an Exchange passed on always is."""
        self._parser.feed_data(raw)
        pieces, self._pieces = self._pieces, []
        return pieces
