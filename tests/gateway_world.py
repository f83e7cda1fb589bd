"""A small world for the gateway: its listener in this process, upstreams and a manager made of raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from modelpool.gateway.app import GatewayApp
from modelpool.gateway.auth import Access
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.control import Control
from modelpool.gateway.cors import Cors
from modelpool.gateway.hold import Room, Rules
from modelpool.gateway.inference import Inference
from modelpool.gateway.instances import Instances
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.listener import Listener, listening
from modelpool.gateway.observe.observers import observing
from modelpool.gateway.realtime import Realtime
from modelpool.gateway.responses import Responses
from modelpool.gateway.shared import joined
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.stored import StoredResponses
from modelpool.gateway.table import Table
from modelpool.messages.routing import KeyEntry, Keys, ModelEntry, Route, Snapshot, Unavailable
from modelpool.relay import Deadlines, Endpoint, Pools
from modelpool.settings import GatewaySettings
from modelpool.tcp import bind_tcp

ADMIN_KEY = "the-admin-key"
API_KEY = "the-api-key"
TOKEN = "the-cluster-token"


def entry(alias: str, endpoints: Iterable[Endpoint], *, prefix: str = "", capacity: int = 1000) -> ModelEntry:
    """A model with an instance at each endpoint."""
    routes = tuple(
        Route(
            instance=f"{alias}-r{number}" if number > 1 else alias,
            worker_id="w",
            host=endpoint.host,
            port=endpoint.port,
            prefix=prefix,
            capacity=capacity,
        )
        for number, endpoint in enumerate(endpoints, 1)
    )
    starting = Unavailable(code="model_not_ready", message=f"The model `{alias}` is starting.", retry_after=7.0)
    return ModelEntry(alias=alias, created=1, routes=routes, unavailable=None if routes else starting)


def snapshot_of(*entries: ModelEntry, epoch: str = "e1", sequence: int = 1) -> Snapshot:
    return Snapshot(epoch=epoch, sequence=sequence, models={each.alias: each for each in entries})


def key(secret: str, **more: Any) -> KeyEntry:
    """A live key with this secret; the name it goes by is `id`, unless told otherwise."""
    given = {"id": "key-1", **more}
    return KeyEntry(name=given.pop("name", given["id"]), digest=sha256(secret.encode()).hexdigest(), **given)


def keys_of(*keys: KeyEntry, required: bool | None = None, epoch: str = "e1", sequence: int = 1) -> Keys:
    return Keys(epoch=epoch, sequence=sequence, required=bool(keys) if required is None else required, keys=keys)


class World:
    """A gateway and what it is made of."""

    def __init__(
        self,
        endpoint: Endpoint,
        table: Table,
        instances: Instances,
        feed: SnapshotFeed,
        stored: StoredResponses,
        listener: Listener,
        keys: KeyRing,
        room: Room,
    ) -> None:
        self.room = room
        self.stored = stored
        self.endpoint = endpoint
        self.keys = keys
        self.table = table
        self.instances = instances
        self.feed = feed
        self.listener = listener

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}"

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection(*self.endpoint))

    async def ask(self, raw: bytes) -> Answer:
        """Send bytes on a connection of their own, and take one answer."""
        client = await self.connect()
        try:
            return await client.ask(raw)
        finally:
            client.close()

    async def until_idle(self) -> None:
        """Wait until nothing is in flight to any instance, and nothing waits."""
        async with asyncio.timeout(5):
            while self.instances.inflight or self.room.ongoing or self.room.waiting:
                await asyncio.sleep(0.001)


class Answer(msgspec.Struct, frozen=True):
    """`raw` is all of it but for the request's id; `body` has the framing taken off."""

    raw: bytes
    request_id: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.json["error"]["message"])


