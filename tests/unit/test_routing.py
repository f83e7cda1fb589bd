"""The choice of an instance, the routing table, leases."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelpool.core.routing.choice import Reason, least_loaded
from modelpool.core.routing.nearest import LOOKED_AT_MAX, nearest
from modelpool.errors import ManagerAway, ModelBusy, ModelNotFound, ModelNotReady, NoAvailableWorker
from modelpool.gateway.inflight import SharedInflight
from modelpool.gateway.instances import Instance, Instances, Lease
from modelpool.gateway.shared import joined
from modelpool.gateway.table import Gap, Table
from modelpool.messages.routing import Delta, ModelEntry, Route, Snapshot, Unavailable
from modelpool.relay import Pools


@dataclass(frozen=True)
class Load:
    inflight: int
    capacity: int


LOADS = st.builds(Load, st.integers(0, 50), st.integers(1, 50))


@given(st.lists(LOADS, min_size=1, max_size=8), st.integers(0, 1000))
def test_the_choice_is_never_more_loaded_than_another(candidates: list[Load], turn: int) -> None:
    chosen, reason = least_loaded(candidates, turn)
    equal = [
        each
        for each in candidates
        if (Fraction(each.inflight, each.capacity), each.inflight)
        == min((Fraction(other.inflight, other.capacity), other.inflight) for other in candidates)
    ]
    assert chosen in equal
    if len(candidates) == 1:
        assert reason is Reason.ONLY
    else:
        assert reason is (Reason.TURN if len(equal) > 1 else Reason.LEAST_LOADED)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_equals_take_turns(count: int, start: int) -> None:
    candidates = [Load(0, number + 1) for number in range(count)]
    assert {least_loaded(candidates, start + turn)[0] for turn in range(count)} == set(candidates)


def test_the_nearest_names_come_first_and_strangers_not_at_all() -> None:
    names = ["llama-3-8b", "llama-3-70b", "qwen2.5", "llama-2-7b", "bert"]
    assert nearest("llama-3-8", names) == ["llama-3-8b", "llama-3-70b", "llama-2-7b"]
    assert nearest("Qwen2.5", names) == ["qwen2.5"]
    assert nearest("zzz", names) == []
    assert nearest("l" * 1000, names) == []
    assert nearest("x", []) == []


def test_how_many_names_are_looked_at_is_limited() -> None:
    looked_at = 0

    def names() -> object:
        nonlocal looked_at
        for number in range(1_000_000):
            looked_at += 1
            yield f"model-{number}"

    assert nearest("model-77", names()) != []  # type: ignore[arg-type]
    assert looked_at <= LOOKED_AT_MAX


def route(instance: str, port: int = 1, capacity: int = 2) -> Route:
    return Route(instance=instance, worker_id="w", host="127.0.0.1", port=port, capacity=capacity)


def entry(alias: str, *routes: Route, unavailable: Unavailable | None = None) -> ModelEntry:
    return ModelEntry(alias=alias, created=1, routes=routes, unavailable=unavailable)


def snapshot(*entries: ModelEntry, epoch: str = "e", sequence: int = 1) -> Snapshot:
    return Snapshot(epoch=epoch, sequence=sequence, models={each.alias: each for each in entries})


def table() -> Table:
    return Table(Instances(Pools(connect_timeout_s=1), "token"))


def test_an_empty_table_knows_that_it_knows_nothing() -> None:
    for ask in (lambda: table().model("m"), lambda: table().entries()):
        with pytest.raises(ManagerAway):
            ask()


def test_the_table_follows_a_snapshot_and_its_deltas() -> None:
    followed = table()
    followed.apply(snapshot(entry("a"), entry("b")))
    followed.apply(Delta(epoch="e", sequence=2, changed={"c": entry("c")}, removed=("a",)))
    assert [each.alias for each in followed.entries()] == ["b", "c"]
    followed.apply(snapshot(entry("d"), epoch="f", sequence=9))
    assert [each.alias for each in followed.entries()] == ["d"]
    with pytest.raises(ModelNotFound):
        followed.model("a")


@pytest.mark.parametrize(("epoch", "sequence"), [("e", 1), ("e", 3), ("f", 2)])
def test_a_gap_changes_nothing(epoch: str, sequence: int) -> None:
    followed = table()
    followed.apply(snapshot(entry("a")))
    with pytest.raises(Gap):
        followed.apply(Delta(epoch=epoch, sequence=sequence, removed=("a",)))
    assert [each.alias for each in followed.entries()] == ["a"]
    assert (followed.epoch, followed.sequence) == ("e", 1)


def test_what_an_instance_has_in_flight_outlives_updates_that_leave_it_alone() -> None:
    followed = table()
    followed.apply(snapshot(entry("m", route("m"))))
    (before,) = followed.model("m").instances
    with before.lease():
        followed.apply(Delta(epoch="e", sequence=2, changed={"m": entry("m", route("m"), route("m-r2"))}))
        followed.apply(snapshot(entry("m", route("m"), route("m-r2")), epoch="f"))
        assert [each.inflight for each in followed.model("m").instances] == [1, 0]
        moved = entry("m", route("m", port=2))
        followed.apply(Delta(epoch="f", sequence=2, changed={"m": moved}))
        assert [each.inflight for each in followed.model("m").instances] == [0]
    assert before.inflight == 0


def test_what_is_in_flight_counts_where_the_capacity_changes() -> None:
    followed = table()
    followed.apply(snapshot(entry("m", route("m", capacity=2))))
    (before,) = followed.model("m").instances
    with before.lease(), before.lease():
        followed.apply(snapshot(entry("m", route("m", capacity=3))))
        (instance,) = followed.model("m").instances
        assert (instance, instance.inflight, instance.places, instance.capacity) == (before, 2, 1, 3)
        followed.apply(snapshot(entry("m", route("m", capacity=1))))
        assert (instance.places, instance.full_at, instance.route.capacity) == (0, 1, 1)
        with pytest.raises(ModelBusy):
            followed.model("m").choose()
    assert (instance.inflight, instance.places) == (0, 1)


def test_what_is_in_flight_counts_where_an_instance_is_routed_again(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        shared = SharedInflight(node)
        followed = Table(Instances(Pools(connect_timeout_s=1), "token", shared))
        followed.apply(snapshot(entry("m", route("m"))))
        (before,) = followed.model("m").instances
        with before.lease():
            followed.apply(snapshot(entry("m")))
            followed.apply(snapshot(entry("m", route("m"))))
            (again,) = followed.model("m").instances
            assert (again, again.own, again.places) == (before, 1, 1)
            followed.apply(snapshot(entry("m")))
        followed.apply(snapshot(entry("m", route("m")), entry("n", route("n"))))
        (new,) = followed.model("m").instances
        (other,) = followed.model("n").instances
        with new.lease():
            other.count_all()
            assert (new is before, new.own, new.places, other.inflight) == (False, 1, 1, 0)


def test_an_instance_that_has_left_is_suspected_no_more() -> None:
    instances = Instances(Pools(connect_timeout_s=1), "token")
    followed = Table(instances)
    followed.apply(snapshot(entry("m", route("m"))))
    (instance,) = followed.model("m").instances
    leases = [instance.lease().__enter__() for _ in range(10)]
    followed.apply(snapshot(entry("m")))
    for lease in leases:
        lease.worked = False
        lease.__exit__(None, None, None)
    assert not instance.breaker.closed
    assert instances.suspects == set()


@pytest.mark.parametrize(
    ("code", "error"), [("model_not_ready", ModelNotReady), ("no_available_worker", NoAvailableWorker)]
)
def test_a_model_without_instances_says_why(code: str, error: type[Exception]) -> None:
    followed = table()
    why = Unavailable(code=code, message="It is so.", retry_after=3.5)
    followed.apply(snapshot(entry("m", unavailable=why)))
    with pytest.raises(error) as caught:
        followed.model("m").choose()
    refusal = caught.value
    assert isinstance(refusal, ModelNotReady | NoAvailableWorker)
    assert (refusal.code, refusal.message, refusal.retry_after) == (code, "It is so.", 3.5)


def test_where_a_request_was_already_it_does_not_go_again() -> None:
    followed = table()
    followed.apply(snapshot(entry("m", route("m"), route("m-r2"))))
    model = followed.model("m")
    first, _ = model.choose()
    second, _ = model.choose([first])
    assert {first.name, second.name} == {"m", "m-r2"}
    with pytest.raises(ModelNotReady) as caught:
        model.choose([first, second])
    assert caught.value.retry_after == 1


class LeasesComeBack(RuleBasedStateMachine):
    """Requests begin and end, instances come and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table()
        self.routes = {"m": route("m")}
        self.sequence = 1
        self.held: list[tuple[Instance, Lease]] = []
        self.seen: set[Instance] = set()
        self.table.apply(snapshot(entry("m", *self.routes.values())))

    def publish(self) -> None:
        self.sequence += 1
        self.table.apply(Delta(epoch="e", sequence=self.sequence, changed={"m": entry("m", *self.routes.values())}))

    @rule(number=st.integers(2, 5), capacity=st.integers(1, 4))
    def add(self, number: int, capacity: int) -> None:
        self.routes[f"m-r{number}"] = route(f"m-r{number}", capacity=capacity)
        self.publish()

    @rule(number=st.integers(2, 5))
    def remove(self, number: int) -> None:
        self.routes.pop(f"m-r{number}", None)
        self.publish()

    @rule()
    def begin(self) -> None:
        model = self.table.model("m")
        if not model.places:
            with pytest.raises(ModelBusy):
                model.choose()
            return
        instance, _ = model.choose()
        assert instance.own < instance.capacity
        lease = instance.lease()
        lease.__enter__()
        self.held.append((instance, lease))
        self.seen.add(instance)

    @rule(which=st.integers(0, 100), failing=st.booleans())
    def end(self, which: int, failing: bool) -> None:
        if self.held:
            _, lease = self.held.pop(which % len(self.held))
            error = ValueError() if failing else None
            lease.__exit__(type(error) if error else None, error, None)

    @invariant()
    def counts_are_what_is_held(self) -> None:
        for instance in self.seen:
            assert instance.inflight == sum(held is instance for held, _ in self.held)

    def teardown(self) -> None:
        while self.held:
            self.end(0, False)
        assert all(instance.inflight == 0 for instance in self.seen)


LeasesComeBack.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLeasesComeBack = LeasesComeBack.TestCase
