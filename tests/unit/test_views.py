from __future__ import annotations

import pytest
from msgspec import structs

from modelpool.core.demand import Demand
from modelpool.core.learned import What, learn
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import GB
from modelpool.core.pool import Instance, Model, Pool, Worker, with_instances
from modelpool.manager.views import (
    DEFAULT_START_S,
    DEFAULT_WAKE_S,
    Known,
    WorkerFacts,
    entry,
    model_view,
    worker_view,
)
from modelpool.messages.admin import ModelView
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import ModelEntry, Route
from modelpool.messages.workers import Address, Device, InstanceReport, LevelChange, Progress, WorkerInfo

S = InstanceState
SPEC = ModelSpec(alias="m", fake=True)
MODEL = Model(alias="m", key="k", engine="fake", created=7)
START_8 = {"m": learn({}, "w", What.START, 8.0)}


def known(
    *instances: Instance,
    alive: bool = True,
    url: str = "http://w:7000",
    direct: bool = True,
    model: Model = MODEL,
    **pool: object,
) -> Known:
    reports = {
        each.instance: InstanceReport(
            instance=each.instance,
            model=SPEC,
            state=each.state,
            address=Address("10.0.0.1", 4000),
            capacity=4,
            progress=Progress(phase="load") if each.state is S.STARTING else None,
        )
        for each in instances
    }
    why = "" if alive else "its process has ended"
    worker = Worker(worker_id="w", incarnation="1", alive=alive, reason=why)
    return Known(
        pool=with_instances(
            Pool(
                models={"m": model},
                workers={"w": worker},
                demand={"m": Demand(asked_at=0.0)},
                **pool,  # type: ignore[arg-type]
            ),
            {("w", each.instance): each for each in instances},
        ),
        specs={"m": SPEC},
        facts={
            "w": WorkerFacts(info=WorkerInfo(worker_id="w", incarnation="1", url=url, direct=direct), reports=reports)
        },
        now=100.0,
    )


def without_room() -> Known:
    lacking = {"m": "w: needs 8.0 GB on device 0, 1.0 GB free of 9.0 GB"}
    return known(shortages=lacking, hopeless=frozenset({"m"}))


def instance(name: str = "m", state: S = S.ACTIVE, **fields: object) -> Instance:
    return Instance(instance=name, alias="m", key="k", worker_id="w", state=state, **fields)  # type: ignore[arg-type]


def seen(known_: Known) -> ModelEntry:
    return entry(known_, "m")


def unavailable(known_: Known) -> tuple[str, str, float]:
    what = seen(known_).unavailable
    assert what is not None
    return what.code, what.message, what.retry_after


def test_active_instances_are_routes_and_those_that_end_are_not() -> None:
    view = seen(known(instance(), instance("m-r2", stopping=True), instance("m-r3", S.STARTING)))
    assert view.routes == (Route(instance="m", worker_id="w", host="10.0.0.1", port=4000, capacity=4),)
    assert view.unavailable is None


def test_a_worker_behind_a_public_url_is_reached_through_its_proxy() -> None:
    view = seen(known(instance(), url="http://edge:80/w1/", direct=False))
    assert view.routes[0].host == "edge"
    assert view.routes[0].port == 80
    assert view.routes[0].prefix == "/w1/proxy/m"


def test_a_starting_model_says_where_and_how_far_and_when_to_come_back() -> None:
    code, message, wait = unavailable(known(instance(state=S.STARTING, starting_since=97.0), learned=START_8))
    assert code == "model_not_ready"
    assert "it is starting on w (load)" in message
    assert wait == 5.0


def test_who_sleeps_says_how_long_it_takes_to_wake() -> None:
    asleep = known(instance(state=S.SLEEP_1), learned={"m": learn(START_8["m"], "w", What.WAKE_1, 1.5)})
    assert unavailable(asleep)[2] == 1.5
    assert unavailable(known(instance(state=S.SLEEP_2)))[2] == DEFAULT_WAKE_S
    assert unavailable(known(learned=START_8))[2] == 8.0
    assert unavailable(known())[2] == DEFAULT_START_S


