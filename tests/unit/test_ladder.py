"""The whole controller: models that share less memory than they need, told as stories, then in any order."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.core.demand import Seen
from modelpool.core.events import (
    DemandHeard,
    Event,
    ModelRegistered,
    OrderAnswered,
    OrderRefused,
    Report,
    Tick,
    WorkerReported,
)
from modelpool.core.learned import What
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import ORDER_RETRY_S, Effect, Sleep, Start, Stop
from modelpool.core.placement import GB
from modelpool.core.pool import Device, Pool
from modelpool.core.reconcile import next_deadline
from tests.unit.controller import (
    POLICY,
    TOTAL,
    asked,
    changed,
    checked_step,
    heard,
    model,
    play,
    report,
    serving,
    told,
    up,
)

S = InstanceState


def test_who_is_idle_goes_down_the_ladder_and_stays_registered() -> None:
    pool, effects = play((99, Tick()), pool=up("a"))
    assert effects == ()
    assert next_deadline(pool) == 100
    pool, effects = play((100, Tick()), pool=pool)
    assert told(effects) == [("sleep 1", "a")]
    assert pool.instances["w", "a"].state is S.DRAINING
    pool, effects = play((101, heard(report("a", S.SLEEP_1, held=1))), (199, Tick()), pool=pool)
    assert effects == ()
    pool, effects = play((200, heard(report("a", S.SLEEP_1, held=1))), pool=pool)
    assert told(effects) == [("sleep 2", "a")]
    pool, effects = play(
        (201, heard(report("a", S.SLEEP_2, held=0.5))), (300, heard(report("a", S.SLEEP_2))), pool=pool
    )
    assert told(effects) == [("stop", "a")]
    pool, effects = play((301, heard()), pool=pool)
    assert (effects, list(pool.models), dict(pool.instances)) == ((), ["a"], {})


def test_a_request_wakes_it_and_another_starts_it() -> None:
    pool, _ = play((100, heard(report("a"))), (101, heard(report("a", S.SLEEP_1, held=1))), pool=up("a"))
    pool, effects = play((110, asked(a=1)), pool=pool)
    assert told(effects) == [("wake", "a")]
    pool, effects = play((111, heard(report("a", S.SLEEP_1, held=1))), (112, asked(a=2)), pool=pool)
    assert effects == ()  # a report from before the order
    pool, _ = play((113, heard(report("a", S.WAKING, held=1))), (115, heard(report("a"))), pool=pool)
    assert pool.learned["a"]["w", What.WAKE_1].recent == (5,)
    gone, _ = play((300, heard()), (301, heard()), pool=pool)
    _, effects = play((310, asked(a=1)), pool=gone)
    assert told(effects) == [("start", "a")]


def test_an_order_without_an_effect_is_given_again() -> None:
    pool, _ = play((100, heard(report("a"))), pool=up("a"))
    pool, effects = play((101, heard(report("a"))), (102, Tick()), pool=pool)
    assert effects == ()
    pool, effects = play((100 + ORDER_RETRY_S, Tick()), pool=pool)
    assert told(effects) == [("sleep 1", "a")]
    _, effects = play((106, OrderAnswered(("w", "a"))), (107, heard(report("a", S.DRAINING))), (120, Tick()), pool=pool)
    assert effects == ()


def test_a_refused_sleep_leaves_it_as_it_was_and_is_tried_later() -> None:
    pool, _ = play((100, heard(report("a"))), (100, OrderRefused(("w", "a"), "requests did not end")), pool=up("a"))
    assert pool.instances["w", "a"].state is S.ACTIVE
    pool, effects = play((101, Tick()), pool=pool)
    assert effects == ()
    _, effects = play((100 + ORDER_RETRY_S, heard(report("a"))), pool=pool)
    assert told(effects) == [("sleep 1", "a")]


def test_a_level_that_is_refused_for_good_is_left_out_until_the_next_start() -> None:
    refusal = OrderRefused(("w", "a"), "it has no level 1", permanent=True)
    pool, effects = play((100, heard(report("a"))), (100, refusal), (105, Tick()), pool=up("a"))
    assert told(effects) == [("sleep 2", "a")]
    assert pool.instances["w", "a"].refuses == {1: "it has no level 1"}
    refusal = OrderRefused(("w", "a"), "nor 2", permanent=True)
    pool, effects = play((105, refusal), (110, heard(report("a"))), pool=pool)
    assert told(effects) == [("stop", "a")]  # as an engine that cannot sleep
    pool, _ = play((111, heard()), (300, asked(a=1)), (301, heard(report("a"))), pool=pool)
    assert pool.instances["w", "a"].levels == (1, 2)


def test_who_waits_takes_the_place_of_who_is_idle_once_that_has_given_its_memory_back() -> None:
    pool, effects = play((1, ModelRegistered(model("b"))), pool=up("a"))
    assert effects == ()  # nobody asks for it: nobody gives way
    pool, effects = play((20, heard(report("a"))), (20, asked(b=1)), pool=pool)
    assert told(effects) == [("stop", "a")]
    assert "waits for a to give way" in pool.shortages["b"]
    pool, effects = play((21, heard(report("a", S.DRAINING))), (22, asked(b=2)), pool=pool)
    assert effects == ()
    pool, effects = play((23, heard()), pool=pool)
    assert told(effects) == [("start", "b")]


def test_sleep_is_enough_once_it_is_known_what_it_leaves() -> None:
    pool, _ = play((100, heard(report("a"))), (101, heard(report("a", S.SLEEP_1, held=1))), pool=up("a"))
    pool, _ = play((102, asked(a=1)), (103, heard(report("a"))), (104, serving()), pool=pool)
    pool, effects = play((105, ModelRegistered(model("b"))), (120, asked(b=1)), pool=pool)
    assert told(effects) == [("sleep 1", "a")]
    _, effects = play((121, heard(report("a", S.SLEEP_1, held=1))), pool=pool)
    assert told(effects) == [("start", "b")]


def test_who_is_busy_is_left_alone_for_a_turn_and_drained_then() -> None:
    pool, _ = play((1, ModelRegistered(model("b"))), (10, serving(a=3)), pool=up("a"))
    both = DemandHeard("g", {"a": Seen(inflight={"a": 3}), "b": Seen(waiting=1)})
    pool, effects = play((20, both), (49, heard(report("a"))), (49, both), pool=pool)
    assert effects == ()
    assert "a (ACTIVE) holds 6.0 GB, has 3 in flight" in pool.shortages["b"]
    pool, effects = play((20 + POLICY.turn_max_s, both), pool=pool)
    assert told(effects) == [("stop", "a")]


def test_who_came_up_a_moment_ago_stays_for_a_while() -> None:
    pool, effects = play((1, ModelRegistered(model("b"))), (3, asked(b=1)), pool=up("a"))
    assert effects == ()
    assert "is up for only 3 of 5 s" in pool.shortages["b"]
    assert next_deadline(pool) == 4
    _, effects = play((5, Tick()), pool=pool)
    assert told(effects) == [("stop", "a")]


def test_what_is_pinned_or_kept_never_gives_way() -> None:
    pinned, _ = play((0, ModelRegistered(model("a", pinned=True))), (0, heard(report("a"))))
    pool, effects = play(
        (1000, heard(report("a"))), (1000, ModelRegistered(model("b"))), (1001, asked(b=1)), pool=pinned
    )
    assert effects == ()
    assert "is pinned" in pool.shortages["b"]
    kept, _ = play((0, ModelRegistered(model("a", least=1))), (0, heard(report("a"))))
    pool, effects = play((1000, heard(report("a"))), (1000, ModelRegistered(model("b"))), (1001, asked(b=1)), pool=kept)
    assert effects == ()
    assert "to be kept" in pool.shortages["b"]


def test_one_put_to_sleep_by_hand_is_not_woken_for_requests_that_were_served() -> None:
    """The gateway's last report is from when they waited; the next one comes within a second."""
    pool, _ = play((0, heard()), (0, ModelRegistered(model("a"))), (1, asked(a=1)), (2, heard(report("a"))))
    pool, effects = play((2.5, heard(report("a", S.DRAINING))), (2.6, heard(report("a", S.SLEEP_1))), pool=pool)
    assert effects == ()
    pool, effects = play((3, serving()), (4, heard(report("a", S.SLEEP_1))), pool=pool)
    assert effects == ()
    _, effects = play((5, asked(a=1)), pool=pool)
    assert told(effects) == [("wake", "a")]


