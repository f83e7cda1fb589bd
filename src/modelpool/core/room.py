"""Where there is room for a replica, and what lacks where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import nlargest
from itertools import islice

from msgspec.structs import replace

from modelpool.core.learned import What, slow
from modelpool.core.ledger import Ledger, accelerated, on_device
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Round
from modelpool.core.placement import GB, NAMED_MAX, Candidate, Need, Placement, Refusal, place, shortfalls
from modelpool.core.pool import Instance, Model, Pool, Worker, instances_of
from modelpool.core.replicas import is_overdue, scaling_of
from modelpool.core.scaling import Step

_WORKER_COST = 0.03
_HOST_GUESS_BYTES = 2 * GB
"""Of the machine's memory, beside accelerators: what an engine's processes take, before that was measured."""
_AVOIDED_AFTER = 2
"""Failures in a row after which a worker comes last."""
Lacking = Callable[[str], Iterable[Mapping[int, int]]]
"""worker → what is lacking there, in bytes by device, for one set of devices after the other."""


def need_of(pool: Pool, model: Model) -> Need:
    guess = 0 if model.engine == "fake" else _HOST_GUESS_BYTES
    learned = pool.learned.get(model.alias, {})
    return replace(model.need(), host_bytes=int(slow(learned, What.HELD_ON_HOST_AWAKE, unknown=guess)))


def find_place(
    pool: Pool, model: Model, round_: Round, *, failed: Instance | None = None, unless_kept: bool = False
) -> Placement | Refusal:
    """Where a replica is to be started: looked for where there may be room for it, on the workers that are alive.

    `failed` is to be started again: it holds nothing where it was. `unless_kept`: not where room is kept for others.
    """
    round_.cost += _WORKER_COST * len(pool.workers)
    need = need_of(pool, model)
    there = [worker for worker in pool.workers.values() if worker.alive]

    def candidates(workers: Iterable[Worker]) -> list[Candidate]:
        found = [_candidate(pool, model, worker, round_, failed) for worker in workers]
        return [_unless_kept(each, round_) for each in found] if unless_kept else found

    choice = place(need, candidates(each for each in there if round_.ledger(pool, each).may_take(need)))
    if isinstance(choice, Placement):
        return choice
    # Why not is said of the workers that a refusal names.
    named = nlargest(NAMED_MAX, there, key=lambda worker: round_.ledger(pool, worker).most)
    return place(need, candidates(named), others=len(there) - len(named))


def _candidate(pool: Pool, model: Model, worker: Worker, round_: Round, failed: Instance | None = None) -> Candidate:
    books = left_to(model.alias, pool, worker, round_)
    mine = (each for each in instances_of(pool, model.alias) if each is not failed)
    avoided = failed is not None and failed.worker_id == worker.worker_id
    return Candidate(
        worker_id=worker.worker_id,
        devices=books.devices,
        host=books.host,
        replicas_here=sum(each.worker_id == worker.worker_id for each in mine),
        refusal=_refusal(pool, worker, model),
        avoid=failed is not None and avoided and (failed.permanent or failed.failures >= _AVOIDED_AFTER),
        has_files=model.source in worker.files,
    )


def _refusal(pool: Pool, worker: Worker, model: Model) -> str:
    if worker.worker_id in pool.draining:
        return "it is being drained"
    return worker.engines.get(model.engine, f"does not know the engine {model.engine!r}")


def alive_workers(pool: Pool) -> list[str]:
    return [worker.worker_id for worker in pool.workers.values() if worker.alive]


def left_to(alias: str, pool: Pool, worker: Worker, round_: Round) -> Ledger:
    """What this model may take there: not what an overdue one needs, else any that needs less would be first for ever.

    On all devices, since any may become free: for as long as a turn and a swap take.
    """
    books, other = round_.ledger(pool, worker), round_.kept_for.get(worker.worker_id)
    if other is None or other == alias or other not in pool.models or not is_overdue(pool, other, round_.now):
        return books
    need = need_of(pool, pool.models[other])
    left = [min(each.free_bytes, max(0, each.free_bytes - need.on(each))) for each in books.devices]
    devices = zip(books.devices, left, strict=True)
    return replace(books, devices=tuple(replace(each, free_bytes=bytes_) for each, bytes_ in devices))


def _unless_kept(candidate: Candidate, round_: Round) -> Candidate:
    other = round_.kept_for.get(candidate.worker_id)
    return replace(candidate, refusal=leaves_room_to(other)) if other else candidate


def leaves_room_to(alias: str) -> str:
    return f"leaves the room to {alias}, which is asked for"


def lacking_of(pool: Pool, model: Model, round_: Round, failed: Instance | None = None) -> Lacking:
    need = need_of(pool, model)
    return lambda worker_id: shortfalls(need, _candidate(pool, model, pool.workers[worker_id], round_, failed))


def lacking_to_wake(pool: Pool, instance: Instance, round_: Round) -> dict[int, int]:
    """Bytes by device."""
    worker = pool.workers[instance.worker_id]
    books = left_to(instance.alias, pool, worker, round_)
    needed = on_device(replace(instance, order=Step.WAKE), accelerated=accelerated(worker)).unseen
    rooms = [room for index in instance.devices if (room := books.room(index)) is not None]
    return {room.index: needed - room.free_bytes for room in rooms if room.free_bytes < needed}


def new_instance(pool: Pool, model: Model, name: str, choice: Placement) -> Instance:
    return Instance(
        instance=name,
        alias=model.alias,
        key=model.key,
        worker_id=choice.worker_id,
        state=InstanceState.ABSENT,
        devices=choice.devices,
        memory_bytes=choice.bytes_each,
        host_bytes=need_of(pool, model).host_bytes,
    )


def ever_fits(pool: Pool, model: Model) -> bool:
    """Whether all wanted replicas would fit if nothing else ran on the workers that are there. True while none is."""
    need, replicas = need_of(pool, model), max(1, scaling_of(pool.policy, model).min_replicas)
    there = [worker for worker in pool.workers.values() if worker.alive]
    if not there:
        return True
    fitting = (each for worker in there if isinstance(place(need, [each := _emptied(pool, model, worker)]), Placement))
    candidates = list(islice(fitting, replicas))
    if len(candidates) == replicas:  # one on each
        return True
    for _ in range(replicas):
        choice = place(need, candidates)
        if isinstance(choice, Refusal):
            return False
        candidates = [_less(each, choice) if each.worker_id == choice.worker_id else each for each in candidates]
    return True


def _emptied(pool: Pool, model: Model, worker: Worker) -> Candidate:
    """The worker, as if nothing ran there."""
    return Candidate(
        worker_id=worker.worker_id,
        devices=tuple(replace(device, free_bytes=device.total_bytes) for device in worker.devices),
        host=replace(worker.host, free_bytes=worker.host.total_bytes) if worker.host and accelerated(worker) else None,
        refusal=_refusal(pool, worker, model),
    )


def _less(candidate: Candidate, taken: Placement) -> Candidate:
    """The candidate with one replica more on it."""
    devices = tuple(
        replace(each, free_bytes=each.free_bytes - taken.bytes_each) if each.index in taken.devices else each
        for each in candidate.devices
    )
    return replace(candidate, devices=devices, replicas_here=candidate.replicas_here + 1)