def test_a_failed_model_gives_its_real_reason() -> None:
    failed = instance(state=S.FAILED, reason="no such file.", failures=3, retry_at=104.0)
    code, message, wait = unavailable(known(failed, learned=START_8))
    assert code == "model_not_ready"
    assert "it failed 3 times on w: no such file; it will be tried again" in message
    assert wait == 12.0


def view(known_: Known) -> ModelView:
    return model_view(known_, "m")


def test_a_model_that_is_registered_wrongly_says_how_to_correct_it() -> None:
    wrong = instance(state=S.FAILED, reason="vLLM has no such argument", failures=1, permanent=True, retry_at=160.0)
    seen_ = view(known(wrong))
    assert seen_.permanent
    assert seen_.reason == ("it failed on w: vLLM has no such argument; correct it: `modelpool rm m`, register again")
    assert not view(known(instance(state=S.FAILED, reason="killed", failures=1, retry_at=104.0))).permanent


def test_what_stands_in_the_way_of_the_other_replicas_is_said_while_one_serves() -> None:
    three = Model(alias="m", key="k", engine="fake", created=7, min_replicas=3)
    some = known(instance(), instance("m-r2", S.FAILED, reason="killed", failures=2), model=three)
    assert (view(some).state, view(some).wanted) == (S.ACTIVE, 3)
    assert view(some).reason == "it failed 2 times on w: killed; it will be tried again"
    all_ = known(instance(), instance("m-r2"), instance("m-r3"), model=three)
    assert view(all_).reason == ""


def test_replicas_are_in_the_order_of_their_numbers() -> None:
    names = ["m-r10", "m-r2", "m"]
    assert [each.instance for each in view(known(*map(instance, names))).instances] == ["m", "m-r2", "m-r10"]


def test_without_a_worker_or_room_no_worker_is_available() -> None:
    assert unavailable(known(alive=False))[0] == "no_available_worker"
    assert "w: its process has ended" in unavailable(known(alive=False))[1]
    code, message, _ = unavailable(without_room())
    assert code == "no_available_worker"
    assert "no worker can take it: w: needs 8.0 GB" in message


def test_a_manager_that_has_just_started_says_whom_it_awaits() -> None:
    awaited, wanted = frozenset({"w2", "w1"}), frozenset({"m"})
    said = view(known(alive=False, awaited=awaited, recover_until=200.0, wanted_up=wanted)).reason
    assert said == "no worker is there: the manager has just started, and awaits w1, w2"


def on_its_way(known_: Known) -> bool:
    what = seen(known_).unavailable
    assert what is not None
    return what.on_its_way


def test_a_model_is_on_its_way_while_it_starts_or_is_about_to() -> None:
    assert on_its_way(known())
    assert on_its_way(known(instance(state=S.STARTING)))
    assert on_its_way(known(instance(state=S.STARTING, failures=3, reason="x")))
    assert on_its_way(known(instance(state=S.FAILED, failures=5, retry_at=160.0), instance("m-r2", S.STARTING)))


def test_a_model_that_its_former_instance_makes_wait_is_on_its_way() -> None:
    former = instance(stopping=True)
    assert on_its_way(known(former, shortages={"m": "waits for its former instance to end"}))


def test_an_engine_that_died_once_is_on_its_way_and_one_that_does_so_again_and_again_is_not() -> None:
    assert on_its_way(known(instance(state=S.FAILED, failures=1, reason="signal 9", retry_at=101.0)))
    assert not on_its_way(known(instance(state=S.FAILED, failures=2, reason="signal 9", retry_at=101.0)))
    assert not on_its_way(known(instance(state=S.FAILED, failures=1, reason="signal 9", retry_at=110.0)))


