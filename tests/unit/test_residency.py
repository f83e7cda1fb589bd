"""A host puts its engine to sleep and wakes it: closed first, open only when the model is what it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from modelpool.engines.canary import Reading
from modelpool.engines.engine import Facts
from modelpool.engines.fake.engine import FakeEngine
from modelpool.engines.meter import Meter
from modelpool.engines.residency import Residency
from modelpool.messages.engine import Drained, SleepFailed, SleepRefused, Slept, WakeFailed, Woken
from modelpool.messages.models import ModelSpec
from modelpool.testing.asgi import post
from modelpool.testing.virtual_time import run_virtual

SOUND = Reading(vector=(1.0, 0.0))
OTHER = Reading(vector=(0.0, 1.0))


class AdaptedEngine(FakeEngine):
    """Its canary says what the test wants; it has the levels that the test wants."""

    readings: Mapping[str, Reading] = {"": SOUND}
    levels: tuple[int, ...] = (1, 2)

    @property
    def facts(self) -> Facts:
        return replace(super().facts, sleep_levels=self.levels)

    async def canary(self) -> Mapping[str, Reading]:
        return self.readings


Story = Callable[[Residency, Meter, AdaptedEngine], Awaitable[None]]


def tell(story: Story, **model: Any) -> None:
    async def main() -> None:
        engine = AdaptedEngine(ModelSpec(alias="m", fake=True, fake_response="one", **model))
        meter = Meter(await engine.start(), "secret")
        await story(Residency(engine, meter), meter, engine)

    run_virtual(main())


async def ask(meter: Meter, **body: Any) -> int:
    request = post("/v1/completions", {"model": "m", "prompt": "x", **body}, Authorization="Bearer secret")
    return (await request.run(meter)).status


def test_it_is_closed_from_the_drain_to_the_end_of_the_wake() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        assert await ask(meter) == 200
        assert await residency.drain(5) == Drained(0.0)
        assert await ask(meter) == 503
        assert await residency.sleep(1) == Slept(level=1, seconds=2.0)
        assert await ask(meter) == 503
        assert await residency.sleep(2) == Slept(level=2, seconds=2.0)
        waking = asyncio.create_task(residency.wake())
        await asyncio.sleep(3.5)
        assert await ask(meter) == 503
        assert await waking == Woken(level=2, seconds=4.0, canary_s=0.0)
        assert await ask(meter) == 200

    tell(story, fake_sleep_ms=2000, fake_wake_ms=1000, fake_reload_ms=3000)


def test_requests_in_flight_end_before_it_sleeps() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        request = asyncio.create_task(ask(meter))
        await asyncio.sleep(1)
        assert await residency.drain(5) == Drained(2.0)
        assert await request == 200
        assert isinstance(await residency.sleep(1), Slept)

    tell(story, fake_delay_ms=3000)


def test_where_they_do_not_end_it_goes_on_and_takes_requests() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        request = asyncio.create_task(ask(meter))
        await asyncio.sleep(0.5)
        assert await residency.drain(1) == SleepRefused("1 requests were in flight after 1 s")
        assert not meter.closed
        assert isinstance(await residency.sleep(1), SleepRefused), "it was not drained"
        assert await request == 200
        assert await ask(meter) == 200

    tell(story, fake_delay_ms=3000)


def test_work_without_a_client_is_waited_for_as_long_as_the_drain_may_take() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        async with engine.slots.taken():
            await residency.drain(7)
            began = asyncio.get_running_loop().time()
            assert await residency.sleep(1) == SleepRefused("1 requests run on")
            assert asyncio.get_running_loop().time() - began == 7
            assert not meter.closed
        await residency.drain(7)
        assert isinstance(await residency.sleep(1), Slept)

    tell(story)


@pytest.mark.parametrize(("levels", "level"), [((), 1), ((1,), 2), ((1, 2), 3), ((1, 2), 0)])
def test_a_level_that_its_engine_does_not_have_is_refused(levels: tuple[int, ...], level: int) -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        engine.levels = levels
        await residency.drain(1)
        assert isinstance(await residency.sleep(level), SleepRefused)
        assert await ask(meter) == 200

    tell(story)


def test_a_lighter_or_the_same_level_is_refused_and_it_sleeps_on() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        await residency.drain(1)
        await residency.sleep(2)
        for level in (1, 2):
            assert isinstance(await residency.sleep(level), SleepRefused)
            assert meter.closed
        assert isinstance(await residency.wake(), Woken)

    tell(story)


def test_a_wrong_canary_never_opens_it() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        await residency.drain(1)
        await residency.sleep(2)
        engine.readings = {"": OTHER}
        answer = await residency.wake()
        assert isinstance(answer, WakeFailed)
        assert answer.reason.startswith("wrong after waking from level 2: the model is not what it was")
        assert await ask(meter) == 503

    tell(story)


def test_adapters_are_measured_before_the_first_sleep_that_they_see_and_forgotten_when_they_go() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        for readings in ({"": SOUND}, {"": SOUND, "ad": OTHER}, {"": SOUND}):
            engine.readings = readings
            await residency.drain(1)
            await residency.sleep(1)
            assert isinstance(await residency.wake(), Woken)
        engine.readings = {"": SOUND, "ad": OTHER}
        await residency.drain(1)
        await residency.sleep(1)
        engine.readings = {"": SOUND, "ad": SOUND}
        answer = await residency.wake()
        assert isinstance(answer, WakeFailed)
        assert "the adapter 'ad'" in answer.reason

    tell(story)


def test_a_model_without_a_canary_stays_awake() -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        engine.readings = {"": Reading()}
        await residency.drain(1)
        answer = await residency.sleep(1)
        assert isinstance(answer, SleepRefused)
        assert answer.reason.startswith("it could not be checked after waking")
        assert await ask(meter) == 200

    tell(story)


@pytest.mark.parametrize("when", ["sleep", "wake"])
def test_an_engine_that_fails_at_it_is_never_opened_again(when: str) -> None:
    async def story(residency: Residency, meter: Meter, engine: AdaptedEngine) -> None:
        await residency.drain(1)
        answer = await residency.sleep(1)
        if when == "wake":
            assert isinstance(answer, Slept)
            assert await residency.wake() == WakeFailed("it could not be woken: broken")
        else:
            assert answer == SleepFailed("it could not be put to sleep: broken")
        assert await ask(meter) == 503

    tell(story, **{f"fake_{when}_error": "broken"})