def test_what_is_to_be_preloaded_is_brought_up_whenever_there_is_room_and_gives_way_to_whoever_is_asked_for() -> None:
    at_rest = ModelRegistered(replace(model("a"), preload=True), {}, True)
    pool, effects = play((0, heard()), (0, at_rest))
    assert told(effects) == [("start", "a")]
    pool, effects = play((1, heard(report("a"))), (1000, heard(report("a"))), pool=pool)
    assert effects == ()  # nobody asked for it, and it stays
    pool, effects = play((1001, ModelRegistered(model("b"))), (1001, asked(b=1)), pool=pool)
    assert told(effects) == [("stop", "a")]
    pool, effects = play((1002, heard()), pool=pool)
    assert told(effects) == [("start", "b")]
    pool, effects = play((1003, heard(report("b"))), (1010, heard(report("b"))), (1010, asked()), pool=pool)
    assert effects == ()  # nobody gives way for it
    pool, effects = play((1150, heard(report("b"))), (1151, heard(report("b", S.SLEEP_1, held=1))), pool=pool)
    assert told(effects) == [("start", "a")]


def test_who_is_to_be_preloaded_leaves_the_room_that_is_made_for_others() -> None:
    pool = up("a", "c", gb=4)
    preload = ModelRegistered(replace(model("b", 3), preload=True))
    pool, effects = play((1, preload), (20, heard(report("a", gb=4), report("c", gb=4))), pool=pool)
    assert effects == ()
    pool, effects = play((20, ModelRegistered(model("large", 10))), (21, asked(large=1)), pool=pool)
    assert sorted(told(effects)) == [("stop", "a"), ("stop", "c")]
    pool, effects = play((22, heard(report("a", S.DRAINING, gb=4))), pool=pool)
    assert effects == ()
    assert "leaves the room to large, which is asked for" in pool.shortages["b"]
    pool, effects = play((23, heard()), pool=pool)
    assert told(effects) == [("start", "large")]


