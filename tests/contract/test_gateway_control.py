"""The gateway and the manager: snapshots, requests passed on, the manager away and back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from modelpool.messages.routing import Delta, ModelEntry, Update
from tests.gateway_world import ADMIN_KEY, TOKEN, World, chat, entry, gateway, keys_of, request, snapshot_of
from tests.wire import chunk, gone, on_uvloop, read_message, response, serving

CHUNKED_OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Manager:
    """A manager made of a raw socket: says the updates it is given to all who follow, and answers everything else."""

    def __init__(self, path: Path) -> None:
        self.path = path / "control.sock"
        self.followers: set[asyncio.StreamWriter] = set()
        self.followed = asyncio.Event()
        self.known: list[str] = []
        """The epochs that those who came to follow it knew."""
        self.requests: list[tuple[bytes, bytes]] = []
        self.keys = keys_of()
        self.first: Update | bytes = snapshot_of()
        self.answer = response(b'{"from": "manager"}', "Content-Type: application/json")

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_message(reader)
            if head.startswith(b"GET /snapshots"):
                writer.write(CHUNKED_OK + chunk(_line(self.keys)) + chunk(_line(self.first)))
                self.known.append(head.split(b"epoch=")[1].split(b" ")[0].decode())
                self.followers.add(writer)
                self.followed.set()
                await gone(reader)
                self.followers.discard(writer)
                return
            self.requests.append((head, body))
            writer.write(self.answer)

    def say(self, update: Update | bytes) -> None:
        for writer in self.followers:
            writer.write(chunk(_line(update)))

    @property
    def paths(self) -> list[str]:
        return [" ".join(head.decode().split(" ")[:2]) for head, _ in self.requests]


def _line(update: Update | bytes) -> bytes:
    return (update if isinstance(update, bytes) else msgspec.json.encode(update)) + b"\n"


async def names(world: World) -> list[str]:
    answer = await world.ask(request("GET", "/v1/models"))
    return [model["id"] for model in answer.json["data"]] if answer.status == 200 else [str(answer.status)]


async def until_listed(world: World, *expected: str) -> None:
    async with asyncio.timeout(5):
        while await names(world) != list(expected):
            await asyncio.sleep(0.005)


def some(*aliases: str) -> dict[str, ModelEntry]:
    return {alias: entry(alias, []) for alias in aliases}


@on_uvloop
async def test_before_the_first_snapshot_nothing_is_said_to_be_unknown(tmp_path: Path) -> None:
    async with gateway(home=tmp_path, follow=True) as world:
        for raw in (chat(), request("GET", "/v1/models"), request("GET", "/v1/models/m")):
            answer = await world.ask(raw)
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "manager_away", "1")
        health = await world.ask(request("GET", "/health"))
        assert (health.status, health.json["snapshot"]["epoch"]) == (200, None)


@on_uvloop
async def test_snapshots_and_deltas_are_followed(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    manager.first = snapshot_of(*some("a").values())
    async with serving(manager, path=manager.path), gateway(home=tmp_path, follow=True) as world:
        await until_listed(world, "a")
        manager.say(Delta(epoch="e1", sequence=2, changed=some("b", "c")))
        await until_listed(world, "a", "b", "c")
        manager.say(b"")
        manager.say(Delta(epoch="e1", sequence=3, removed=("a", "b")))
        await until_listed(world, "c")
        health = (await world.ask(request("GET", "/health"))).json["snapshot"]
        assert (health["epoch"], health["sequence"], health["connected"]) == ("e1", 3, True)
        assert health["age_s"] < 5


@pytest.mark.parametrize(
    "wrong",
    [
        Delta(epoch="e1", sequence=3, changed=some("wrong")),
        Delta(epoch="e1", sequence=1, changed=some("wrong")),
        Delta(epoch="e0", sequence=2, changed=some("wrong")),
        b"garbage",
    ],
)
@on_uvloop
async def test_a_gap_is_not_applied_and_asks_for_a_new_snapshot(tmp_path: Path, wrong: Update | bytes) -> None:
    manager = Manager(tmp_path)
    manager.first = snapshot_of(*some("a").values())
    async with serving(manager, path=manager.path), gateway(home=tmp_path, follow=True) as world:
        await until_listed(world, "a")
        manager.first = snapshot_of(*some("b").values(), sequence=7)
        manager.say(wrong)
        while (listed := await names(world)) == ["a"]:
            await asyncio.sleep(0.005)
        assert listed == ["b"]
        manager.say(Delta(epoch="e1", sequence=8, changed=some("c")))
        await until_listed(world, "b", "c")


@on_uvloop
async def test_what_a_later_manager_says_besides_is_passed_over(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    manager.first = snapshot_of(*some("a").values())
    async with serving(manager, path=manager.path), gateway(home=tmp_path, follow=True) as world:
        await until_listed(world, "a")
        manager.first = b"garbage"
        manager.say(b'{"type": "other"}')
        manager.say(Delta(epoch="e1", sequence=2, changed=some("b")))
        await until_listed(world, "a", "b")


@on_uvloop
async def test_with_the_manager_away_requests_go_on_and_a_new_one_is_followed(tmp_path: Path) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            writer.write(response(b"x"))

    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serving(engine))
        world = await stack.enter_async_context(gateway(home=tmp_path, follow=True))
        old = Manager(tmp_path)
        old.first = snapshot_of(entry("m", [endpoint]))
        async with serving(old, path=old.path):
            await until_listed(world, "m")
        old.path.unlink(missing_ok=True)
        assert (await world.ask(chat())).body == b"x"
        away = await world.ask(request("GET", "/admin/status"))
        assert (away.status, away.code, away.headers["retry-after"]) == (503, "manager_away", "1")
        while (unknown := await world.ask(chat("n"))).code == "model_not_found":
            await asyncio.sleep(0.01)  # it has not noticed yet
        assert (unknown.status, unknown.code) == (503, "manager_away")  # a new manager may know it by now
        new = Manager(tmp_path)
        new.first = snapshot_of(entry("m", [endpoint]), *some("n").values(), epoch="e2", sequence=1)
        async with serving(new, path=new.path):
            await until_listed(world, "m", "n")
            assert (await world.ask(chat("o"))).code == "model_not_found"
            assert (await world.ask(request("GET", "/admin/status"))).json == {"from": "manager"}
        assert (await world.ask(chat())).body == b"x"


@on_uvloop
async def test_a_gateway_without_models_follows_whoever_is_there_and_says_what_it_knows_to_an_older_one(
    tmp_path: Path,
) -> None:
    """As after a restore from a backup: the manager then has an epoch that is later still."""
    manager = Manager(tmp_path)
    manager.first = snapshot_of(epoch="c.3")
    async with gateway(home=tmp_path, follow=True) as world:
        async with serving(manager, path=manager.path):
            await manager.followed.wait()
            await until_listed(world)
        manager.path.unlink(missing_ok=True)
        restored = Manager(tmp_path)
        restored.first = snapshot_of(epoch="c.2")
        async with serving(restored, path=restored.path):
            while "c.3" not in restored.known:
                await asyncio.sleep(0.01)
            restored.first = snapshot_of(*some("a").values(), epoch="c.4")
            await until_listed(world, "a")
        restored.path.unlink(missing_ok=True)
        assert restored.known[:2] == ["", "c.3"]


@on_uvloop
async def test_a_manager_that_was_deposed_is_not_followed(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    manager.first = snapshot_of(*some("a").values(), epoch="c.3")
    async with gateway(home=tmp_path, follow=True) as world:
        async with serving(manager, path=manager.path):
            await until_listed(world, "a")
        manager.path.unlink(missing_ok=True)
        old = Manager(tmp_path)
        old.first = snapshot_of(*some("wrong").values(), epoch="c.2", sequence=9)
        async with serving(old, path=old.path):
            while len(old.known) < 2:
                await asyncio.sleep(0.01)
            assert await names(world) == ["a"]
        old.path.unlink(missing_ok=True)
        new = Manager(tmp_path)
        new.first = snapshot_of(*some("b").values(), epoch="c.4")
        async with serving(new, path=new.path):
            await until_listed(world, "b")
            assert (old.known[0], new.known) == ("c.3", ["c.3"])


@on_uvloop
async def test_requests_for_the_manager_are_passed_on(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    async with serving(manager, path=manager.path), gateway(home=tmp_path) as world:
        client = await world.connect()
        token = {"Authorization": f"Bearer {TOKEN}"}
        for raw in (
            request("GET", "/admin/status"),
            request("GET", "/admin/models/org/m/logs?tail=5&follow=true"),
            request("POST", "/admin/models/register", b'{"alias": "m"}'),
            request("POST", "/v1/models/register", b'{"alias": "m"}'),
            request("DELETE", "/admin/models/m"),
            request("GET", "/workers"),
            request("POST", "/workers/register", b"{}", token),
            request("POST", "/workers/w/heartbeat", b"{}", token),
            request("DELETE", "/workers/w/unregister", headers=token),
        ):
            assert (await client.ask(raw)).raw == manager.answer
        assert manager.paths == [
            "GET /admin/status",
            "GET /admin/models/org/m/logs?tail=5&follow=true",
            "POST /admin/models/register",
            "POST /admin/models/register",
            "DELETE /admin/models/m",
            "GET /workers",
            "POST /workers/register",
            "POST /workers/w/heartbeat",
            "DELETE /workers/w/unregister",
        ]
        assert manager.requests[2][1] == b'{"alias": "m"}'
        assert all(TOKEN.encode() not in head for head, _ in manager.requests)


@on_uvloop
async def test_what_the_manager_streams_arrives_as_it_comes_and_ends_when_the_client_leaves(tmp_path: Path) -> None:
    left = asyncio.Event()
    go_on = asyncio.Semaphore(0)

    async def follow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(CHUNKED_OK)
        for number in range(3):
            writer.write(chunk(b"line %d\n" % number))
            await go_on.acquire()
        await gone(reader)
        left.set()

    async with serving(follow, path=tmp_path / "control.sock"), gateway(home=tmp_path) as world:
        client = await world.connect()
        client.send(request("GET", "/admin/models/m/logs?follow=true"))
        for number in range(3):
            await client.reader.readuntil(b"line %d\n" % number)
            go_on.release()
        client.close()
        async with asyncio.timeout(1):
            await left.wait()


@on_uvloop
async def test_a_manager_that_dies_with_the_request_may_have_carried_it_out(tmp_path: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)

    async with serving(die, path=tmp_path / "control.sock"), gateway(home=tmp_path) as world:
        answer = await world.ask(request("POST", "/admin/models/register", b"{}"))
        assert (answer.status, answer.code) == (503, "manager_away")
        assert "may have been carried out" in answer.message


@on_uvloop
async def test_a_refused_request_never_reaches_the_manager(tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    async with serving(manager, path=manager.path), gateway(home=tmp_path, api_key="key") as world:
        for headers, status in (({}, 401), ({"Authorization": "Bearer key"}, 403)):
            assert (await world.ask(request("GET", "/admin/status", headers=headers))).status == status
            assert (await world.ask(request("POST", "/v1/models/register", b"{}", headers))).status == status
        admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert (await world.ask(request("POST", "/workers/register", b"{}", admin))).status == 401
        assert manager.requests == []
        assert (await world.ask(request("GET", "/admin/status", headers=admin))).status == 200
