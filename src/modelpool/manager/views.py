"""What others see of the pool: routing entries for gateways, views for people. Pure functions of what is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlsplit

import msgspec

from modelpool.core.availability import is_routed, on_its_way
from modelpool.core.learned import ANYWHERE, WAKE, What, slow
from modelpool.core.ledger import Claim, accelerated, claims
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.outgoing import why_outgoing
from modelpool.core.pool import Instance, Key, Pool, Worker, instances_of, instances_on, key_of
from modelpool.core.replicas import replica_number, replicas_wanted
from modelpool.core.room import ever_fits
from modelpool.manager.outlook import leaves, outlook
from modelpool.messages.admin import InstanceView, LearnedView, ModelView, WorkerView
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import ModelEntry, Route, Unavailable
from modelpool.messages.workers import Device, EngineStatus, InstanceReport, WorkerInfo

DEFAULT_START_S = 10.0
"""How long a start is taken to need before one of that model was measured."""
DEFAULT_WAKE_S = 3.0
NO_WORKER_RETRY_S = 5.0


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker last said of itself, as it said it."""

    info: WorkerInfo
    devices: tuple[Device, ...] = ()
    host: Device | None = None
    engines: Mapping[str, EngineStatus] = {}
    reports: Mapping[str, InstanceReport] = {}
    number: int = 0
    """Of that report; 0 where it is not known."""

    def is_after(self, number: int) -> bool:
        """Whether a report of the same incarnation was made before this one."""
        return 0 < number < self.number

    def news_since(self, before: WorkerFacts | None) -> set[str]:
        """The models of which it says something new."""
        known = before.reports if before and before.info == self.info else {}
        return {each.model.alias for each in self.reports.values() if known.get(each.instance) != each}


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """All that views are made of."""

    pool: Pool
    specs: Mapping[str, ModelSpec]
    facts: Mapping[str, WorkerFacts]
    now: float

    def report(self, key: Key) -> InstanceReport | None:
        facts = self.facts.get(key[0])
        return facts.reports.get(key[1]) if facts else None


def _in_order(pool: Pool, alias: str) -> list[Instance]:
    """The instances of a model, in the order of their numbers."""
    mine = instances_of(pool, alias)
    return sorted(mine, key=lambda each: (replica_number(each.instance, alias), each.worker_id))


def entry(known: Known, alias: str) -> ModelEntry:
    """A model as the gateways see it."""
    model, instances = known.pool.models[alias], _in_order(known.pool, alias)
    current = [each for each in instances if is_routed(known.pool, each)]
    routes = tuple(route for each in current if (route := _route(known, each)))
    reports = [report for each in current if (report := known.report(key_of(each)))]
    lengths = [report.max_model_len for report in reports if report.max_model_len]
    return ModelEntry(
        alias=alias,
        created=model.created,
        routes=routes,
        unavailable=None if routes else _unavailable(known, alias, instances),
        max_model_len=min(lengths, default=known.specs[alias].max_model_len),
    )


def _route(known: Known, instance: Instance) -> Route | None:
    facts, report = known.facts.get(instance.worker_id), known.report(key_of(instance))
    if facts is None or report is None or report.address is None:
        return None
    host, port, prefix = report.address.host, report.address.port, ""
    if not facts.info.direct:
        url = urlsplit(facts.info.url)
        host, port = url.hostname or "", url.port or 80
        prefix = f"{url.path.rstrip('/')}/proxy/{quote(instance.instance)}"
    return Route(
        instance=instance.instance,
        worker_id=instance.worker_id,
        host=host,
        port=port,
        prefix=prefix,
        capacity=max(1, known.pool.models[instance.alias].capacity or report.capacity),
    )


def _unavailable(known: Known, alias: str, instances: list[Instance]) -> Unavailable:
    message = f"The model `{alias}` is not ready: {reason(known, alias, instances)}."
    nowhere = not instances and alias in known.pool.hopeless
    if nowhere or not any(worker.alive for worker in known.pool.workers.values()):
        code, wait = "no_available_worker", NO_WORKER_RETRY_S
    else:
        code, wait = "model_not_ready", _start_wait(known, alias, instances)
    return Unavailable(
        code=code, message=message, retry_after=wait, on_its_way=on_its_way(known.pool, alias, known.now)
    )


def passes(known: Known, alias: str) -> bool:
    """Whether its entry changes as time passes: by how long it is to be waited for."""
    mine = instances_of(known.pool, alias)
    return any(each.retry_at is not None or each.state in _COMING for each in mine)


