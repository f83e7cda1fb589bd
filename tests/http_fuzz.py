"""Requests as an attacker or a broken client writes them, made by a grammar from a seed; and what may never come of it.

What may come is any answer that is well formed: of an engine to the very request that got it, or of the gateway. Never
a 500, an answer out of order, a request that reaches an engine in another shape than a strict parser takes, a hang.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import h11
import msgspec

from modelpool.messages.routing import KEEPALIVE_S, Update
from modelpool.relay import Endpoint
from tests.abuse import EVENT_STREAM
from tests.wire import chunk, response

MODEL = "m"
METHODS = (
    [b"POST"] * 8 + [b"GET"] * 4 + b"HEAD OPTIONS PUT DELETE PATCH TRACE CONNECT PRI get PO\x00ST M-SEARCH".split()
)
PATHS = (
    [b"/v1/completions", b"/v1/chat/completions", b"/v1/responses", b"/v1/messages", b"/v1/embeddings"] * 3
    + [b"/v1/audio/transcriptions", b"/tokenize", b"/v1/responses/resp_1", b"/v1/responses/resp_1/cancel"]
    + [b"/v1/realtime", b"/v1/realtime?model=m", b"/v1/realtime?model=%ff", b"/metrics", b"/openapi.json"]
    + [b"/", b"/health", b"/v1/models", b"/models/m", b"/v1/models/%6d", b"/v1/models/%00", b"/v1/models/\xff"]
    + [b"/admin/models", b"/admin/status", b"/admin/models/register", b"/admin/models/m/logs?tail=1", b"/admin/keys"]
    + [b"/admin/requests/x", b"/workers", b"/workers/register", b"/workers/w/heartbeat", b"/snapshots"]
)
TARGETS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *([lambda rng, path: path] * 12),
    lambda rng, path: b"http://localhost" + path,
    lambda rng, path: b"HTTPS://elsewhere:99" + path,
    lambda rng, path: b"ftp://localhost" + path,
    lambda rng, path: b"http:///" + path,
    lambda rng, path: b"//" + path,
    lambda rng, path: b"/x/.." + path,
    lambda rng, path: path + b"?" + noise(rng, 10),
    lambda rng, path: path + b"?a=b&model=m&model=n;c" * rng.choice((1, 500)),
    lambda rng, path: path + b"#x",
    lambda rng, path: path + b"/",
    lambda rng, path: path.upper(),
    lambda rng, path: path.replace(b"o", b"%6F"),
    lambda rng, path: b"*",
    lambda rng, path: b"localhost:80",
    lambda rng, path: b"",
    lambda rng, path: path + b"/" + b"a" * rng.choice((3000, 70_000)),
    lambda rng, path: noise(rng, 20),
)
VERSIONS = (
    [b"HTTP/1.1"] * 20 + [b"HTTP/1.0"] * 3 + [b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b"HTTP/11", b""]
)
SPACES = [b" "] * 20 + [b"  ", b"\t"]
ENDS = [b"\r\n"] * 20 + [b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\x00\r\n"]
SMUGGLED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 14\r\n\r\n" + b'{"model": "m"}'


def noise(rng: random.Random, length: int) -> bytes:
    return bytes(rng.randrange(256) for _ in range(rng.randrange(length)))


# Bodies

JSON_VALUES = (
    b'"m"',
    b'"m"',
    b'"m"',
    b'"nobody"',
    b'""',
    b"null",
    b"1",
    b"-1",
    b"0.5",
    b"1e400",
    b"9" * 400,
    b"true",
    b"[]",
    b"{}",
    b'["m"]',
    b'{"model": "m"}',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\xff"',
    b"NaN",
    b"[" * 2000 + b"]" * 2000,
    b'"' + b"m" * 5000 + b'"',
)
JSON_NAMES = (
    b"model",
    b"stream",
    b"prompt",
    b"messages",
    b"max_tokens",
    b"n",
    b"input",
    b"previous_response_id",
    b"store",
    b"background",
    b"stream_options",
    b"sampling_params",
    b"",
    b"\\u006dodel",
)


def json_body(rng: random.Random) -> bytes:
    fields = [(b"model", rng.choice(JSON_VALUES[:4] if rng.random() < 0.7 else JSON_VALUES))]
    fields += [(rng.choice(JSON_NAMES), rng.choice(JSON_VALUES)) for _ in range(rng.randrange(4))]
    rng.shuffle(fields)
    body = b"{" + b", ".join(b'"%b": %b' % field for field in fields) + b"}"
    match rng.randrange(12):
        case 0:
            return body[: rng.randrange(len(body))]
        case 1:
            return body + noise(rng, 5)
        case 2:
            return b"\xef\xbb\xbf" + body
        case 3:
            return rng.choice(JSON_VALUES)
        case 4:
            return body + SMUGGLED
        case _:
            return body


def form_body(rng: random.Random) -> bytes:
    parts = [b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n']
    parts.append(
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + noise(rng, 300) + b"\r\n"
    )
    rng.shuffle(parts)
    body = b"".join(parts[rng.randrange(3) // 2 :]) + rng.choice(
        (b"--B--\r\n", b"--B--", b"--B", b"", b"--B\r\n" * 1200)
    )
    return body if rng.random() < 0.8 else mutated(body, rng)


def websocket_frames(rng: random.Random) -> bytes:
    payload = rng.choice(
        (b'{"type": "session.update", "model": "m"}', b"{", b"", b"\xff", b'{"type": "session.update"}')
    )
    first = rng.choice((0x81, 0x81, 0x82, 0x01, 0x88, 0x89, 0x80, 0xF1, 0x83))
    masked = rng.choice((0x80, 0x80, 0x80, 0))
    frame = bytes([first, masked | len(payload)]) + (bytes(4) if masked else b"") + payload
    return frame * rng.randrange(1, 3)


# Framing


def chunked(body: bytes, rng: random.Random) -> bytes:
    pieces = [body[at : at + 7] for at in range(0, min(len(body), 70), 7)] + [body[70:]]
    raw = b"".join(chunk(each) for each in pieces if each)
    match rng.randrange(14):
        case 0:
            return raw + b"0\r\nX-Trailer: y\r\nContent-Length: 3\r\n\r\n"
        case 1:
            return raw + b"0;x=y\r\n\r\n"
        case 2:
            return raw + b"0\r\n"
        case 3:
            return raw.replace(b"\r\n", b"\n") + b"0\n\n"
        case 4:
            return (
                b"%b\r\n" % rng.choice((b"-1", b"0x5", b"+5", b" 5", b"5 ", b"fffffffffffffffff", b"", b"g", b"1_0"))
                + raw
            )
        case 5:
            return raw.replace(b"7\r\n", b"8\r\n", 1) + b"0\r\n\r\n"
        case 6:
            return b"7" + b";e" * 5000 + b"\r\n" + raw
        case 7:
            return raw.replace(b"\r\n", b";\xff\r\n", 1) + b"0\r\n\r\n"
        case _:
            return raw + b"0\r\n\r\n"


def framing(body: bytes, rng: random.Random, *, wrong: bool) -> tuple[list[bytes], bytes]:
    """Header lines and what follows the head."""
    length = b"Content-Length: %d" % len(body)
    te = b"Transfer-Encoding: chunked"
    match rng.randrange(20) if wrong else rng.randrange(13, 26):
        case 0:
            return [length, te], chunked(body, rng)
        case 1:
            return [te, length], body
        case 2:
            return [length, length], body
        case 3:
            return [length, b"Content-Length: %d" % (len(body) + 1)], body
        case 4:
            odd = (b"-1", b"+5", b"5, 5", b"0x5", b"", b"5 5", b"9" * 30, b"\xb2", b"1e1", b"00000000000000000005")
            return [b"Content-Length: " + rng.choice(odd)], body
        case 5:
            return [b"Content-Length: %d" % max(0, len(body) + rng.choice((-5, -1, 1, 5, 10**9)))], body
        case 6:
            codings = (
                b"gzip, chunked",
                b"chunked, chunked",
                b"chunked, identity",
                b"identity",
                b"xchunked",
                b"\x0bchunked",
            )
            return [b"Transfer-Encoding: " + rng.choice(codings)], chunked(body, rng)
        case 7:
            line = rng.choice(
                (b"Transfer-Encoding : chunked", b"Transfer-Encoding:\tchunked", b"Transfer-Encoding:chunked ")
            )
            return [line], chunked(body, rng)
        case 8:
            return [te, te], chunked(body, rng)
        case 9:
            return [b"X: y\n" + te, length], body
        case 10:
            return [b"X: y", b" " + te, length], body
        case 11:
            return [b"Transfer\x00-Encoding: chunked", length], body
        case 12:
            return [], body
        case 13 | 14 | 15 | 16 | 17 | 18:
            return [te], chunked(body, rng)
        case _:
            return [length], body


WEBSOCKET = b"\r\n".join(
    [
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ]
)
EXTRAS = (
    b"Expect: 100-continue",
    b"Expect: 200-ok",
    b"Connection: close",
    b"Connection: keep-alive",
    b"Connection: close, keep-alive",
    b"Connection: Host, Content-Length, X-Nonce",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    WEBSOCKET,
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 12\r\nSec-WebSocket-Key: x",
    b"Upgrade: websocket",
    b"Trailer: X-Trailer",
    b"TE: trailers",
    b"Content-Type: application/json",
    b"Content-Type: multipart/form-data; boundary=B",
    b"Content-Type: multipart/form-data; boundary=" + b"B" * 100,
    b"Content-Type: multipart/form-data",
    b"Content-Encoding: gzip",
    b"Accept-Encoding: gzip",
    b"Accept: application/openmetrics-text; version=1.0.0",
    b"Accept: \xff",
    b"Authorization: Bearer x",
    b"Authorization: Bearer",
    b"Authorization: Basic \xff\xfe",
    b"Authorization: Bearer x\r\nAuthorization: Bearer y",
    b"x-api-key: x",
    b"X-Request-Id: mine",
    b"X-Request-Id: " + b"x" * 1000,
    b"X-Request-Id: \xe9\xff\t ",
    b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    b"traceparent: \xff",
    b"X-ModelPool-Max-Wait: 0",
    b"X-ModelPool-Max-Wait: 1e999",
    b"X-ModelPool-Max-Wait: nan",
    b"X-ModelPool-No-Cold-Start: perhaps",
    b"Origin: http://localhost:3000",
    b"Origin: https://evil.example",
    b"Origin: null",
    b"Origin: http://[",
    b"Access-Control-Request-Method: POST",
    b"Access-Control-Request-Headers: \xff, x",
    b"Forwarded: for=\xff",
    b"Cookie: a=b; c",
    b": no name",
    b"No colon",
    b"Sp ace: x",
    b"X-Null: \x00",
    b"X-High: \x80\xff",
    b"X-Folded: a\r\n b",
    b"X-Long: " + b"x" * 20_000,
    b"X-Longest: " + b"x" * 70_000,
    b"\r\n".join(b"X-%d: y" % number for number in range(300)),
)
FIRST_WRONG_EXTRA = EXTRAS.index(b": no name")
HOSTS = [b"Host: localhost"] * 20 + [
    b"Host: 127.0.0.1:8000",
    b"Host: evil.example",
    b"Host: [::1]",
    b"Host: [",
    b"Host: \xff",
    b"Host:",
    b"Host: localhost\r\nHost: localhost",
    b"X-No-Host: x",
]


def message(rng: random.Random, key: bytes = b"") -> bytes:
    """One request, right or wrong: about half are right as HTTP goes. With `key`, most have it."""
    right = rng.random() < 0.5
    path = rng.choice(PATHS)
    method = rng.choice(METHODS[:13] if right else METHODS)
    extras = rng.choices(EXTRAS[:FIRST_WRONG_EXTRA] if right else EXTRAS, k=rng.choice((0, 0, 1, 1, 2, 4)))
    if b"audio" in path and rng.random() < 0.9:
        method, body, extras = b"POST", form_body(rng), [*extras, b"Content-Type: multipart/form-data; boundary=B"]
    elif b"realtime" in path and rng.random() < 0.9:
        method, extras, body = b"GET", [*extras, WEBSOCKET], b""
    else:
        method = b"POST" if path in PATHS[:15] and rng.random() < 0.8 else method
        body = json_body(rng) if method in (b"POST", b"PUT") or rng.random() < 0.1 else b""
    lines: list[bytes] = []
    behind = websocket_frames(rng) if b"realtime" in path else b""
    if body:
        lines, behind = framing(body, rng, wrong=not right)
    target = path if right else rng.choice(TARGETS)(rng, path)
    version = b"HTTP/1.1" if right else rng.choice(VERSIONS)
    first = (b" " if right else rng.choice(SPACES)).join([method, target, version])
    fields = [HOSTS[0] if right else rng.choice(HOSTS), *lines, *extras]
    if key and rng.random() < 0.8:
        fields.append(b"Authorization: Bearer " + key)
    if rng.random() < 0.3:
        rng.shuffle(fields)
    ends = ENDS if not right and rng.random() < 0.3 else ENDS[:1]
    return b"".join(line + rng.choice(ends) for line in (first, *fields)) + rng.choice(ends) + behind


def mutated(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        at, until = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = noise(rng, 4)
            case 1:
                del data[at : at + rng.randrange(20)]
            case 2:
                data[at:at] = data[until : until + rng.randrange(100)]
            case 3:
                data[at:at] = rng.choice((b"\r\n\r\n", b"\n", b"\x00", b":", b" ", b"\r\n0\r\n\r\n"))
            case _:
                data[at:at] = SMUGGLED
    return bytes(data)


def stream(rng: random.Random, key: bytes = b"") -> list[bytes]:
    """What one client sends, in the pieces in which it does."""
    raw = b"".join(message(rng, key) for _ in range(rng.choice((1, 1, 1, 2, 3, 6))))
    if rng.random() < 0.25:
        raw = mutated(raw, rng)
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw) + 1)]
    cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice((0, 0, 1, 3, 10))))
    pieces = [raw[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    return [each for each in pieces if each]


# The engine


class StrictEngine:
    """Reads what reaches it with another strict parser, and says in the answer which request it answers.

    `wrong` has what could not be read, or was none of its business.
    """

    token = b"Bearer the-cluster-token"
    paths = rb"/v1/[a-z/]+|/tokenize|/v1/responses/[\w%.~-]+(/cancel)?"

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.asked = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        request, body = None, b""
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                if request is None:  # else the gateway left in the middle
                    self.wrong.append(f"{error}: {connection.trailing_data[0]!r}")
                return
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                self._look_at(request)
                await self.respond(request, body, writer)
                connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                connection.send(h11.EndOfMessage())
                connection.start_next_cycle()
                request = None
            else:
                return

    def _look_at(self, request: h11.Request) -> None:
        self.asked += 1
        if dict(request.headers).get(b"authorization", b"") != self.token:
            self.wrong.append(f"without the token: {request}")
        if not re.fullmatch(self.paths, request.target.partition(b"?")[0]):
            self.wrong.append(f"none of its business: {request}")

    async def respond(self, request: h11.Request, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(self.answer(request, body))

    def answer(self, request: h11.Request, body: bytes) -> bytes:
        fields = dict(request.headers)
        text = msgspec.json.encode({"id": fields.get(b"x-request-id", b"").decode("latin-1"), "of": zlib.crc32(body)})
        if b"upgrade" in fields:
            return response(text, status="403 Forbidden")
        if b'"stream": true' not in body:
            return response(text)
        return EVENT_STREAM + chunk(b"data: %b\n\n" % text) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class StrictManager(StrictEngine):
    """The same for the control socket, with one snapshot."""

    token = b""
    paths = rb"/(admin|workers|snapshots|demand|openapi\.json)([/?].*)?"

    def __init__(self, *first: Update) -> None:
        super().__init__()
        self._first = first

    async def respond(self, request: h11.Request, body: bytes, writer: asyncio.StreamWriter) -> None:
        if not request.target.startswith(b"/snapshots"):
            return await super().respond(request, body, writer)
        lines = b"".join(chunk(msgspec.json.encode(each) + b"\n") for each in self._first)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + lines)
        while not writer.is_closing():
            writer.write(chunk(b"\n"))
            await asyncio.sleep(KEEPALIVE_S)
        return None

    def answer(self, request: h11.Request, body: bytes) -> bytes:
        answer = super().answer(request, body)
        return answer if request.method != b"HEAD" else answer[: answer.index(b"\r\n\r\n") + 4]


# The client

OURS_5XX = {
    502: {"upstream_failed"},
    503: {"model_not_ready", "no_available_worker", "waiting_room_full", "too_many_ongoing"},
    504: {"upstream_timeout"},
}
"""What of those above 499 the gateway may say."""
ANSWERED_S = 10.0
QUIET_S = 0.1


class Wrong(AssertionError):
    """What may never come."""


class Received(asyncio.Protocol):
    """A connection, and all that came back on it."""

    def __init__(self) -> None:
        self.raw = b""
        self.news = asyncio.Event()
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self.news.set()

    async def something(self, within: float) -> bool:
        """Wait for more, or the end. Whether there was any, or the end is behind us."""
        if self.ended:
            return True
        self.news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.news.wait()
        return self.news.is_set()


async def attack(endpoint: Endpoint, pieces: Sequence[bytes]) -> Counter[str]:
    """Send this, and look at all that comes back: how often which answer. Raises Wrong."""
    loop = asyncio.get_running_loop()
    transport, received = await loop.create_connection(Received, *endpoint)
    try:
        for piece in pieces:
            if transport.is_closing():
                break
            transport.write(piece)
            await asyncio.sleep(0)
        if not received.raw and holds_a_request(b"".join(pieces)) and not await received.something(ANSWERED_S):
            raise Wrong("a whole request got no answer")
        while not received.ended and await received.something(QUIET_S):
            pass
        # A part of an answer may still be on its way, but not for long.
        while not received.ended and isinstance(answers(received.raw), str):
            if not await received.something(ANSWERED_S):
                break
    finally:
        transport.abort()
    found = answers(received.raw)
    if isinstance(found, str):
        raise Wrong(f"{found}: {received.raw[-500:]!r}")
    return Counter(found)


def holds_a_request(raw: bytes) -> bool:
    """Whether another strict parser finds a whole request at the beginning."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(raw)
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.EndOfMessage):
                return True
            if event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return False
    except h11.ProtocolError:
        return False


_HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [^\r\n]*\r\n((?:[!-9;-~]+: ?[^\r\n]*\r\n)*)\r\n")


def answers(raw: bytes) -> list[str] | str:
    """The answers of one connection, each as its status and code; or what is wrong with them."""
    found: list[str] = []
    while raw:
        head = _HEAD.match(raw)
        if head is None:
            return "no answer, or half of one"
        status, raw = int(head[1]), raw[head.end() :]
        if status == 101:
            return [*found, "101"]
        fields = dict(line.lower().split(b": ", 1) for line in head[2].splitlines())
        body = _body(fields, raw) if status >= 200 and status != 204 else b""
        if body is None:
            return "half an answer"
        raw = raw[_length(fields, raw) :] if body else raw
        if wrong := _wrong(status, fields, body):
            return wrong
        found.append(f"{status} {_code(body)}".strip())
    return found


def _body(fields: dict[bytes, bytes], raw: bytes) -> bytes | None:
    """None if it is not whole. An answer to HEAD has none, which only what comes next tells."""
    if not raw or raw.startswith(b"HTTP/1.1 "):
        return b""
    if b"content-length" in fields:
        length = int(fields[b"content-length"])
        return raw[:length] if len(raw) >= length else None
    if fields.get(b"transfer-encoding") == b"chunked":
        end = raw.find(b"\r\n0\r\n\r\n")
        return None if end < 0 else raw[: end + 7]
    return raw


