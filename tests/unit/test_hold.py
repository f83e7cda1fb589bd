"""The waiting room, in virtual time: who waits, for how long, what is said, and that nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelpool.core.admission import Bounds
from modelpool.errors import (
    CapacityError,
    InvalidRequest,
    ManagerAway,
    ModelNotFound,
    ModelNotReady,
    PoolError,
    TooManyOngoing,
    WaitingRoomFull,
)
from modelpool.gateway.hold import Room, Rules, is_on_its_way
from modelpool.gateway.instances import Instances
from modelpool.gateway.keys import Caller
from modelpool.gateway.observe.journey import Journeys
from modelpool.gateway.request import Request
from modelpool.gateway.routes import match
from modelpool.gateway.stay import Stay
from modelpool.gateway.table import Table
from modelpool.gateway.wishes import Wishes, wishes_of
from modelpool.messages.routing import KeyEntry, ModelEntry, Route, Snapshot, Unavailable
from modelpool.relay import Pools
from modelpool.testing.virtual_time import VirtualTimeLoop, run_virtual

WAIT_S = 60.0
MAX_WAIT, NO_COLD_START = b"x-modelpool-max-wait", b"x-modelpool-no-cold-start"


class Line:
    """A client at the other end, and what it was sent ahead of its answer."""

    def __init__(self, *, closes: bool = False) -> None:
        self.closes = closes
        self.sent: list[tuple[float, bytes]] = []

    @property
    def opened(self) -> bool:
        return bool(self.sent)

    def write_ahead(self, data: bytes) -> None:
        self.sent.append((asyncio.get_running_loop().time(), data))


class World:
    """A table that a test writes, and the room beside it."""

    def __init__(self, *, known: bool = True, max_ongoing: int = 10, bounds: Bounds | None = None) -> None:
        self.table = Table(Instances(Pools(connect_timeout_s=1), "token"))
        self.models: dict[str, ModelEntry] = {}
        if known:
            self.publish()
        rules = Rules(max_ongoing=max_ongoing, max_wait_s=WAIT_S, bounds=bounds or Rules(max_ongoing=1).bounds)
        self.room = Room(self.table, rules)

    def publish(self, *entries: ModelEntry, without: str = "") -> None:
        self.models |= {each.alias: each for each in entries}
        self.models.pop(without, None)
        self.table.apply(Snapshot(epoch="e", sequence=1, models=dict(self.models)))

    async def serve(self, alias: str = "m", **wishes: Any) -> float:
        """As the gateway does. When it was granted."""
        begun = request(alias, **wishes)
        if not self.room.enter(alias, begun):
            await Stay(self.room, alias, begun, Line()).granted()
        with self.room.held:
            return asyncio.get_running_loop().time()

    def asking(self, alias: str = "m", **wishes: Any) -> asyncio.Task[float]:
        return asyncio.get_running_loop().create_task(self.serve(alias, **wishes))


def routed(alias: str = "m", *capacities: int) -> ModelEntry:
    """With an instance for each capacity, or one that takes many requests."""
    routes = (
        Route(instance=f"{alias}-r{number}", worker_id="w", host="127.0.0.1", port=number, capacity=capacity)
        for number, capacity in enumerate(capacities or (100,), 1)
    )
    return ModelEntry(alias=alias, created=1, routes=tuple(routes))


def away(alias: str = "m", *, coming: bool = True, retry_after: float = 7.0) -> ModelEntry:
    why = Unavailable(code="model_not_ready", message=f"`{alias}` is away.", retry_after=retry_after, on_its_way=coming)
    return ModelEntry(alias=alias, created=1, unavailable=why)


def request(
    alias: str = "m",
    *,
    stream: bool = False,
    path: bytes = b"/v1/chat/completions",
    http10: bool = False,
    **wishes: str,
) -> Request:
    named = [(b"x-modelpool-" + name.replace("_", "-").encode(), value.encode()) for name, value in wishes.items()]
    made = Request(b"POST", path, named, http10=http10, keep_alive=not http10)
    made.route = match(b"POST", path)
    made.journey = Journeys().begin(b"", path, 0, "")
    made.body = msgspec.json.encode({"model": alias, "stream": stream})
    return made


def caller(id_: str, *, priority: int = 0) -> Caller:
    return Caller(KeyEntry(id=id_, name=id_, digest="", priority=priority))


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(test())

    run.__name__ = test.__name__
    return run


@in_virtual_time
async def test_a_request_waits_for_a_model_that_is_on_its_way() -> None:
    world = World()
    world.publish(away())
    asking = world.asking()
    await asyncio.sleep(20)
    assert (world.room.waiting, world.room.waiting_for("m")) == (1, 1)
    world.publish(routed())
    assert await asking == 20
    assert (world.room.waiting, world.room.ongoing) == (0, 0)


@in_virtual_time
async def test_one_that_waited_too_long_hears_why_and_when_to_come_back() -> None:
    world = World()
    world.publish(away(retry_after=33.0))
    with pytest.raises(ModelNotReady) as refused:
        await world.serve()
    assert asyncio.get_running_loop().time() == WAIT_S
    assert refused.value.retry_after == 33
    assert refused.value.message == "`m` is away. This request waited for it for 60 s."
    assert world.room.waiting == 0


@pytest.mark.parametrize(("asked", "waited"), [("0", 0.0), ("2.5", 2.5), ("1e9", WAIT_S)])
def test_a_request_says_how_long_it_may_wait_at_most(asked: str, waited: float) -> None:
    async def wait() -> None:
        world = World()
        world.publish(away())
        with pytest.raises(ModelNotReady):
            await world.serve(max_wait=asked)
        assert asyncio.get_running_loop().time() == waited

    run_virtual(wait())


@in_virtual_time
async def test_what_is_not_on_its_way_is_answered_at_once() -> None:
    world = World()
    world.publish(away(coming=False))
    with pytest.raises(ModelNotReady, match=r"`m` is away\.$"):
        await world.serve()
    with pytest.raises(ModelNotFound):
        await world.serve("other")
    assert asyncio.get_running_loop().time() == 0


@in_virtual_time
async def test_those_who_wait_for_a_model_that_fails_or_goes_hear_of_it_at_once() -> None:
    world = World()
    world.publish(away("a"), away("b"), away("c"))
    asking = [world.asking(alias) for alias in "abc"]
    await asyncio.sleep(1)
    world.publish(away("a", coming=False), without="b")
    errors = await asyncio.gather(*asking[:2], return_exceptions=True)
    assert [type(each) for each in errors] == [ModelNotReady, ModelNotFound]
    assert asyncio.get_running_loop().time() == 1
    assert world.room.waiting == 1
    world.publish(routed("c"))
    assert await asking[2] == 1


@in_virtual_time
async def test_no_cold_start_waits_for_no_model_but_for_its_turn() -> None:
    world = World(max_ongoing=1)
    world.publish(away())
    with pytest.raises(ModelNotReady):
        await world.serve(no_cold_start="true")
    world.publish(routed())
    assert world.room.enter("m", request())
    waiting = world.asking(no_cold_start="TRUE")
    patient = world.asking()
    await asyncio.sleep(1)
    world.publish(away())
    with pytest.raises(ModelNotReady):
        await waiting
    assert world.room.waiting == 1
    world.publish(routed())
    world.room.held.__exit__(None, None, None)
    assert await patient == 1


@in_virtual_time
async def test_when_too_many_are_ongoing_a_request_waits_for_its_turn() -> None:
    world = World(max_ongoing=1)
    world.publish(routed())
    assert world.room.enter("m", request())
    first, second = world.asking(), world.asking()
    await asyncio.sleep(5)
    assert (world.room.ongoing, world.room.waiting) == (1, 2)
    world.room.held.__exit__(None, None, None)
    assert (await first, await second) == (5, 5)
    assert world.room.ongoing == 0


@in_virtual_time
async def test_keys_of_a_higher_priority_go_first_and_others_take_turns() -> None:
    world = World(max_ongoing=1)
    world.publish(away())
    order: list[str] = []

    async def ask(who: Caller) -> None:
        asked = request()
        asked.caller = who
        await Stay(world.room, "m", asked, Line()).granted()
        with world.room.held:
            order.append(who.id)
            assert asked.journey.record.waited == 3

    async with asyncio.TaskGroup() as clients:
        for who in [caller("x"), caller("x"), caller("y"), caller("first", priority=1)]:
            clients.create_task(ask(who))
        await asyncio.sleep(3)
        world.publish(routed())
    assert order == ["first", "x", "y", "x"]


@in_virtual_time
async def test_one_whose_turn_does_not_come_hears_that_and_at_what_pace_it_goes() -> None:
    world = World(max_ongoing=1)
    world.publish(routed())
    assert world.room.enter("m", request())
    with pytest.raises(TooManyOngoing) as refused:
        await world.serve(max_wait="0")
    assert refused.value.retry_after == 1
    asking = [world.asking() for _ in range(4)]
    await asyncio.sleep(10)
    world.room.held.__exit__(None, None, None)  # the first is granted, and is done at once; so are the others
    assert [await each for each in asking] == [10.0] * 4


@in_virtual_time
async def test_the_pace_is_that_of_those_before() -> None:
    world = World(max_ongoing=1)
    world.publish(routed())
    assert world.room.enter("m", request())
    stays = [Stay(world.room, "m", request(), Line()) for _ in range(5)]
    granted = [asyncio.get_running_loop().create_task(each.granted()) for each in stays]
    for _ in range(2):
        await asyncio.sleep(4)
        world.room.held.__exit__(None, None, None)
    with pytest.raises(TooManyOngoing) as refused:
        await world.serve(max_wait="0")
    assert refused.value.retry_after == pytest.approx(4 * 3)
    for _ in range(4):
        world.room.held.__exit__(None, None, None)
    await asyncio.gather(*granted)


@pytest.mark.parametrize("bounds", [Bounds(tickets=2, bytes=1000), Bounds(tickets=9, bytes=60)])
def test_a_full_room_says_so_and_when_the_model_is_due(bounds: Bounds) -> None:
    async def fill() -> None:
        world = World(bounds=bounds)
        world.publish(away(retry_after=9.0), away("other"))
        asking = [world.asking() for _ in range(2)] + [world.asking("other")]
        await asyncio.sleep(0)
        with pytest.raises(WaitingRoomFull) as refused:
            await world.serve()
        assert (refused.value.status, refused.value.retry_after) == (429, 9.0)
        assert "no place to wait for `m`" in refused.value.message
        world.publish(routed(), routed("other"))
        assert await asyncio.gather(*asking) == [0.0] * 3

    run_virtual(fill())


@in_virtual_time
async def test_one_that_leaves_waits_no_more_and_one_that_leaves_as_it_is_granted_passes_it_on() -> None:
    world = World(max_ongoing=1)
    world.publish(routed())
    assert world.room.enter("m", request())
    gone, missing, following = world.asking(), world.asking(), world.asking()
    await asyncio.sleep(1)
    gone.cancel()
    await asyncio.sleep(0)
    assert world.room.waiting == 2
    world.room.held.__exit__(None, None, None)
    missing.cancel()  # granted already, and it has not run yet
    assert await following == 1
    assert missing.cancelled()
    assert (world.room.ongoing, world.room.waiting) == (0, 0)


@in_virtual_time
async def test_before_the_manager_was_heard_requests_wait_for_the_list_of_models() -> None:
    world = World(known=False)
    asking = [world.asking("m"), world.asking("other"), world.asking("m", max_wait="1")]
    with pytest.raises(ManagerAway):
        await world.serve(no_cold_start="true")
    with pytest.raises(ManagerAway):
        await asking[2]
    await asyncio.sleep(1)
    world.publish(routed())
    assert await asking[0] == 2
    with pytest.raises(ModelNotFound):
        await asking[1]


@in_virtual_time
async def test_a_stream_that_waits_hears_comments_and_a_plain_request_nothing() -> None:
    world = World()
    world.publish(away())
    line, silent = Line(), Line()
    loop = asyncio.get_running_loop()
    stay = loop.create_task(Stay(world.room, "m", request(stream=True), line).granted())
    plain = loop.create_task(Stay(world.room, "m", request(), silent).granted())
    embedding = Stay(world.room, "m", request(stream=True, path=b"/v1/embeddings"), silent)
    other = loop.create_task(embedding.granted())
    await asyncio.sleep(12)
    world.publish(routed())
    await asyncio.gather(stay, plain, other)
    await asyncio.sleep(20)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    assert line.sent == [
        (5, head + b"Transfer-Encoding: chunked\r\n\r\nb\r\n: waiting\n\n\r\n"),
        (10, b"b\r\n: waiting\n\n\r\n"),
    ]
    assert silent.sent == []


@in_virtual_time
async def test_a_stream_without_chunks_hears_bare_comments() -> None:
    world = World()
    world.publish(away())
    line = Line(closes=True)
    stay = Stay(world.room, "m", request(stream=True, http10=True, max_wait="6"), line)
    with pytest.raises(ModelNotReady):
        await stay.granted()
    ((_, sent),) = line.sent
    assert sent.endswith(b"\r\nConnection: close\r\n\r\n: waiting\n\n")


@in_virtual_time
async def test_when_no_instance_takes_it_a_request_waits_for_news_but_not_long() -> None:
    world = World()
    world.publish(routed())
    stay = Stay(world.room, "m", request(max_wait="2.5"), Line())
    loop, error = asyncio.get_running_loop(), ModelNotReady("nobody")
    await stay.nobody_took_it(error)
    assert loop.time() == 1
    loop.call_later(0.25, world.publish, away())
    await stay.nobody_took_it(error)
    await stay.nobody_took_it(error)
    assert loop.time() == 1.25
    world.publish(routed())
    await stay.nobody_took_it(error)
    await stay.nobody_took_it(error)
    assert loop.time() == 2.5
    with pytest.raises(ModelNotReady, match="nobody"):
        await stay.nobody_took_it(error)
    assert not world.room._news


@pytest.mark.parametrize(
    ("headers", "wishes"),
    [
        ({}, Wishes()),
        ({"max-wait": "0", "no-cold-start": "false"}, Wishes(max_wait_s=0)),
        ({"max-wait": "1.5", "no-cold-start": "1"}, Wishes(max_wait_s=1.5, cold_start=False)),
    ],
)
def test_wishes_are_read_from_headers(headers: dict[str, str], wishes: Wishes) -> None:
    assert wishes_of({f"x-modelpool-{name}".encode(): value.encode() for name, value in headers.items()}) == wishes


@pytest.mark.parametrize(
    ("name", "value"),
    [("Max-Wait", value) for value in ("", "soon", "-1", "nan", "inf", "1s")]
    + [("No-Cold-Start", value) for value in ("", "yes", "2")],
)
def test_wishes_that_make_no_sense_are_refused_by_name(name: str, value: str) -> None:
    world = World()
    world.publish(routed())
    bad = request()
    bad.by_name = {f"x-modelpool-{name.lower()}".encode(): value.encode()}
    with pytest.raises(InvalidRequest, match=f"X-ModelPool-{name} must be") as refused:
        world.room.enter("m", bad)
    assert refused.value.param == f"X-ModelPool-{name}"


class One:
    """A request on its way through the gateway, and how far it is."""

    def __init__(self, alias: str, wishes: dict[bytes, str]) -> None:
        self.alias = alias
        self.request = request(alias, stream=True)
        self.request.by_name = {name: value.encode() for name, value in wishes.items()}
        self.begun = asyncio.get_running_loop().time()
        self.finish = asyncio.Event()
        self.held = False
        self.leased = False
        self.task: asyncio.Task[None]


class NothingIsLost(RuleBasedStateMachine):
    """Requests, clients that leave, models that come and go, time: several of them at one moment, in any order."""

    ALIASES = ("a", "b")
    MAX_ONGOING = 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.moment: list[Callable[[], object]] = []
        self.all: list[One] = []
        self.served = 0
        self.beyond = False
        """Whether an instance was ever sent more than it takes, which may be less later."""
        self.loop.run_until_complete(self.begin())

    async def begin(self) -> None:
        self.world = World(max_ongoing=self.MAX_ONGOING, bounds=Bounds(tickets=3, bytes=200))
        self.world.publish(*map(away, self.ALIASES))

    async def serve(self, one: One) -> None:
        """As gateway/inference.py does."""
        room, table, stay = self.world.room, self.world.table, None
        try:
            while True:
                if not room.enter(one.alias, one.request):
                    stay = stay or Stay(room, one.alias, one.request, Line())
                    await stay.granted()
                with room.held:
                    one.held = True
                    try:
                        instance, _ = table.model(one.alias).choose()
                        with instance.lease():
                            one.leased = True
                            self.beyond = self.beyond or instance.own > instance.capacity
                            await one.finish.wait()
                            self.served += 1
                            return
                    except CapacityError as error:
                        stay = stay or Stay(room, one.alias, one.request, Line())
                        await stay.nobody_took_it(error)
                    finally:
                        one.held = one.leased = False
        except PoolError:
            pass

    # What may happen

    def at(self, alone: bool, act: Callable[[], object]) -> None:
        """Do it; or, unless `alone`, in the same moment as what happens next."""
        self.moment.append(act)
        if alone:
            self.loop.run_until_complete(self.happen())

    async def happen(self) -> None:
        moment, self.moment = self.moment, []
        for act in moment:
            act()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)
        self.all = [each for each in self.all if not each.task.done()]

    @rule(
        alone=st.booleans(),
        alias=st.sampled_from(ALIASES),
        caller=st.sampled_from([None, caller("x"), caller("y"), caller("first", priority=1)]),
        wishes=st.sampled_from([{}, {}, {MAX_WAIT: "3"}, {MAX_WAIT: "0"}, {NO_COLD_START: "true"}]),
    )
    def ask(self, alone: bool, alias: str, caller: Caller | None, wishes: dict[bytes, str]) -> None:
        def act() -> None:
            one = One(alias, wishes)
            one.request.caller = caller
            one.task = asyncio.get_running_loop().create_task(self.serve(one))
            self.all.append(one)

        self.at(alone, act)

    @precondition(lambda self: self.all)
    @rule(alone=st.booleans(), which=st.integers(0, 99))
    def leave(self, alone: bool, which: int) -> None:
        self.at(alone, self.all[which % len(self.all)].task.cancel)

    @precondition(lambda self: self.all)
    @rule(alone=st.booleans(), which=st.integers(0, 99))
    def finish(self, alone: bool, which: int) -> None:
        leased = [each for each in self.all if each.leased]
        if leased:
            self.at(alone, leased[which % len(leased)].finish.set)

    @rule(
        alone=st.booleans(),
        alias=st.sampled_from(ALIASES),
        how=st.sampled_from([(1,), (2,), (1, 1), (5,), "coming", "failed", "removed"]),
    )
    def publish(self, alone: bool, alias: str, how: str | tuple[int, ...]) -> None:
        def act() -> None:
            if how == "removed":
                self.world.publish(without=alias)
            elif isinstance(how, tuple):
                self.world.publish(routed(alias, *how))
            else:
                self.world.publish(away(alias, coming=how == "coming"))

        self.at(alone, act)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        async def wait() -> None:
            await self.happen()
            await asyncio.sleep(seconds)
            await self.settle()

        self.loop.run_until_complete(wait())

    # What holds whenever nothing is under way

    @invariant()
    def counts_are_what_is_there(self) -> None:
        if self.moment:
            return
        room = self.world.room
        held = [each for each in self.all if each.held]
        leases = sum(each.leased for each in self.all)
        assert room.ongoing == len(held) <= self.MAX_ONGOING
        assert all(each.leased for each in held)
        assert self.inflight() <= leases  # those of a route that is gone are not counted any more
        assert room.waiting == len(self.all) - len(held)
        assert len(room._futures) == room.waiting
        assert (room._timer is not None) == bool(room.waiting)

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if self.moment:
            return
        now = self.loop.time()
        for each in self.all:
            if not each.held:
                assert now - each.begun < WAIT_S
                model = self.world.table.find(each.alias)
                assert self.world.room.ongoing == self.MAX_ONGOING or not model or not model.places
                assert is_on_its_way(model)

    @invariant()
    def no_instance_is_sent_more_than_it_takes(self) -> None:
        assert not self.beyond

    def inflight(self) -> int:
        return sum(
            instance.inflight for alias in self.world.models for instance in self.world.table.model(alias).instances
        )

    def teardown(self) -> None:
        self.loop.run_until_complete(self.end())
        self.loop.close()

    async def end(self) -> None:
        """Everybody who waits is served once there is everything, and nothing is left."""
        await self.happen()
        self.world.publish(*map(routed, self.ALIASES))
        await asyncio.sleep(2)
        await self.settle()
        left, before = len(self.all), self.served
        while self.all:
            for each in self.all:
                each.finish.set()
            await self.settle()
        assert self.served - before == left
        room = self.world.room
        assert (room.ongoing, room.waiting, self.inflight(), room._timer) == (0, 0, 0, None)
        assert (room._futures, room._awake_only, room._news) == ({}, set(), set())
        await asyncio.sleep(1)
        assert (room._full._watched, room._full._looking) == ({}, None)


TestNothingIsLost = NothingIsLost.TestCase
TestNothingIsLost.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