class Client:
    """One connection of a client that checks every byte it gets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, raw: bytes) -> None:
        self.writer.write(raw)

    async def ask(self, raw: bytes) -> Answer:
        self.send(raw)
        return await self.answer(head_only=raw.startswith(b"HEAD "))

    async def answer(self, *, head_only: bool = False) -> Answer:
        """Read one answer by its own framing."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        request_id = headers.pop("x-request-id", "")
        head = head.replace(f"X-Request-Id: {request_id}\r\n".encode(), b"")
        status = int(status_line.split()[1])
        raw, body = head, b""
        if head_only or status in (204, 304) or status < 200:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while True:
                size = await self.reader.readuntil(b"\r\n")
                if not int(size, 16):
                    break
                data = await self.reader.readexactly(int(size, 16) + 2)
                assert data.endswith(b"\r\n")
                raw, body = raw + size + data, body + data[:-2]
            raw += size
            while not raw.endswith(b"\r\n\r\n"):  # trailers
                raw += await self.reader.readuntil(b"\r\n")
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
            raw += body
        else:
            body = await self.reader.read()
            raw += body
        return Answer(raw, request_id, status, headers, body)

    async def at_end(self) -> bool:
        """Whether the gateway closes now, having said nothing more."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read(1) == b""
        return True

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


def request(
    method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *, version: str = "1.1"
) -> bytes:
    fields = {"Host": "localhost", **(headers or {})}
    if body:
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chat(model: str = "m", *, headers: Mapping[str, str] | None = None, version: str = "1.1", **more: object) -> bytes:
    """A chat request for a model."""
    body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "hello"}], **more})
    return request(
        "POST",
        "/v1/chat/completions",
        body,
        {"Content-Type": "application/json", **(headers or {})},
        version=version,
    )


@asynccontextmanager
async def gateway(
    *entries: ModelEntry,
    home: Path | None = None,
    api_key: str = "",
    local: bool = True,
    limits: Limits | None = None,
    grace_s: float = 0.1,
    follow: bool = False,
    remembered: int = 100,
    observed: GatewaySettings = GatewaySettings(),
    first_events_s: float = 60.0,
    cors: str = "",
    root_path: str = "",
    tls: ssl.SSLContext | None = None,
    deadlines: Deadlines = Deadlines(),
    keys: Iterable[KeyEntry] = (),
    require_key: bool = False,
    clock: Callable[[], float] = time.monotonic,
    folder: Path | None = None,
    rules: Rules = Rules(max_ongoing=10_000),
) -> AsyncIterator[World]:
    """A gateway that routes by a snapshot of `entries`, or with `follow` by what the manager in `home` says.

    `observed`: the settings of metrics, traces and logs, which lie in `home`.
    """
    upstreams, controls = Pools(connect_timeout_s=1.0), Pools(connect_timeout_s=1.0)
    control = controls.pool(Endpoint.unix((home or Path("/nonexistent")) / "control.sock"))
    instances = Instances(upstreams, TOKEN)
    table = Table(instances)
    room = Room(table, rules)
    ring = KeyRing()
    feed = SnapshotFeed(table, ring, control)
    if not follow:
        table.apply(snapshot_of(*entries))
        ring.apply(keys_of(*keys))
    access = Access(
        api_key=api_key,
        admin_key=ADMIN_KEY,
        cluster_token=TOKEN,
        local=local,
        keys=ring,
        require_key=require_key,
        cors=Cors.parse(cors),
    )
    stored = StoredResponses(remembered)
    sock: socket.socket = bind_tcp("127.0.0.1", 0, flag="", variable="")
    async with AsyncExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        node = stack.enter_context(joined(folder or Path(temporary)))
        limiter = Limiter(node, clock=clock)
        ring.when_gone(limiter.forget)
        inference = Inference(table, room, stored, limiter, deadlines)
        logs = home or Path(temporary)
        observers = await stack.enter_async_context(observing(node, table, instances, observed, logs))
        responses = Responses(table, inference, stored)
        realtime = Realtime(table, room, limiter, connect_timeout_s=1.0, first_events_s=first_events_s)
        app = GatewayApp(
            access,
            table,
            feed,
            inference,
            responses,
            realtime,
            Control(control),
            observers,
            cors=Cors.parse(cors),
            root_path=root_path,
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        following = [tasks.create_task(feed.follow())] if follow else []
        async with listening(sock, app, limits or Limits(body_bytes=1 << 20), grace_s=grace_s, tls=tls) as listener:
            following.append(tasks.create_task(observers.keep_saying(feed, listener)))
            yield World(Endpoint(*sock.getsockname()[:2]), table, instances, feed, stored, listener, ring, room)
        for task in following:
            task.cancel()
    upstreams.close()
    controls.close()
