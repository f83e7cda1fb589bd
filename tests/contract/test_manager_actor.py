"""The manager's actor as its callers see it when its manager ends, in whichever way. Without Ray: it is an object."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from modelpool.cluster import actor, place
from modelpool.cluster.actor import ManagerActor
from modelpool.errors import PoolError
from modelpool.manager.manager import Manager
from modelpool.manager.startup import manager_of
from modelpool.manager.store import Store, StoreError
from modelpool.messages.cluster import Answer, Call, Deployment, NodeReport, Refusal, Reply, encode_deployment
from modelpool.messages.models import ModelSpec
from modelpool.settings import ManagerSettings, Settings
from tests.stores import held

PATIENCE_S = 60.0
FOR_GOOD_S = 1e6


@asynccontextmanager
async def running_actor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recovery_s: float = 0.01
) -> AsyncIterator[ManagerActor]:
    """With a manager; it has none any more when the block is left."""
    monkeypatch.setattr(actor, "keep_a_replica_on_every_node", lambda: None)
    monkeypatch.setattr(actor, "calm_collector", lambda: None)
    monkeypatch.setattr(place, "_log_to", lambda *_: None)
    manager = ManagerSettings(recovery_s=recovery_s, lease_s=1.0)
    settings = Settings(home=str(folder), token="t", run_id="r", manager=manager)
    made = ManagerActor(encode_deployment(Deployment(settings, "the-admin-key")))
    await until(made, "ok")
    try:
        yield made
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await made.step_aside(FOR_GOOD_S)


async def until(actor: ManagerActor, status: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await actor.health())["status"] != status:
            await asyncio.sleep(0.02)


async def asked(actor: ManagerActor, method: str, *arguments: object) -> Reply:
    call = Call(method, tuple(msgspec.Raw(msgspec.json.encode(each)) for each in arguments))
    async with asyncio.timeout(PATIENCE_S):
        reply: Reply = msgspec.json.decode(await actor.ask(msgspec.json.encode(call)), type=Reply)
        return reply


async def is_away(call: Any, message: str) -> None:
    answer = await call
    assert isinstance(answer, Refusal), answer
    assert (answer.status, answer.code) == (503, "manager_away")
    assert message in answer.message


def put_epoch(folder: Path, change: str) -> None:
    with sqlite3.connect(folder / "modelpool.db", timeout=PATIENCE_S) as other:
        other.execute(f"UPDATE cluster SET epoch = {change}")
    other.close()


def test_one_that_is_deposed_says_so_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with running_actor(tmp_path, monkeypatch) as manager:
            put_epoch(tmp_path, "epoch + 1")
            await until(manager, "starting")
            async with asyncio.timeout(PATIENCE_S):
                while "taken over" not in (await manager.health())["reason"]:
                    await asyncio.sleep(0.02)
            for _ in range(2):
                await is_away(asked(manager, "models"), "Another manager has taken over")
            async with asyncio.timeout(PATIENCE_S):
                await manager.here(msgspec.json.encode(NodeReport(node_id="n", url="http://127.0.0.1:1")))
                with pytest.raises(PoolError, match="Another manager has taken over"):
                    await manager.status()

    asyncio.run(story())


def test_what_keeps_it_from_being_a_manager_is_logged_in_a_line_where_it_is_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [StoreError("The store cannot be used: it is away."), RuntimeError("A mistake.")]

    def failing_at_first(*arguments: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return manager_of(*arguments)

    async def story() -> None:
        monkeypatch.setattr(actor, "manager_of", failing_at_first)
        async with running_actor(tmp_path, monkeypatch):
            pass

    asyncio.run(story())
    said = [(each.getMessage(), bool(each.exc_info)) for each in caplog.records if each.levelname == "ERROR"]
    assert said == [
        ("there is no manager now: The store cannot be used: it is away", False),
        ("there is no manager now: A mistake", True),
    ]


def test_who_waits_for_what_a_manager_no_more_does_is_told_that_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registration is answered once the workers are back, which this manager does not live to see."""

    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with held(f"sqlite:///{tmp_path}/modelpool.db") as store:
                await store.remember_worker("w", f"http://127.0.0.1:{silent.getsockname()[1]}")
            async with running_actor(tmp_path, monkeypatch, recovery_s=FOR_GOOD_S) as manager:
                waiting = asyncio.create_task(asked(manager, "register_model", ModelSpec(alias="a", fake=True)))
                stream = msgspec.json.encode(Call("snapshots"))
                async with asyncio.timeout(PATIENCE_S):
                    while not isinstance(await asked(manager, "model", "a"), Answer):
                        await asyncio.sleep(0.02)
                    put_epoch(tmp_path, "0")
                    await is_away(waiting, "The manager is ending")
                    await until(manager, "ok")
                    assert isinstance(await asked(manager, "model", "a"), Answer)
                    assert isinstance(msgspec.json.decode(await manager.next("s", stream), type=Reply), Answer)

    asyncio.run(story())


def test_what_is_being_written_when_it_steps_aside_is_done_and_what_lasts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(lasts: bool) -> None:
        folder = tmp_path / str(lasts)
        folder.mkdir()
        written, add = threading.Event(), Store.add_model

        async def slowly(self: Store, spec: ModelSpec, created: int) -> None:
            await add(self, spec, created)
            written.set()
            await (asyncio.Event().wait() if lasts else asyncio.sleep(0.1))

        with monkeypatch.context() as patch:
            patch.setattr(Store, "add_model", slowly)
            async with running_actor(folder, monkeypatch) as manager:
                writing = asyncio.create_task(asked(manager, "register_model", ModelSpec(alias="a", fake=True)))
                await asyncio.to_thread(written.wait, PATIENCE_S)
                async with asyncio.timeout(PATIENCE_S):
                    await manager.step_aside(FOR_GOOD_S)
                await is_away(asked(manager, "models"), "another takes its place")
                if lasts:
                    await is_away(writing, "It may have been carried out all the same")
                else:
                    assert isinstance(await writing, Answer)
        async with held(f"sqlite:///{folder}/modelpool.db") as store:
            assert [each.spec.alias for each in await store.models()] == ["a"]

    asyncio.run(story(lasts=False))
    asyncio.run(story(lasts=True))


def test_one_that_fails_as_it_steps_aside_has_done_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        failures = 0

        @asynccontextmanager
        async def failing_once(*arguments: Any) -> AsyncIterator[Manager]:
            nonlocal failures
            async with manager_of(*arguments) as manager:
                yield manager
            failures += 1
            if failures == 1:
                raise StoreError("The disk is gone.")

        monkeypatch.setattr(actor, "manager_of", failing_once)
        async with running_actor(tmp_path, monkeypatch) as manager:
            async with asyncio.timeout(PATIENCE_S):
                await manager.step_aside(FOR_GOOD_S)
            assert failures == 1
            await until(manager, "ok")

    asyncio.run(story())
