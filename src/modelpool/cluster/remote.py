"""The manager as a gateway's replica sees it: every call goes to the actor, as bytes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import cache
from inspect import Parameter, signature
from typing import Any, TypeVar

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from modelpool.cluster import MANAGER, NAMESPACE
from modelpool.errors import ManagerAway, PoolError
from modelpool.manager.port import ManagerPort
from modelpool.messages.admin import ModelView, PoolStatus, WorkerView
from modelpool.messages.cluster import POLL_S, Answer, Call, End, Item, NodeReport, Nothing, Refusal, Reply
from modelpool.messages.demand import DemandReport
from modelpool.messages.dump import Dump, Loaded
from modelpool.messages.keys import KeyMade, KeySpec, KeyView
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Update, decode_update
from modelpool.messages.workers import Heartbeat, HeartbeatAnswer, RegisterWorker

T = TypeVar("T")

DEADLINE_S = 10.0
BATCH_S = 0.2
"""Heartbeats that come within this go together."""
_RETRY_S = 0.5


class RayManager:
    """The implementation of ManagerPort on Ray. Raises ManagerAway where the actor does not answer."""

    def __init__(self, name: str = MANAGER, namespace: str = NAMESPACE) -> None:
        self._name = name
        self._namespace = namespace
        self._actor: ActorHandle[Any] | None = None
        self._heartbeats: list[tuple[bytes, asyncio.Future[bytes]]] = []
        self._beating: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ models

    async def register_model(self, spec: ModelSpec, replace: bool = False) -> ModelView:
        return await self._ask(ModelView, "register_model", spec, replace)

    async def change_model(self, alias: str, change: dict[str, Any]) -> ModelView:
        return await self._ask(ModelView, "change_model", alias, change)

    async def remove_model(self, alias: str) -> None:
        await self._ask(object, "remove_model", alias)

    async def model(self, alias: str) -> ModelView:
        return await self._ask(ModelView, "model", alias)

    async def models(self) -> list[ModelView]:
        return await self._ask(list[ModelView], "models")

    async def dump(self) -> Dump:
        return await self._ask(Dump, "dump")

    async def load(self, dump: Dump, *, restore: bool) -> Loaded:
        return await self._ask(Loaded, "load", dump, restore)

    async def status(self) -> PoolStatus:
        return await self._ask(PoolStatus, "status")

    # ------------------------------------------------------------ workers

    async def workers(self) -> list[WorkerView]:
        return await self._ask(list[WorkerView], "workers")

    async def register_worker(self, message: RegisterWorker) -> HeartbeatAnswer:
        return await self._ask(HeartbeatAnswer, "register_worker", message)

    async def heartbeat(self, worker_id: str, message: Heartbeat) -> HeartbeatAnswer:
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._heartbeats.append((_encoded("heartbeat", worker_id, message), answered))
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())
        return _value(await answered, HeartbeatAnswer)

    async def unregister_worker(self, worker_id: str, incarnation: str = "") -> None:
        await self._ask(object, "unregister_worker", worker_id, incarnation)

    async def drain_worker(self, worker_id: str) -> WorkerView:
        return await self._ask(WorkerView, "drain_worker", worker_id)

    async def keep_worker(self, worker_id: str) -> WorkerView:
        return await self._ask(WorkerView, "keep_worker", worker_id)

    async def _beat(self) -> None:
        """Send what is there at once, and what comes within BATCH_S after it together, until nothing comes."""
        try:
            while batch := self._heartbeats:
                self._heartbeats = []
                sending = asyncio.create_task(self._send(batch))
                await asyncio.sleep(BATCH_S)
                await sending
        finally:
            self._beating = None

    async def _send(self, batch: list[tuple[bytes, asyncio.Future[bytes]]]) -> None:
        try:
            answers = await self._call("ask_all", [call for call, _ in batch])
            for (_, answered), answer in zip(batch, answers, strict=True):
                if not answered.done():
                    answered.set_result(answer)
        except Exception as error:  # noqa: BLE001  each of them raises it
            for _, answered in batch:
                if not answered.done():
                    answered.set_exception(error)

    # ------------------------------------------------------------ keys

    async def make_key(self, spec: KeySpec) -> KeyMade:
        return await self._ask(KeyMade, "make_key", spec)

    async def keys(self) -> list[KeyView]:
        return await self._ask(list[KeyView], "keys")

    async def revoke_key(self, id: str) -> KeyView:
        return await self._ask(KeyView, "revoke_key", id)

    # ------------------------------------------------------------ gateways

    async def demand(self, report: DemandReport) -> None:
        await self._ask(object, "demand", report)

    async def snapshots(self, gateway: str = "", epoch: str = "") -> AsyncIterator[Update | None]:
        async for raw in self._stream("snapshots", gateway, epoch):
            yield None if raw is None else decode_update(raw)

    async def logs(self, alias: str, *, tail: int, follow: bool) -> AsyncIterator[bytes]:
        async for raw in self._stream("logs", alias, tail, follow):
            if raw is not None:
                yield msgspec.json.decode(raw, type=bytes)

    async def here(self, report: NodeReport) -> None:
        """This node's gateway serves."""
        await self._call("here", msgspec.json.encode(report))

    # ------------------------------------------------------------ the actor

    async def _ask(self, type_: type[T], method: str, *arguments: object) -> T:
        return _value(await self._call("ask", _encoded(method, *arguments)), type_)

    async def _stream(self, method: str, *arguments: object) -> AsyncIterator[msgspec.Raw | None]:
        """The items as they come; None where there was none for POLL_S."""
        name, call = f"{method}-{secrets.token_hex(8)}", _encoded(method, *arguments)
        try:
            while True:
                item = msgspec.json.decode(await self._call("next", name, call), type=Item)
                match item:
                    case Answer(value=value):
                        yield value
                    case Nothing():
                        yield None
                    case Refusal():
                        raise _error(item)
                    case End():
                        return
        finally:
            with suppress(ManagerAway):
                await self._call("close", name)

    async def _call(self, method: str, *arguments: object) -> Any:
        """What a method of the actor returns. After a failure the actor is looked up anew: it may be another one."""
        try:
            async with asyncio.timeout(POLL_S + DEADLINE_S):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(ray.get_actor, self._name, self._namespace)
                return await getattr(self._actor, method).remote(*arguments)
        except (RayError, ValueError, TimeoutError) as error:
            self._actor = None
            reason = "there is no manager actor" if isinstance(error, ValueError) else _first_line(error)
            raise ManagerAway(f"The manager is away: {reason}.", retry_after=_RETRY_S) from error


def _encoded(method: str, *arguments: object) -> bytes:
    """Without what is at its default at the end: an older manager may not know it."""
    given = list(arguments)
    for default in reversed(_defaults(method)):
        if given[-1] != default:
            break
        given.pop()
    return msgspec.json.encode(Call(method, tuple(msgspec.Raw(msgspec.json.encode(each)) for each in given)))


@cache
def _defaults(method: str) -> tuple[object, ...]:
    """Of the last arguments of a method of the port."""
    parameters = signature(getattr(ManagerPort, method)).parameters.values()
    return tuple(each.default for each in parameters if each.default is not Parameter.empty)


def _value(reply: bytes, type_: type[T]) -> T:
    decoded = msgspec.json.decode(reply, type=Reply)
    if isinstance(decoded, Refusal):
        raise _error(decoded)
    return msgspec.json.decode(decoded.value, type=type_)


def _error(refusal: Refusal) -> PoolError:
    if refusal.code == ManagerAway.code:
        return ManagerAway(refusal.message, retry_after=refusal.retry_after)
    error = PoolError(refusal.message, param=refusal.param, retry_after=refusal.retry_after, code=refusal.code)
    error.status, error.type = refusal.status, refusal.kind
    return error


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text or "it does not answer"
