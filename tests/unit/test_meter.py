"""Every request through a host is checked, counted once, and timed."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from modelpool.engines.engine import ASGIApp, Receive, Scope, Send
from modelpool.engines.meter import Meter
from modelpool.testing.asgi import Call
from modelpool.testing.virtual_time import run_virtual

TOKEN = "secret"
AUTHORIZED = [("Authorization", f"Bearer {TOKEN}")]


def meter(app: ASGIApp) -> Meter:
    return Meter(app, TOKEN, clock=lambda: asyncio.get_running_loop().time())


def answering(*, status: int = 200, first_s: float = 1.0, last_s: float = 2.0) -> ASGIApp:
    """Sends its first byte after `first_s` and its last one `last_s` later."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(first_s)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.sleep(last_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


async def raising(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("the app broke")


async def half(scope: Scope, receive: Receive, send: Send) -> None:
    """The connection breaks in the middle of the answer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    raise ConnectionResetError


async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


def request(method: str = "POST", type_: str = "http") -> Call:
    return Call(method, "/v1/chat/completions", headers=AUTHORIZED, type_=type_)


def test_a_request_is_timed_to_its_first_and_to_its_last_byte() -> None:
    async def main() -> None:
        door = meter(answering())
        await request().run(door)
        assert (door.ttft.last, door.e2e.last) == (1.0, 3.0)
        assert (door.inflight, door.requests_total) == (0, 1)

    run_virtual(main())


def test_averages_are_over_all_requests() -> None:
    delays = iter([1.0, 3.0])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answering(first_s=next(delays), last_s=0)(scope, receive, send)

    async def main() -> None:
        door = meter(app)
        await request().run(door)
        await request().run(door)
        assert (door.ttft.last, door.ttft.average) == (3.0, 2.0)

    run_virtual(main())


def test_a_refused_request_counts_but_its_time_does_not() -> None:
    async def main() -> None:
        door = meter(answering(status=400))
        await request().run(door)
        assert (door.requests_total, door.ttft.last, door.e2e.last) == (1, None, None)

    run_virtual(main())


def test_tokenizing_counts_but_its_time_does_not() -> None:
    async def main() -> None:
        door = meter(answering())
        await Call("POST", "/tokenize", headers=AUTHORIZED).run(door)
        assert (door.requests_total, door.ttft.last, door.e2e.last) == (1, None, None)

    run_virtual(main())


@pytest.mark.parametrize("app", [raising, half])
def test_a_request_that_breaks_is_given_back(app: ASGIApp) -> None:
    async def main() -> None:
        door = meter(app)
        with contextlib.suppress(RuntimeError, ConnectionResetError):
            await request().run(door)
        assert (door.inflight, door.requests_total, door.e2e.last) == (0, 1, None)
        await door.idle()

    run_virtual(main())


def test_a_cancelled_request_is_given_back() -> None:
    async def main() -> None:
        door = meter(waiting)
        task = asyncio.ensure_future(request().run(door))
        await asyncio.sleep(1)
        assert door.inflight == 1
        task.cancel()
        await asyncio.wait({task})
        assert door.inflight == 0
        await door.idle()

    run_virtual(main())


def test_idle_waits_for_the_last_of_several() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        door = meter(answering(first_s=1, last_s=4))
        tasks = [asyncio.ensure_future(request().run(door))]
        await asyncio.sleep(2)
        tasks.append(asyncio.ensure_future(request().run(door)))
        await asyncio.sleep(1)
        assert door.inflight == 2
        await door.idle()
        assert (loop.time(), door.inflight) == (7.0, 0)
        await asyncio.gather(*tasks)

    run_virtual(main())


def test_a_get_is_let_through_and_not_counted() -> None:
    async def main() -> None:
        door = meter(answering())
        call = await request("GET").run(door)
        assert (call.status, door.requests_total) == (200, 0)

    run_virtual(main())


@pytest.mark.parametrize(
    "headers",
    [[], [("Authorization", "Bearer wrong")], [("Authorization", TOKEN)], [("X-Api-Key", TOKEN)]],
    ids=["none", "wrong", "no scheme", "another header"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_nothing_is_reached(method: str, headers: list[tuple[str, str]]) -> None:
    async def main() -> None:
        door = meter(raising)
        call = await Call(method, "/v1/models", headers=headers).run(door)
        assert (call.status, call.json["error"]["code"]) == (401, "invalid_api_key")
        assert call.headers["www-authenticate"] == "Bearer"
        assert door.requests_total == 0

    run_virtual(main())


@pytest.mark.parametrize("extensions", [{}, {"websocket.http.response": {}}])
def test_a_websocket_without_the_token_is_refused_before_it_opens(extensions: dict[str, object]) -> None:
    async def main() -> None:
        call = Call("GET", "/v1/realtime", type_="websocket")
        call.scope["extensions"] = extensions
        await call.run(meter(raising))
        first = call.sent[0]
        if extensions:
            assert (first["type"], first["status"]) == ("websocket.http.response.start", 401)
        else:
            assert (first["type"], first["code"]) == ("websocket.close", 1008)

    run_virtual(main())


def test_while_draining_new_requests_are_refused_and_old_ones_end() -> None:
    async def main() -> None:
        door = meter(answering())
        old = asyncio.ensure_future(request().run(door))
        await asyncio.sleep(0.5)
        door.draining = True
        refused = await request().run(door)
        assert (refused.status, refused.json["error"]["code"]) == (503, "instance_draining")
        assert refused.headers["retry-after"] == "1"
        assert (await request("GET").run(door)).status == 200
        assert (await old).status == 200
        assert door.requests_total == 1

    run_virtual(main())


def test_nothing_is_held_back_between_app_and_client() -> None:
    seen: list[tuple[Receive, int]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((receive, len(call.sent)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((receive, len(call.sent)))

    async def main() -> None:
        await call.run(meter(app))
        assert seen == [(call.receive, 0), (call.receive, 1)]

    call = request()
    run_virtual(main())


def test_the_lifespan_goes_through_without_a_token() -> None:
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        events.append(scope["type"])

    async def main() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "lifespan.startup"}

        async def send(message: object) -> None:
            return None

        await meter(app)({"type": "lifespan"}, receive, send)

    run_virtual(main())
    assert events == ["lifespan"]
