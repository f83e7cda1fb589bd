"""The manager as a Ray actor: detached, named `manager`, started again by Ray for ever.

Ray runs an actor's methods on event loops of its own, one per concurrency group. The manager has one loop, in a thread
of this process, and the methods below only carry calls to it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

import msgspec
import ray
import uvloop

from modelpool.cluster.nodes import keep_a_replica_on_every_node
from modelpool.cluster.place import at_node
from modelpool.cluster.streams import Streams, refusal
from modelpool.cluster.term import Term
from modelpool.errors import InvalidRequest, ManagerAway, PoolError
from modelpool.manager.manager import Manager
from modelpool.manager.port import ManagerPort
from modelpool.manager.startup import holder_here, manager_of
from modelpool.manager.store import Deposed
from modelpool.messages.cluster import ABANDONED_S, Answer, Call, Deployment, NodeReport, Reply
from modelpool.messages.models import ModelSpec, decode_body
from modelpool.process import StartupError, calm_collector

log = logging.getLogger(__name__)

T = TypeVar("T")

STREAMS = "streams"
"""The concurrency group of what is asked for item by item, so that calls never wait behind it."""
_NODES_S = 1.0
_RETRY_INITIAL_S = 0.5
_RETRY_MAX_S = 5.0


class ManagerActor:
    """What gateways' replicas call (`ask`, `ask_all`, `next`, `here`), and what people call.

    People get and give dicts as the HTTP API has them; errors are PoolError, with `status`, `code` and a message.
    """

    def __init__(self, deployment: bytes) -> None:
        self._deployed = deployment
        self._deployment = msgspec.json.decode(deployment, type=Deployment)
        self._term: Term | None = None
        self._reason = "it has just started"
        self._nodes: dict[str, tuple[str, float]] = {}
        self._pause = _RETRY_INITIAL_S
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_until_complete, args=(self._manage(),), daemon=True).start()

    # ------------------------------------------------------------ for people

    async def health(self) -> dict[str, Any]:
        """`status` is "ok" once there is a manager; `reason` says why there is none."""
        return {"status": "starting" if self._term is None else "ok", "reason": self._reason}

    async def status(self) -> dict[str, Any]:
        """What `GET /admin/status` answers."""
        return await self._builtins(lambda manager: manager.status())

    async def register_model(self, body: dict[str, Any]) -> dict[str, Any]:
        """What `POST /admin/models/register` takes; the model."""

        async def register(manager: Manager) -> object:
            return await manager.register_model(decode_body(msgspec.json.encode(body), ModelSpec))

        return await self._builtins(register)

    async def get_model_routing(self, alias: str) -> dict[str, Any]:
        """The model, as `GET /admin/models/{alias}` answers."""
        return await self._builtins(lambda manager: manager.model(alias))

    async def _builtins(self, call: Callable[[Manager], Coroutine[Any, Any, object]]) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], msgspec.to_builtins(await self._carried(lambda term: call(term.manager))))
        except PoolError as error:
            raise flat(error) from None

    # ------------------------------------------------------------ for `deploy`

    async def deployed(self) -> bytes:
        """The Deployment it was made with."""
        return self._deployed

    async def step_aside(self, for_s: float = 30.0) -> None:
        """Let go of the store in order, so that another manager may go on at once, on any node. It comes back after a
        while, in case that nobody took its place.
        """

        async def step(term: Term) -> Term:
            term.make_way(for_s)
            return term

        with suppress(ManagerAway):
            term = await self._carried(step)
            await self._on_loop(term.over())

    # ------------------------------------------------------------ for the gateways' replicas

    async def ask(self, call: bytes) -> bytes:
        """A Call, answered by a Reply."""
        return msgspec.json.encode(await self._reply(msgspec.json.decode(call, type=Call)))

    async def ask_all(self, calls: list[bytes]) -> list[bytes]:
        """Several at once; an answer each."""
        return list(await asyncio.gather(*map(self.ask, calls)))

    @ray.method(concurrency_group=STREAMS)  # type: ignore[untyped-decorator]
    async def next(self, stream: str, call: bytes) -> bytes:
        """The next Item of the stream that is called so, or begins with this call."""
        decoded = msgspec.json.decode(call, type=Call)

        async def item(term: Term) -> object:
            return await term.streams.next(stream, lambda: _called(term.manager, decoded))

        try:
            return msgspec.json.encode(await self._carried(item, lasting=True))
        except PoolError as error:
            return msgspec.json.encode(refusal(error))

    async def close(self, stream: str) -> None:
        """Its reader has left."""

        async def close(term: Term) -> None:
            term.streams.close(stream)

        with suppress(ManagerAway):
            await self._carried(close)

    async def here(self, report: bytes) -> None:
        """A node's gateway serves."""
        node = msgspec.json.decode(report, type=NodeReport)

        async def note(term: Term) -> None:
            now = self._loop.time()
            self._nodes[node.node_id] = (node.url, now)
            self._nodes = {id: said for id, said in self._nodes.items() if now - said[1] < ABANDONED_S}
            term.manager.know_gateways(tuple(sorted(url for url, _ in self._nodes.values())))

        with suppress(ManagerAway):
            await self._carried(note)

    async def _reply(self, call: Call) -> Reply:
        try:
            value = await self._carried(lambda term: _called(term.manager, call))
        except PoolError as error:
            return refusal(error)
        return Answer(msgspec.Raw(msgspec.json.encode(value)))

    # ------------------------------------------------------------ the manager's own loop

    async def _carried(self, call: Callable[[Term], Coroutine[Any, Any, T]], *, lasting: bool = False) -> T:
        """The result of a call on the manager's loop. Raises ManagerAway, and what the manager raises."""

        async def carry() -> T:
            if self._term is None:
                raise ManagerAway(f"The manager is away: {self._reason}.", retry_after=_RETRY_INITIAL_S)
            return await self._term.carry(call, lasting=lasting)

        return await self._on_loop(carry())

    async def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    async def _keep_a_replica_on_every_node(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(keep_a_replica_on_every_node)
            await asyncio.sleep(_NODES_S)

    async def _manage(self) -> None:
        """Be a manager, until another cluster's has taken over, and answer so from then on; where that fails, as while
        the store is away, say why and try again.
        """
        while True:
            try:
                aside_s = await asyncio.create_task(self._be_manager())
            except Deposed as error:
                self._reason = _words(error)
                log.error("this manager does no more: %s", error)
                await asyncio.Event().wait()
            except Exception as error:
                self._reason = _words(error)
                foreseen = isinstance(error, PoolError | StartupError)
                log.error("there is no manager now: %s", self._reason, exc_info=None if foreseen else error)
                await asyncio.sleep(self._pause)
                self._pause = min(_RETRY_MAX_S, 2 * self._pause)
            else:
                log.info("stepped aside")
                await asyncio.sleep(aside_s)

    async def _be_manager(self) -> float:
        """Until it is asked to step aside: for how long. Raises what a manager raises."""
        settings, home = at_node(self._deployment, "manager")
        with home.lock("manager") as lock_id:
            async with manager_of(settings, home, holder_here(lock_id)) as manager, asyncio.TaskGroup() as tasks:
                term = Term(manager, Streams(tasks))
                self._term, self._reason = term, ""
                self._pause = _RETRY_INITIAL_S
                calm_collector()
                beside = [self._keep_a_replica_on_every_node(), term.streams.keep_closing_abandoned()]
                running = [tasks.create_task(each) for each in beside]
                try:
                    aside_s = await term.asked_to_make_way()
                    self._term, self._reason = None, "another takes its place"
                    await term.finish()
                    return aside_s
                finally:
                    if self._term is not None:
                        self._term, self._reason = None, "it is ending"
                    term.end()
                    for task in running:
                        task.cancel()


def flat(error: PoolError) -> PoolError:
    """The same as a plain PoolError, which survives pickling: its subclasses make their messages themselves."""
    plain = PoolError(error.message, param=error.param, retry_after=error.retry_after, code=error.code)
    plain.status, plain.type = error.status, error.type
    return plain


def _called(manager: Manager, call: Call) -> Any:
    """What the method returns: a coroutine, or an iterator. Raises InvalidRequest for what only later versions know.

    Arguments that the caller does not know, or left at their defaults, are not there.
    """
    types = _types(call.method)
    if types is None or len(call.arguments) > len(types):
        raise InvalidRequest("The manager is of an older version, and cannot do that yet.", code="not_known_yet")
    pairs = zip(types.items(), call.arguments, strict=False)
    try:
        given = {name: msgspec.json.decode(raw, type=type_) for (name, type_), raw in pairs}
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The manager is of another version: {error}.", code="not_known_yet") from error
    return getattr(manager, call.method)(**given)


@cache
def _types(method: str) -> dict[str, Any] | None:
    """Its arguments and their types, as the port has them; None where it has no such method."""
    function = getattr(ManagerPort, method, None)
    return function and {name: type_ for name, type_ in get_type_hints(function).items() if name != "return"}


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    hint = f"; {error.hint}" if isinstance(error, StartupError) and error.hint else ""
    return f"{str(error).rstrip('.') or type(error).__name__}{hint}"