def test_settings_change_while_it_runs() -> None:
    pool, effects = play((50, changed("a", idle_sleep_1_s=50)), pool=up("a"))
    assert told(effects) == [("sleep 1", "a")]
    pool, effects = play((99, changed("a", pinned=True)), (1000, heard(report("a"))), pool=up("a"))
    assert effects == ()
    pool, effects = play((1001, changed("a")), pool=pool)
    assert told(effects) == [("sleep 1", "a")]
    pool, effects = play((1, changed("a", min_replicas=2, memory_bytes=GB)), pool=up("a"))
    assert told(effects) == [("start", "a-r2")]


def test_a_model_has_thresholds_and_a_capacity_of_its_own() -> None:
    pool, _ = play((20, serving(a=6)), (25, serving(a=6)), (30, serving(a=6)), pool=up("a", gb=3))
    small = {"memory_bytes": 3 * GB}
    assert told(play((31, changed("a", **small)), pool=pool)[1]) == []
    assert told(play((31, changed("a", load_high=0.5, **small)), pool=pool)[1]) == [("start", "a-r2")]
    assert told(play((31, changed("a", capacity=7, **small)), pool=pool)[1]) == [("start", "a-r2")]
    assert told(play((31, changed("a", capacity=7, load_high=0.9, **small)), pool=pool)[1]) == []


# ---------------------------------------------------------------- any order of events