def workers_missing(pool: Pool) -> str:
    """Why no worker is there, where none is."""
    if pool.recovering:
        return f"the manager has just started, and awaits {', '.join(sorted(pool.awaited)) or 'its workers'}"
    if not pool.workers:
        return "none is registered"
    return "; ".join(f"{worker.worker_id}: {worker.reason}" for worker in pool.workers.values())


def _start_wait(known: Known, alias: str, instances: list[Instance]) -> float:
    """Seconds until it should be ready: nine of ten starts, or wakes, of late took no longer, there or elsewhere."""
    waits = [wait for each in instances if (wait := _wait_for(known, each)) is not None]
    return round(min(waits, default=_slow(known, alias, What.START)), 1)


def _wait_for(known: Known, instance: Instance) -> float | None:
    """Until this instance should be ready; None where a request does not bring it up."""
    if instance.retry_at is not None:
        pause_s = max(1.0, instance.retry_at - known.now)
        return pause_s + _slow(known, instance.alias, What.START, instance.worker_id)
    if instance.state in _COMING:
        takes_s = _slow(known, instance.alias, WAKE.get(instance.woken_from, What.START), instance.worker_id)
        return max(1.0, instance.starting_since + takes_s - known.now)
    if instance.state in _ASLEEP:
        return _slow(known, instance.alias, WAKE[sleep_level(instance.state)], instance.worker_id)
    return None


def _slow(known: Known, alias: str, what: What, worker_id: str = ANYWHERE) -> float:
    unseen = DEFAULT_START_S if what is What.START else DEFAULT_WAKE_S
    return slow(known.pool.learned.get(alias, {}), what, worker_id, unknown=unseen)


def reason(known: Known, alias: str, instances: list[Instance]) -> str:
    """Why a model is not ACTIVE, in one clause; "" when it is."""
    if any(each.state is InstanceState.ACTIVE and not each.stopping for each in instances):
        return ""
    if not any(worker.alive for worker in known.pool.workers.values()):
        return f"no worker is there: {workers_missing(known.pool)}"
    failed = [each for each in instances if each.failures and each.reason]
    if failed:
        worst = max(failed, key=lambda each: (each.permanent, each.failures))
        again = "starting again" if worst.state is InstanceState.STARTING else "it will be tried again"
        if worst.permanent:
            again = f"correct it: `modelpool rm {alias}`, register again"
        times = "" if worst.failures == 1 else f" {worst.failures} times"
        lacking = f" ({shortage})" if (shortage := known.pool.shortages.get(alias)) else ""
        return f"it failed{times} on {worst.worker_id}: {worst.reason.rstrip('.')}; {again}{lacking}"
    if shortage := known.pool.shortages.get(alias):
        return f"no worker can take it: {shortage}" if alias in known.pool.hopeless else shortage
    for each in instances:
        report = known.report(key_of(each))
        phase = f" ({report.progress.phase})" if report and report.progress else ""
        if each.state is InstanceState.STARTING:
            return f"it is starting on {each.worker_id}{phase}"
        if each.state in _ASLEEP:
            return f"it sleeps on {each.worker_id}, and wakes when somebody asks for it"
        return f"its instance on {each.worker_id} is {each.state}"
    return "it is not loaded, and starts when somebody asks for it"


_WHATS = tuple(What)
_ACTIVE = InstanceState.ACTIVE
_ASLEEP = (InstanceState.SLEEP_1, InstanceState.SLEEP_2)
_COMING = (InstanceState.STARTING, InstanceState.WAKING)
_BEST_FIRST = (
    InstanceState.ACTIVE,
    InstanceState.WAKING,
    InstanceState.STARTING,
    InstanceState.SLEEP_1,
    InstanceState.SLEEP_2,
    InstanceState.DRAINING,
    InstanceState.FAILED,
)


def model_view(known: Known, alias: str) -> ModelView:
    """A model as people see it. Without instances it is UNLOADED: registered, and run by nothing."""
    model, instances = known.pool.models[alias], _in_order(known.pool, alias)
    wanted = replicas_wanted(known.pool, model)
    states = {each.state for each in instances if not each.stopping}
    leaving = {key_of(each): why_outgoing(known.pool, each) for each in instances}
    rest = [each for each in instances if each.stopping or leaving[key_of(each)] or each.state is not _ACTIVE]
    short = len(instances) - len(rest) < wanted
    never = alias in known.pool.shortages and not ever_fits(known.pool, model)
    return ModelView(
        alias=alias,
        state=next((state for state in _BEST_FIRST if state in states), InstanceState.UNLOADED),
        reason=_standing_in(leaving, reason(known, alias, [each for each in rest if not leaving[key_of(each)]]))
        if short
        else "",
        spec=known.specs[alias],
        created=model.created,
        instances=tuple(_instance_view(known, each) for each in instances),
        wanted=wanted,
        permanent=short and (never or any(each.permanent for each in rest)),
        decision=_decision(known, alias),
        due_s=_due_s(known, alias),
        outlook=outlook(known.pool, model, instances, known.now),
        learned=_learned(known, alias),
    )


