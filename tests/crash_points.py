"""`python -m tests.crash_points URL`: a manager is killed at each of its commit points in turn, and started again.

Each life is a fork of this process, which has imported all that a manager needs and has no threads. Prints a line of
JSON for each point; ends with status 1 where a store has something else than what was done up to there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpool.core.pool import Policy
from modelpool.manager.api import control_app
from modelpool.manager.manager import running_manager
from modelpool.manager.store import Store, open_store
from tests.stores import ME

POINTS = ("before commit", "after commit", "before answer", "after answer")
DONE_FROM = POINTS.index("after commit")

State = dict[str, Any]
"""alias → max_replicas, `key NAME` → whether it lives."""


class Change:
    """What a user asks for: the request, what it makes of a state, and how it is answered when it was done before."""

    def __init__(self, name: str, method: str, path: str, body: State, makes: State, again: int) -> None:
        self.name = name
        self.method = method
        self.path = path
        self.body = body
        self.makes = makes
        self.again = again


def changes(round_: int) -> list[Change]:
    a, key = f"a{round_}", f"k{round_}"
    return [
        Change(
            "register", "POST", "/admin/models/register", {"alias": a, "fake": True, "max_replicas": 1}, {a: 1}, 200
        ),
        Change("change", "PATCH", f"/admin/models/{a}", {"max_replicas": 7}, {a: 7}, 200),
        Change(
            "replace",
            "POST",
            "/admin/models/register?replace=true",
            {"alias": a, "fake": True, "fake_capacity": 3, "max_replicas": 5},
            {a: 5},
            200,
        ),
        Change("make a key", "POST", "/admin/keys", {"name": key}, {f"key {key}": True}, 409),
        Change("revoke", "DELETE", f"/admin/keys/{key}", {}, {f"key {key}": False}, 200),
        Change("remove", "DELETE", f"/admin/models/{a}", {}, {a: None}, 404),
    ]


def made(done: list[Change]) -> State:
    state: State = {}
    for change in done:
        state |= change.makes
    return {name: value for name, value in state.items() if value is not None}


# ------------------------------------------------------------ points

_asked: ContextVar[bool] = ContextVar("asked", default=False)
"""Set for what is done because a user asked, and not by the manager's own tasks."""


class Fate:
    """Kills this process at the point of this number, counted from when it is `near`."""

    def __init__(self, number: int) -> None:
        self.near = False
        self._left = number

    def point(self) -> None:
        if not (self.near and _asked.get()):
            return
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def commits(self, store: Store) -> None:
        dialect = store._engine.sync_engine.dialect
        commit = dialect.do_commit

        def committed(connection: Any) -> None:
            self.point()
            commit(connection)
            self.point()

        dialect.do_commit = committed  # type: ignore[method-assign, assignment]

    def answers(self, app: ASGIApp) -> ASGIApp:
        async def fated(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.point()
                await send(message)

            await app(scope, receive, sent)

        return fated


@asynccontextmanager
async def manager(url: str, fate: Fate) -> AsyncIterator[httpx.AsyncClient]:
    async with open_store(url) as store:
        fate.commits(store)
        async with running_manager(store, policy=Policy(), token="t", run_id="r", recovery_s=0.0, holder=ME) as running:
            transport = httpx.ASGITransport(app=fate.answers(control_app(running)))
            async with httpx.AsyncClient(transport=transport, base_url="http://manager") as http:
                yield http


async def ask(http: httpx.AsyncClient, change: Change) -> int:
    path = change.path
    if path.startswith("/admin/keys/"):
        keys = (await http.get("/admin/keys")).json()["keys"]
        path = "/admin/keys/" + next(each["id"] for each in keys if path.endswith(f"/{each['name']}"))
    token = _asked.set(True)
    try:
        return (await http.request(change.method, path, json=change.body or None)).status_code
    finally:
        _asked.reset(token)


async def state(http: httpx.AsyncClient, round_: int) -> State:
    models = (await http.get("/admin/models")).json()["models"]
    keys = (await http.get("/admin/keys")).json()["keys"]
    found = [(each["alias"], each["spec"].get("max_replicas")) for each in models]
    found += [(f"key {each['name']}", each["revoked"] is None) for each in keys]
    mine = [(name, value) for name, value in found if name.removeprefix("key ")[1:] == str(round_)]
    assert len(dict(mine)) == len(mine), f"twice: {mine}"
    return dict(mine)


# ------------------------------------------------------------ lives


async def live(url: str, round_: int, acknowledge: Callable[[], object]) -> None:
    """Look what the life before has left, then ask for one change after the other until killed."""
    fate = Fate(round_)
    async with manager(url, fate) as http:
        if round_ > 0:
            await look(http, round_ - 1)
        fate.near = True
        for change in changes(round_):
            status = await ask(http, change)
            assert status == 200, (change.name, status)
            acknowledge()
            _asked.set(True)
            fate.point()
            _asked.set(False)


async def look(http: httpx.AsyncClient, round_: int) -> None:
    """What there is after that round; and then the user, who had no answer, asks again."""
    number, point = divmod(round_, len(POINTS))
    asked = changes(round_)
    found, expected = await state(http, round_), made(asked[: number + (point >= DONE_FROM)])
    assert found == expected, f"{asked[number].name}, {POINTS[point]}: {found}, not {expected}"
    acknowledged = POINTS[point] == "after answer"
    for change in asked[number + acknowledged :]:
        status = await ask(http, change)
        repeated = change is asked[number] and point >= DONE_FROM
        assert status == (change.again if repeated else 200), (change.name, status)
    assert await state(http, round_) == made(asked)


def play(url: str, round_: int) -> int:
    """A life, in a process of its own; how many changes were acknowledged in it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            asyncio.run(live(url, round_, lambda: os.write(write, b".")))
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    os.close(write)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    acknowledged = len(os.read(read, 1000))
    os.close(read)
    points = len(changes(0)) * len(POINTS)
    assert ended == (-signal.SIGKILL if round_ < points else 0), f"round {round_} ended with {ended}"
    return acknowledged


def main() -> None:
    url, asked = sys.argv[1], changes(0)
    for number, change in enumerate(asked):
        for point, name in enumerate(POINTS):
            acknowledged = play(url, number * len(POINTS) + point)
            assert acknowledged == number + (name == "after answer"), (change.name, name, acknowledged)
            print(json.dumps([change.name, name]), flush=True)
    assert play(url, len(asked) * len(POINTS)) == len(asked)


if __name__ == "__main__":
    main()