class Machine:
    """One worker with a device that really runs out of memory, in the hands of hypothesis."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.now = 0.0
        self.sizes = sizes
        self.states: dict[str, S] = {}
        self.orders: list[Effect] = []
        self.waiting = dict.fromkeys(sizes, 0)
        self.pool = Pool(policy=POLICY)
        for alias, gb in sizes.items():
            self.happens(ModelRegistered(model(alias, gb)))
        self.report()

    def held(self, instance: str) -> int:
        full = self.sizes[instance.partition("-r")[0]] * GB
        return {S.SLEEP_1: full // 4, S.SLEEP_2: full // 10}.get(self.states[instance], full)

    @property
    def used(self) -> int:
        return sum(map(self.held, self.states))

    def happens(self, event: Event) -> None:
        self.pool, effects = checked_step(self.pool, event, self.now)
        self.orders += effects

    def report(self) -> None:
        device = Device(index=0, kind="cuda", total_bytes=TOTAL, free_bytes=TOTAL - self.used)
        reports = tuple(
            Report(
                instance=name,
                alias=name.partition("-r")[0],
                key=name.partition("-r")[0],
                state=state,
                devices=(0,),
                memory_bytes=self.sizes[name.partition("-r")[0]] * GB,
                held_bytes=self.held(name) if state in (S.SLEEP_1, S.SLEEP_2) else 0,
                capacity=4,
                levels=(1, 2),
            )
            for name, state in self.states.items()
        )
        self.happens(
            WorkerReported(worker_id="w", incarnation="1", devices=(device,), engines={"fake": ""}, reports=reports)
        )

    def obey(self, count: int) -> None:
        """Carry out the oldest orders. Memory is taken at once, and must be there."""
        todo, self.orders = self.orders[:count], self.orders[count:]
        for order in todo:
            name = order.instance
            if isinstance(order, Start):
                self.states.setdefault(name, S.STARTING)
            elif name not in self.states:
                continue
            elif isinstance(order, Stop):
                del self.states[name]
            elif isinstance(order, Sleep):
                if self.states[name] is not S.SLEEP_2:
                    self.states[name] = S.SLEEP_1 if order.level == 1 else S.SLEEP_2
            elif self.states[name] in (S.SLEEP_1, S.SLEEP_2):
                self.states[name] = S.WAKING
            assert self.used <= TOTAL, f"{order} takes more memory than there is: {self.states}"

    def finish(self) -> None:
        for name, state in self.states.items():
            if state in (S.STARTING, S.WAKING):
                self.states[name] = S.ACTIVE

    def ask(self) -> None:
        for alias in self.sizes:
            if any(name.partition("-r")[0] == alias and state is S.ACTIVE for name, state in self.states.items()):
                self.waiting[alias] = 0  # served
        self.happens(DemandHeard("g", {alias: Seen(waiting=count) for alias, count in self.waiting.items() if count}))


actions = st.lists(
    st.tuples(st.sampled_from(["ask", "obey", "finish", "report", "wait"]), st.sampled_from("abc"), st.integers(1, 4)),
    max_size=60,
)


@settings(max_examples=40, deadline=None)
@example(
    script=[("ask", "c", 1), ("ask", "a", 1), ("obey", "a", 2), ("finish", "a", 1), ("wait", "a", 1), ("wait", "a", 1)],
    sizes=(1, 2, 10),
)
@given(actions, st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10)))
def test_memory_is_never_promised_twice_and_whoever_waits_is_served_in_the_end(
    script: list[tuple[str, str, int]], sizes: tuple[int, int, int]
) -> None:
    machine = Machine(dict(zip("abc", sizes, strict=True)))
    for action, alias, number in script:
        machine.now += 0.9
        if action == "ask":
            machine.waiting[alias] += number
            machine.ask()
        elif action == "obey":
            machine.obey(number)
        elif action == "finish":
            machine.finish()
        elif action == "report":
            machine.report()
        else:
            machine.now += 25 * number
            machine.report()
            machine.happens(Tick())
    for _ in range(60):
        machine.now += 6
        machine.obey(100)
        machine.finish()
        machine.report()
        machine.ask()
        machine.report()
    assert machine.waiting == {"a": 0, "b": 0, "c": 0}
