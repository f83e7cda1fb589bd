"""Orders are given to workers, one about an instance at a time; what comes of each is an event."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from modelpool.core import events
from modelpool.core.orders import Dismiss, Effect, Sleep, Start, Stop, Wake
from modelpool.core.pool import Key
from modelpool.manager.lease import Lease
from modelpool.manager.state import State
from modelpool.manager.worker_client import OrderFailed, WorkerClient, WorkerUnreachable
from modelpool.messages.workers import StartOrder, WorkerInfo

log = logging.getLogger(__name__)


class Orders:
    """`publish` tells the gateways what is new of a model; `forget` a worker, of one of its lives, that has ended."""

    def __init__(
        self,
        client: WorkerClient,
        lease: Lease,
        state: State,
        *,
        publish: Callable[[str], None],
        forget: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._client = client
        self._lease = lease
        self._state = state
        self._publish = publish
        self._forget = forget
        self._ordering: set[Key] = set()
        # Orders that came up while one about the same instance was under way.
        self._postponed: set[Key] = set()

    async def give(self, effect: Effect) -> None:
        """Give one order. An answer becomes an event; silence none, and the order is given again when it is due."""
        key = (effect.worker_id, effect.instance)
        facts = self._state.facts.get(effect.worker_id)
        if facts is None:
            return
        if key in self._ordering:
            self._postponed.add(key)
            return
        if not self._lease.valid:
            self._state.apply(events.OrderPostponed(key))
            return
        self._ordering.add(key)
        try:
            match effect:
                case Start():
                    await self._start(facts.info.url, effect)
                case Stop():
                    await self._stop(facts.info.url, effect)
                case Sleep():
                    await self._sleep(facts.info.url, effect)
                case Wake():
                    await self._wake(facts.info.url, effect)
                case Dismiss():
                    await self._dismiss(facts.info)
        except OrderFailed as error:
            log.warning("%s: %s refused: %s", effect.worker_id, effect.instance, error)
            self._state.apply(events.OrderRefused(key, str(error), permanent=error.permanent))
        except WorkerUnreachable as error:
            log.warning("%s: an order about %s got no answer: %s", effect.worker_id, effect.instance, error)
        except Exception:
            log.exception("%s: an order about %s failed", effect.worker_id, effect.instance)
        finally:
            self._ordering.discard(key)
            if key in self._postponed:
                self._postponed.discard(key)
                self._state.apply(events.OrderPostponed(key))

    async def _start(self, url: str, effect: Start) -> None:
        spec = self._state.specs.get(effect.alias)
        instance = self._state.pool.instances.get((effect.worker_id, effect.instance))
        if spec is None or instance is None or instance.stopping:
            return
        log.info("start %s on %s, devices %s", effect.instance, effect.worker_id, effect.devices)
        # Where the user gave no size, the engine's own default decides; what was set aside for it is an estimate.
        sized = spec.gpu_memory_gb is not None or spec.gpu_memory_utilization is not None
        order = StartOrder(
            model=spec,
            instance=effect.instance,
            devices=effect.devices,
            memory_bytes=instance.memory_bytes if sized else 0,
        )
        await self._client.start(url, order)
        self._state.apply(events.OrderAnswered((effect.worker_id, effect.instance)))

    async def _stop(self, url: str, effect: Stop) -> None:
        log.info("stop %s on %s: %s", effect.instance, effect.worker_id, effect.reason)
        self._close(effect)  # no new request is sent to it from now on
        await self._client.stop(url, effect.instance, effect.drain_s)

    async def _sleep(self, url: str, effect: Sleep) -> None:
        log.info("sleep level %d for %s on %s: %s", effect.level, effect.instance, effect.worker_id, effect.reason)
        self._close(effect)  # no new request is sent to it from now on
        await self._client.sleep(url, effect.instance, effect.level)
        self._state.apply(events.OrderAnswered((effect.worker_id, effect.instance)))

    async def _wake(self, url: str, effect: Wake) -> None:
        log.info("wake %s on %s: %s", effect.instance, effect.worker_id, effect.reason)
        await self._client.wake(url, effect.instance)
        self._state.apply(events.OrderAnswered((effect.worker_id, effect.instance)))

    async def _dismiss(self, info: WorkerInfo) -> None:
        """A drained worker may end. One that has ended already, without a word, is forgotten."""
        log.info("worker %s is drained", info.worker_id)
        try:
            await self._client.dismiss(info.url)
        except WorkerUnreachable as error:
            if not error.refused:
                raise
            await self._forget(info.worker_id, info.incarnation)

    def _close(self, effect: Stop | Sleep) -> None:
        instance = self._state.pool.instances.get((effect.worker_id, effect.instance))
        if instance is not None:
            self._publish(instance.alias)
