"""A WebSocket of an engine host for callers that cannot reach the host themselves: message for message, both ways."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from modelpool.errors import Draining, UpstreamFailed
from modelpool.relay import Endpoint
from modelpool.relay.websocket import passed_on
from modelpool.worker.waiting import cancelled, first_of

_CONNECT_S = 5.0


async def pass_websocket(
    scope: Scope, receive: Receive, send: Send, endpoint: Endpoint, target: str, *, token: str
) -> None:
    """Until either side ends. Raises Draining or UpstreamFailed before the caller's handshake is answered."""
    await receive()  # websocket.connect
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in passed_on(scope["headers"])]
    try:
        upstream = await connect(
            f"ws://{endpoint.host_header}{target}",
            additional_headers=[*headers, ("Authorization", f"Bearer {token}")],
            user_agent_header=None,
            compression=None,
            max_size=None,
            ping_interval=None,
            open_timeout=_CONNECT_S,
            proxy=None,
        )
    except InvalidStatus as refused:
        if refused.response.status_code == Draining.status:
            raise Draining("This instance takes no new requests.", retry_after=1) from refused
        await send({"type": "websocket.close"})  # which refuses it, as the host did
        return
    except (InvalidHandshake, OSError, EOFError) as error:
        raise UpstreamFailed("The host takes no WebSocket.") from error
    try:
        await send({"type": "websocket.accept"})
        await _pass(upstream, receive, send)
    finally:
        await upstream.close()


async def _pass(upstream: ClientConnection, receive: Receive, send: Send) -> None:
    up = asyncio.create_task(_up(upstream, receive), name="websocket up")
    down = asyncio.create_task(_down(upstream, send), name="websocket down")
    try:
        await first_of(up, down)
        for task in (up, down):
            if task.done():
                task.result()
    finally:
        await cancelled(up, down)


async def _up(upstream: ClientConnection, receive: Receive) -> None:
    """Until the caller leaves."""
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        try:
            await upstream.send(message["bytes"] if text is None else text)
        except ConnectionClosed:
            await asyncio.Event().wait()  # the other task tells the caller
    await upstream.close(*_closing(message))


async def _down(upstream: ClientConnection, send: Send) -> None:
    """Until the host leaves."""
    try:
        while True:
            message = await upstream.recv()
            kind = "text" if isinstance(message, str) else "bytes"
            await send({"type": "websocket.send", kind: message})
    except ConnectionClosed as closed:
        frame = closed.rcvd
        code, reason = (1011, "") if frame is None else (frame.code, frame.reason)
        await send({"type": "websocket.close", "code": code, "reason": reason})


def _closing(message: Message) -> tuple[int, str]:
    """What to say to the host: codes that only stand for something that was not said cannot be sent."""
    code = message.get("code", 1000)
    return (1000 if code in (1005, 1006, 1015) else code), message.get("reason") or ""