def _standing_in(leaving: Mapping[Key, str], reason: str) -> str:
    """The reason why a model is not as it is to be; and who serves it meanwhile."""
    names = ", ".join(f"{key[1]} on {key[0]}" for key, why in leaving.items() if why)
    why = next(filter(None, leaving.values()), "")
    return f"{names} stays until another is in its place, since {why}: {reason}" if names else reason


def _learned(known: Known, alias: str) -> tuple[LearnedView, ...]:
    """By what it is, all workers together first."""
    learned = known.pool.learned.get(alias, {})
    return tuple(
        LearnedView(what=what, worker_id=worker_id, typical=each.typical, slow=each.slow, seen=len(each.recent))
        for (worker_id, what), each in sorted(learned.items(), key=lambda item: (_WHATS.index(item[0][1]), item[0][0]))
    )


def _decision(known: Known, alias: str) -> str:
    """What was decided last, in words: the step and whom it is about, why, and what is in its way."""
    decided = known.pool.wishes.get(alias)
    if decided is None:
        return "nothing yet"
    what = " ".join(word for word in (decided.step, decided.replica) if word)
    shortage = known.pool.shortages.get(alias)
    return f"{what}: {decided.reason}" + (f"; {shortage}" if shortage else "")


def _due_s(known: Known, alias: str) -> float | None:
    decided = known.pool.wishes.get(alias)
    if decided is None or decided.due == math.inf:
        return None
    return round(max(0.0, decided.due - known.now), 1)


def _instance_view(known: Known, instance: Instance) -> InstanceView:
    report = known.report(key_of(instance))
    retrying = instance.retry_at is not None and instance.state is InstanceState.FAILED
    return InstanceView(
        instance=instance.instance,
        worker_id=instance.worker_id,
        state=instance.state,
        sleep_level_value=sleep_level(instance.state),
        reason=instance.reason or "; ".join(instance.refuses.values()),
        leaving=why_outgoing(known.pool, instance),
        progress=report.progress if report and report.state is instance.state else None,
        failures=instance.failures,
        permanent=instance.permanent and instance.failures > 0,
        retry_in_s=round(max(0.0, (instance.retry_at or 0.0) - known.now), 1) if retrying else None,
        devices=instance.devices,
        pid=report.pid if report else None,
        sleep_levels=report.sleep_levels if report else (),
        pss_bytes=report.pss_bytes if report else 0,
        device_bytes=report.device_bytes if report else 0,
        weights_bytes=instance.weights_bytes,
        last_sleep=report.last_sleep if report else None,
        last_wake=report.last_wake if report else None,
        phases=report.phases if report else (),
    )


def worker_view(known: Known, worker: Worker) -> WorkerView:
    facts, here = known.facts[worker.worker_id], instances_on(known.pool, worker.worker_id)
    set_aside = claims(here, accelerated=accelerated(worker))
    return WorkerView(
        worker_id=worker.worker_id,
        url=facts.info.url,
        alive=worker.alive,
        reason=worker.reason,
        last_seen_s=round(known.now - worker.last_seen, 1),
        run_id=facts.info.run_id,
        version=facts.info.version,
        devices=facts.devices,
        set_aside_bytes=tuple(set_aside.get(each.index, Claim()).bytes for each in facts.devices),
        host=facts.host,
        engines=dict(facts.engines),
        instances=tuple(sorted(each.instance for each in here)),
        draining=worker.worker_id in known.pool.draining,
        drain=tuple(_drain(known, worker)) if worker.worker_id in known.pool.draining else (),
    )


def _drain(known: Known, worker: Worker) -> Iterator[str]:
    """What a worker that is being drained still waits for."""
    if not worker.alive:
        yield f"It takes no orders: {worker.reason}."
    here = instances_on(known.pool, worker.worker_id)
    for instance in sorted(here, key=lambda each: each.instance):
        yield leaves(known.pool, instance)
    if not here:
        yield "Nothing runs there any more; it ends."
