"""What the controller does where memory is short, devices fail and starts go wrong, told as stories."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from modelpool.core.availability import on_its_way
from modelpool.core.events import ModelRegistered, OrderRefused, Report, Tick, WorkerReported
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep
from modelpool.core.placement import GB, HOST
from modelpool.core.pool import Device, Pool
from modelpool.core.reconcile import next_deadline
from tests.unit import controller
from tests.unit.controller import asked, model, play

S = InstanceState


def report(alias: str = "m", state: S = S.ACTIVE, *, gb: int = 6, **fields: object) -> Report:
    held = {S.ACTIVE: gb, S.SLEEP_1: 1, S.SLEEP_2: 1}.get(state, 0)
    return replace(controller.report(alias, state, gb=gb, held=held), weights_bytes=4 * GB, **fields)


def heard(*reports: Report, worker: str = "w", free: int = 10, host: int = 64, **fields: object) -> WorkerReported:
    device = Device(index=0, kind="cuda", total_bytes=10 * GB, free_bytes=free * GB)
    machine = Device(index=HOST, kind="cpu", total_bytes=64 * GB, free_bytes=host * GB)
    said = WorkerReported(
        worker_id=worker, incarnation="1", devices=(device,), host=machine, engines={"fake": ""}, reports=reports
    )
    return replace(said, **fields)


def failed(reason: str = "out of memory", *, at: float, alias: str = "m", permanent: bool = False) -> Report:
    return report(alias, S.FAILED, reason=reason, changed_at=at, permanent=permanent)


def told(effects: Sequence[Effect]) -> list[tuple[str, str]]:
    return [(type(each).__name__, f"{each.instance} on {each.worker_id}") for each in effects]


def test_what_failed_holds_nothing_and_waits_for_room_like_anybody() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard(failed(at=1))))
    pool, _ = play((1, ModelRegistered(model("other", 8))), (1, heard(failed(at=1))), pool=pool)
    assert [each.instance for each in pool.instances.values() if each.state is S.STARTING] == ["other"]
    pool, effects = play((3, heard(failed(at=1), report("other", gb=8), free=2)), pool=pool)
    assert effects == ()
    assert pool.instances["w", "m"].state is S.FAILED
    assert "needs 6.0 GB on device 0, 2.0 GB free of 10.0 GB" in pool.shortages["m"]
    # The other one gives way to it only where somebody waits.
    _, effects = play((20, asked("m")), pool=pool)
    assert told(effects) == [("Sleep", "other on w")]


def test_what_is_left_of_one_that_failed_is_memory_on_its_way_back() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard(report(), free=4)))
    dead = failed("killed by signal 9 (SIGKILL)", at=2)
    pool, _ = play((2, heard(replace(dead, ending=True), free=4)), (2, asked("m")), pool=pool)
    pool, effects = play((3, Tick()), pool=pool)
    assert effects == ()
    assert "memory that is being given back" in pool.shortages["m"]
    assert on_its_way(pool, "m", 3)
    waits, _ = play((3.5, heard(dead, free=4)), (4, Tick()), pool=pool)  # gone, and it was not what took the memory
    assert not on_its_way(waits, "m", 4)
    pool, _ = play((3.5, heard(dead)), pool=pool)
    _, effects = play((4, Tick()), pool=pool)
    assert told(effects) == [("Start", "m on w")]


def test_what_failed_again_is_started_on_another_worker() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (0, heard(worker="x", free=9)))
    pool, effects = play((1, heard(failed(at=1))), (2, Tick()), pool=pool)
    assert told(effects) == [("Start", "m on w")]  # once may be chance
    pool, effects = play((3, heard(failed(at=3))), (5, Tick()), pool=pool)
    assert told(effects) == [("Stop", "m on w"), ("Start", "m on x")]
    moved = pool.instances["x", "m"]
    assert (moved.failures, moved.reason) == (2, "out of memory")
    pool, _ = play((6, heard()), (7, heard(replace(report(state=S.STARTING)), worker="x")), pool=pool)
    assert set(pool.instances) == {("x", "m")}
    # The pause goes on growing, wherever it fails.
    pool, _ = play((8, heard(failed(at=0.5), worker="x")), pool=pool)
    assert (pool.instances["x", "m"].failures, pool.instances["x", "m"].retry_at) == (3, 12)


def test_what_cannot_work_there_is_tried_elsewhere_at_its_next_turn() -> None:
    gone = failed("model_name: /models/m does not exist", at=1, permanent=True)
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (0, heard(worker="x", free=9)), (1, heard(gone)))
    assert pool.instances["w", "m"].retry_at == 61
    pool, effects = play((61, asked("m")), pool=pool)
    assert told(effects) == [("Stop", "m on w"), ("Start", "m on x")]


def test_an_order_that_will_be_refused_again_is_a_failure_of_the_model() -> None:
    refusal = OrderRefused(("w", "m"), "`tensor_parallel_size`: …", permanent=True)
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, refusal))
    one = pool.instances["w", "m"]
    assert (one.state, one.permanent, one.retry_at) == (S.FAILED, True, 61)
    _, effects = play((20, asked("m")), pool=pool)
    assert effects == ()


def test_what_failed_and_nobody_misses_causes_no_work() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard(report())), (2, heard(failed(at=2))))
    pool = replace(pool, wanted_up=frozenset())
    pool, effects = play((400, Tick()), pool=pool)
    assert effects == ()
    assert (next_deadline(pool) or math.inf) > 400
    _, effects = play((500, asked("m")), pool=pool)
    assert told(effects) == [("Start", "m on w")]


def idle(pool: Pool, host: int) -> Sequence[Effect]:
    """What becomes of m, which nobody asked for since 0, where the machine has so much memory of its own left."""
    _, effects = play((100, heard(report(), free=4, host=host)), pool=pool)
    return effects


def test_a_level_that_the_machine_has_no_memory_for_is_left_out() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard(report(), free=4)))
    for host, level in ((4, 1), (3, 2)):
        (effect,) = idle(pool, host)
        assert isinstance(effect, Sleep)
        assert effect.level == level
    light, _ = play((0, ModelRegistered(model())), (0, heard(report(levels=(1,)), free=4)))
    _, effects = play((100, heard(report(levels=(1,)), free=4, host=3)), pool=light)
    assert told(effects) == [("Stop", "m on w")]


def test_two_that_fall_asleep_together_are_not_promised_the_same_memory() -> None:
    two = Device(index=1, kind="cuda", total_bytes=10 * GB, free_bytes=4 * GB)
    reports = (report("a"), report("b", devices=(1,)))
    both = heard(*reports, free=4, host=6)
    pool, _ = play((0, ModelRegistered(model("a"))), (0, ModelRegistered(model("b"))), (0, both))
    _, effects = play((100, replace(both, devices=(*both.devices, two))), pool=pool)
    assert [each.level for each in effects if isinstance(each, Sleep)] == [1, 2]


def test_one_without_a_second_level_sleeps_lightly_until_it_is_unloaded() -> None:
    light = report(state=S.SLEEP_1, levels=(1,))
    pool, _ = play((0, ModelRegistered(model())), (0, heard(report(levels=(1,)), free=4)))
    pool, _ = play((100, Tick()), (101, heard(light, free=9)), pool=pool)
    pool, effects = play((299, heard(light, free=9)), pool=pool)
    assert effects == ()
    _, effects = play((300, heard(light, free=9)), pool=pool)
    assert told(effects) == [("Stop", "m on w")]


def test_an_accelerator_without_room_to_wake_unloads_rather_than_go_deeper() -> None:
    asleep = report(state=S.SLEEP_1)
    pool, _ = play((0, ModelRegistered(model())), (0, heard(report(), free=4)))
    pool, _ = play((100, Tick()), (101, heard(asleep, free=9)), pool=pool)
    for free, expected in ((9, "Sleep"), (4, "Stop")):
        _, effects = play((200, heard(asleep, free=free)), pool=pool)
        assert told(effects) == [(expected, "m on w")]


def test_a_sleeper_that_cannot_be_woken_where_it_is_gives_way_to_a_start_elsewhere() -> None:
    asleep = report(state=S.SLEEP_1)
    pool, _ = play((0, ModelRegistered(model(max_replicas=1))), (0, heard(report(), free=4)))
    pool, _ = play((100, heard(asleep, free=1)), (101, heard(worker="x")), pool=pool)  # somebody else took the rest
    pool, effects = play((102, asked("m")), pool=pool)
    assert told(effects) == [("Stop", "m on w"), ("Start", "m-r2 on x")]


def test_the_share_that_was_set_aside_outlives_the_manager() -> None:
    """A worker knows of no share where the user gave none."""
    plain = model(memory_bytes=None, memory_fraction=0.5)
    pool, _ = play((0, ModelRegistered(plain)), (0, heard(report(memory_bytes=0, held_bytes=0), free=9)))
    assert pool.instances["w", "m"].memory_bytes == 5 * GB


def test_two_that_make_room_together_are_not_promised_the_same_memory() -> None:
    """Each could sleep at level 1, in the 6 GB that the machine has left, but not both."""
    known = {"a": S.SLEEP_1, "b": S.SLEEP_1}
    sizes = {"a": 3, "b": 3}
    pool, _ = play(*((0, ModelRegistered(model(alias, gb))) for alias, gb in sizes.items()))
    awake = [report(alias, gb=gb) for alias, gb in sizes.items()]
    asleep = [report(alias, state, gb=3, slept_s=1.0) for alias, state in known.items()]
    deeper = [report(alias, S.SLEEP_2, gb=3, slept_s=1.0) for alias in known]
    pool, _ = play((0, heard(*awake, free=4)), (1, heard(*asleep, free=8)), (2, heard(*deeper, free=8)), pool=pool)
    pool, _ = play((3, heard(*awake, free=4)), (4, ModelRegistered(model("large", 8))), pool=pool)
    _, effects = play((60, heard(*awake, free=4, host=6)), (60, asked("large")), pool=pool)
    assert [each.level for each in effects if isinstance(each, Sleep)] == [1, 2]
