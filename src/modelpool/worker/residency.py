"""Puts one instance to sleep and wakes it, as ordered, and measures what that gives and takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from modelpool.messages.engine import Drain, Drained, Sleep, SleepFailed, SleepRefused, Slept, Wake, WakeFailed, Woken
from modelpool.messages.workers import LevelChange, SleepOrder
from modelpool.worker.devices import Held
from modelpool.worker.host import Host
from modelpool.worker.instance import Instance

log = logging.getLogger(__name__)

Measure = Callable[[int], Held]
"""What the processes of a host hold, by its process id. Blocks."""


async def follow_orders(instance: Instance, host: Host, limit_s: float, measure: Measure) -> str:
    """Carry out one order after the other; returns why the instance is of no use any more.

    `limit_s`: what a wake may take, or a sleep after its drain.
    """
    instance.measured(await asyncio.to_thread(measure, host.pid))
    while True:
        order = await instance.orders.get()
        try:
            match order:
                case SleepOrder():
                    problem = await _sleep(instance, host, order, limit_s, measure)
                case Wake():
                    async with asyncio.timeout(limit_s):
                        problem = await _wake(instance, host, measure)
        except TimeoutError:
            what = "wake" if isinstance(order, Wake) else "fall asleep"
            problem = f"it took more than {limit_s:g} s to {what}"
        if problem:
            return problem


async def _sleep(instance: Instance, host: Host, order: SleepOrder, limit_s: float, measure: Measure) -> str:
    assert order.drain_s is not None
    async with asyncio.timeout(order.drain_s + limit_s):
        answer = await host.change(Drain(order.drain_s))
    drain_s = answer.seconds if isinstance(answer, Drained) else order.drain_s
    before = await asyncio.to_thread(measure, host.pid)
    if isinstance(answer, Drained):
        async with asyncio.timeout(limit_s + order.drain_s - drain_s):
            answer = await host.change(Sleep(order.level))
    match answer:
        case Slept(seconds=seconds):
            after = await asyncio.to_thread(measure, host.pid)
            change = LevelChange(
                level=order.level,
                seconds=seconds,
                drain_s=drain_s,
                bytes_before=before.host_bytes,
                bytes_after=after.host_bytes,
                device_bytes_before=before.device_bytes,
                device_bytes_after=after.device_bytes,
            )
            instance.fall_asleep(change, after)
            log.info("%s sleeps: %s", instance.name, instance.last_sleep)
        case SleepRefused(reason):
            log.warning("%s stays as it was: %s", instance.name, reason)
            instance.stay(LevelChange(level=order.level, drain_s=drain_s, reason=reason))
        case SleepFailed(reason):
            return reason
    return ""


async def _wake(instance: Instance, host: Host, measure: Measure) -> str:
    before = instance.held
    match await host.change(Wake()):
        case Woken(level=level, seconds=seconds, canary_s=canary_s):
            # Before it is measured: somebody waits for it.
            change = LevelChange(
                level=level,
                seconds=seconds,
                canary_s=canary_s,
                bytes_before=before.host_bytes,
                device_bytes_before=before.device_bytes,
            )
            instance.awake(change)
            instance.measured(await asyncio.to_thread(measure, host.pid))
            log.info("%s is awake: %s", instance.name, instance.last_wake)
        case WakeFailed(reason):
            return reason
    return ""
