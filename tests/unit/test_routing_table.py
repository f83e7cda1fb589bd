"""The routing table: only what may say something else is made anew, so many entries at once, and none is left out."""

from __future__ import annotations

from msgspec.structs import replace

from modelpool.core.changes import apply, registered
from modelpool.core.events import ModelRegistered, ModelRemoved, Report, WorkerGone, WorkerReported
from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Device, Model, Pool
from modelpool.manager.routing_table import RoutingTable
from modelpool.manager.views import Known, WorkerFacts
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Address, InstanceReport, WorkerInfo

S = InstanceState
DEVICE = Device(index=0, kind="cpu", total_bytes=10, free_bytes=10)


def model(alias: str) -> Model:
    return Model(alias=alias, key=alias, engine="fake", created=0)


def pool_of(*aliases: str) -> Pool:
    return registered(Pool(), [ModelRegistered(model(alias)) for alias in aliases], 0.0)


def runs(alias: str, state: S = S.ACTIVE) -> WorkerReported:
    report = Report(instance=alias, alias=alias, key=alias, state=state)
    return WorkerReported(worker_id="w", incarnation="1", devices=(DEVICE,), engines={"fake": ""}, reports=(report,))


def known(pool: Pool, *, now: float = 0.0, port: int = 4000) -> Known:
    reports = {
        name: InstanceReport(
            instance=name, model=ModelSpec(alias=name, fake=True), state=S.ACTIVE, address=Address("h", port)
        )
        for _, name in pool.instances
    }
    info = WorkerInfo(worker_id="w", incarnation="1", url="http://w:7000")
    specs = {alias: ModelSpec(alias=alias, fake=True) for alias in pool.models}
    return Known(pool=pool, specs=specs, facts={"w": WorkerFacts(info=info, reports=reports)}, now=now)


def quiet(pool: Pool) -> Pool:
    return replace(pool, news=frozenset())


def test_only_models_with_news_are_made_anew() -> None:
    table, pool = RoutingTable(), apply(pool_of("a", "b"), runs("a"), 0.0)
    changed, _ = table.refresh(known(pool), pool.news)
    assert changed.keys() == {"a", "b"}
    assert table.complete
    assert table.refresh(known(quiet(pool), port=5000), ()) == ({}, ())
    changed, _ = table.refresh(known(quiet(pool), port=5000), ["a"])
    assert [route.port for route in changed["a"].routes] == [5000]
    gone = apply(quiet(pool), ModelRemoved("b"), 1.0)
    assert table.refresh(known(gone, port=5000), gone.news) == ({}, ("b",))


def test_so_many_are_made_at_once_and_those_with_news_first() -> None:
    table, pool = RoutingTable(), pool_of(*(f"m{number}" for number in range(1200)))
    rounds = 0
    while not table.complete:
        changed, _ = table.refresh(known(pool), ["m1199"])
        assert 0 < len(changed) <= 500
        assert rounds or "m1199" in changed
        rounds += 1
    assert rounds == 3
    assert table.entries.keys() == pool.models.keys()
    assert not table.behind


def test_what_is_waited_for_is_told_anew_every_second() -> None:
    table, pool = RoutingTable(), apply(pool_of("a", "b"), runs("a", S.STARTING), 0.0)
    table.refresh(known(pool), pool.news)
    assert table.refresh(known(quiet(pool), now=0.5), ()) == ({}, ())
    changed, _ = table.refresh(known(quiet(pool), now=2.0), ())
    assert changed.keys() == {"a"}


def test_with_the_last_worker_all_that_is_not_routed_is_told_so() -> None:
    table, pool = RoutingTable(), apply(pool_of("a", "b"), runs("a"), 0.0)
    table.refresh(known(pool), pool.news)
    gone = apply(quiet(pool), WorkerGone("w", "1", "its process has ended"), 1.0)
    changed, _ = table.refresh(known(gone, now=1.0), gone.news)
    for alias in ("a", "b"):
        unavailable = changed[alias].unavailable
        assert unavailable is not None
        assert unavailable.code == "no_available_worker"
        assert "its process has ended" in unavailable.message