def test_what_cannot_start_is_not_on_its_way() -> None:
    for state, retry_at in ((S.FAILED, 101.0), (S.STARTING, None)):
        broken = instance(state=state, retry_at=retry_at, failures=1, permanent=True, reason="no such file")
        assert not on_its_way(known(broken))
    assert not on_its_way(without_room())


@pytest.mark.parametrize("state", [S.FAILED, S.SLEEP_1])
def test_what_nothing_can_make_room_for_is_not_on_its_way(state: S) -> None:
    one = instance(state=state, failures=1, retry_at=101.0) if state is S.FAILED else instance(state=state)
    view = known(one, shortages={"m": "w: needs 6.0 GB on device 0, 2.0 GB free of 10.0 GB"})
    assert on_its_way(view)
    assert not on_its_way(structs.replace(view, pool=structs.replace(view.pool, hopeless=frozenset({"m"}))))


def test_what_waits_until_others_give_way_is_on_its_way() -> None:
    waiting = known(shortages={"m": "waits for n to give way on w"})
    assert on_its_way(waiting)
    assert "it is not ready: waits for n to give way" in unavailable(waiting)[1].replace("The model `m` is", "it is")
    for state in (S.SLEEP_1, S.SLEEP_2, S.WAKING, S.DRAINING):
        assert on_its_way(known(instance(state=state)))


def test_a_worker_that_died_a_moment_ago_may_be_back_and_one_that_is_silent_may_not() -> None:
    assert on_its_way(known(alive=False, missed={"w": 101.0}))
    assert not on_its_way(known(alive=False))
    assert not on_its_way(known(instance(state=S.STARTING), alive=False))


def test_a_model_is_as_awake_as_the_best_of_its_instances() -> None:
    def state(*instances: Instance) -> S:
        view = known(*instances)
        return model_view(view, "m").state

    assert state() is S.UNLOADED
    assert state(instance(state=S.FAILED), instance("m-r2", S.STARTING)) is S.STARTING
    assert state(instance(state=S.FAILED), instance("m-r2")) is S.ACTIVE


@pytest.mark.parametrize("state", [S.SLEEP_1, S.SLEEP_2, S.WAKING])
def test_a_sleeper_has_no_route_and_is_shown_with_its_level_and_its_memory(state: S) -> None:
    view = known(instance(state=state))
    report = structs.replace(
        view.facts["w"].reports["m"], pss_bytes=7, sleep_levels=(1, 2), last_sleep=LevelChange(level=1, seconds=0.5)
    )
    view = structs.replace(view, facts={"w": structs.replace(view.facts["w"], reports={"m": report})})
    assert seen(view).routes == ()
    code, message, _ = unavailable(view)
    what = "its instance on w is WAKING" if state is S.WAKING else "it sleeps on w, and wakes when somebody asks for it"
    assert (code, message) == ("model_not_ready", f"The model `m` is not ready: {what}.")
    assert on_its_way(view)
    model = model_view(view, "m")
    assert model.state is state
    (shown,) = model.instances
    assert shown.sleep_level_value == {S.SLEEP_1: 1, S.SLEEP_2: 2, S.WAKING: 0}[state]
    assert (shown.pss_bytes, shown.sleep_levels, shown.last_sleep) == (7, (1, 2), LevelChange(level=1, seconds=0.5))


def test_a_worker_shows_what_is_set_aside_on_each_of_its_devices() -> None:
    starting = instance("m", S.STARTING, devices=(1,), memory_bytes=3 * GB)
    awake = instance("m-r2", devices=(0, 1), memory_bytes=GB)
    devices = tuple(
        Device(index=index, kind="cuda", name="H200", total_bytes=10 * GB, free_bytes=9 * GB) for index in (0, 1, 2)
    )
    pool = known(starting, awake)
    facts = structs.replace(pool.facts["w"], devices=devices)
    pool = structs.replace(pool, facts={"w": facts})
    assert worker_view(pool, pool.pool.workers["w"]).set_aside_bytes == (GB, 4 * GB, 0)