def _length(fields: dict[bytes, bytes], raw: bytes) -> int:
    body = _body(fields, raw)
    assert body is not None
    return len(body)


def _code(body: bytes) -> str:
    match = re.search(rb'"error":.*"code":"([a-z_0-9]+)"', body)
    return match[1].decode() if match else ""


def _wrong(status: int, fields: dict[bytes, bytes], body: bytes) -> str:
    if status >= 500 and body and _code(body) not in OURS_5XX.get(status, ()):
        return f"status {status}"
    if status >= 400 and body and not _code(body) and b'"id"' not in body and b"from" not in body:
        return f"an error without a code, status {status}"
    if match := re.search(rb'{"id":"([^"]*)","of":', body):
        sent = msgspec.json.decode(b'"%b"' % match[1], type=str).encode("latin-1")
        if sent.lower() != fields.get(b"x-request-id"):
            return f"the answer to another request ({sent!r})"
    return ""


async def attack_for(
    endpoint: Endpoint, seed: int, seconds: float, *, key: bytes = b"", at_once: int = 50
) -> Counter[str]:
    """Attacks from seeds that begin with this one, for so long: how often which answer. Raises Wrong with the seed."""
    seen: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    seeds = itertools.count(seed)

    async def worker() -> None:
        for each in seeds:
            if loop.time() > deadline:
                return
            pieces = stream(random.Random(each), key)
            try:
                seen.update(await attack(endpoint, pieces))
            except Wrong as wrong:
                raise Wrong(f"seed {each}: {wrong}\nsent: {pieces!r}") from wrong
            seen["connections"] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(worker())
    return seen
