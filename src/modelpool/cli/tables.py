"""What the command line shows of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.text import Text

from modelpool.cli.listing import Listing, natural
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import InstanceView, LearnedView, ModelView, PoolStatus, WorkerView
from modelpool.messages.explain import Considered
from modelpool.messages.keys import KeyView
from modelpool.messages.workers import Device, Progress

_COLOUR = {
    InstanceState.ACTIVE: "green",
    InstanceState.STARTING: "yellow",
    InstanceState.WAKING: "yellow",
    InstanceState.FAILED: "red",
}
_GB = 10**9


def models_table(models: Iterable[ModelView]) -> Listing:
    """One line a model. REPLICAS: how many are ready, and how many are wanted."""
    table = Listing("MODEL", "STATE", "ENGINE", "REPLICAS", "WHERE", "NOTE")
    for model in models:
        table.add_row(
            model.alias,
            state_text(model.state),
            model.spec.engine,
            f"{ready_count(model)}/{model.wanted}",
            ", ".join(dict.fromkeys(each.worker_id for each in model.instances)) or "–",
            _dim(_note(model)),
        )
    return table


def instances_table(models: Iterable[ModelView]) -> Listing:
    """One line an instance."""
    table = Listing("INSTANCE", "STATE", "WORKER", "DEVICES", "PID", "NOTE")
    for instance in (each for model in models for each in model.instances):
        table.add_row(
            instance.instance,
            state_text(instance.state),
            instance.worker_id,
            ",".join(map(str, instance.devices)) or "–",
            str(instance.pid or "–"),
            _dim(_instance_note(instance)),
        )
    return table


def phases_table(instance: InstanceView) -> Listing:
    """One line a phase of an instance's start, in their order, and one for all."""
    table = Listing("PHASE", "SECONDS", "SHARE")
    total = sum(phase.seconds for phase in instance.phases)
    for phase in instance.phases:
        share = phase.seconds / total if total else 0.0
        table.add_row(phase.name, f"{phase.seconds:8.3f}", f"{share:5.0%}")
    table.add_row("all", f"{total:8.3f}", "")
    return table


def learned_table(learned: Iterable[LearnedView]) -> Listing:
    """One line for each thing that was seen of a model on a worker."""
    table = Listing("SEEN OF IT", "WORKER", "TYPICAL", "AT WORST", "TIMES")
    for each in learned:
        if each.worker_id:
            amounts = (each.typical, each.slow)
            texts = (f"{amount / 1e6:.0f} MB" if "held" in each.what else f"{amount:.2f} s" for amount in amounts)
            table.add_row(each.what.replace("_", " "), each.worker_id, *texts, str(each.seen))
    return table


def now_line(model: ModelView) -> str:
    """`demo is ACTIVE, 1 of 2 replicas: …`."""
    some = f", {ready_count(model)} of {model.wanted} replicas" if model.wanted > 1 else ""
    return f"{model.alias} is {model.state}{some}" + (f": {model.reason}." if model.reason else ".")


def considered_table(considered: Iterable[Considered]) -> Listing:
    """One line an instance that a request could have gone to, the least loaded first."""
    table = Listing("INSTANCE", "IN FLIGHT", "CAPACITY", "LOAD", "")
    for each in sorted(considered, key=lambda each: (each.load, natural(each.instance))):
        role = "" if each.role is None else each.role.replace("_", "-")
        table.add_row(each.instance, str(each.inflight), str(each.capacity), f"{each.load:.2f}", role)
    return table


def workers_table(workers: Iterable[WorkerView]) -> Listing:
    """One line a worker."""
    table = Listing("WORKER", "STATE", "URL", "DEVICES", "ENGINES", "NOTE")
    for worker in sorted(workers, key=lambda each: natural(each.worker_id)):
        engines = ", ".join(f"{kind} {status.state}" for kind, status in sorted(worker.engines.items()))
        problems = [f"{kind}: {status.reason}" for kind, status in sorted(worker.engines.items()) if status.reason]
        table.add_row(
            worker.worker_id,
            worker_state(worker),
            worker.url,
            devices_text(worker.devices),
            engines,
            _dim(
                "; ".join(
                    filter(None, [worker.reason, *(sentence.rstrip(".") for sentence in worker.drain), *problems])
                )
            ),
        )
    return table


def worker_state(worker: WorkerView) -> Text:
    if not worker.alive:
        return Text("lost", style="red")
    return Text("draining", style="yellow") if worker.draining else Text("alive", style="green")


def worker_lines(worker: WorkerView) -> list[str]:
    """What it is and runs; while it is being drained, what it still waits for."""
    what = f"runs {', '.join(worker.instances)}" if worker.instances else "runs nothing"
    return [f"{worker.worker_id} at {worker.url} is {worker_state(worker)}; it {what}.", *worker.drain]


def keys_table(keys: Iterable[KeyView]) -> Listing:
    """One line a key; – where there is no limit."""
    table = Listing("NAME", "ID", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "AT ONCE", "PRIORITY", "MADE", "REVOKED")
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)
        table.add_row(
            key.name,
            key.id,
            ", ".join(key.models) or "all",
            *("–" if limit is None else str(limit) for limit in limits),
            str(key.priority),
            _day(key.created),
            "–" if key.revoked is None else Text(_day(key.revoked), style="red"),
        )
    return table


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def status_line(status: PoolStatus) -> str:
    active = sum(model.state is InstanceState.ACTIVE for model in status.models)
    alive = sum(worker.alive for worker in status.workers)
    recovering = ", waiting for the workers it knew" if status.recovering else ""
    return (
        f"Model Pool {status.version}: {active} of {len(status.models)} models active, "
        f"{alive} of {len(status.workers)} workers alive{recovering} (run {status.run_id or '–'}, epoch {status.epoch})"
    )


def ready_count(model: ModelView) -> int:
    """How many replicas of it are ready, and stay."""
    return sum(each.state is InstanceState.ACTIVE and not each.leaving for each in model.instances)


def state_text(state: InstanceState) -> Text:
    return Text(state, style=_COLOUR.get(state, "dim"))


def devices_text(devices: Sequence[Device]) -> str:
    """`cpu0 2 CPU cores: 3.0 of 8.0 GB free`; all of one name together: `4 × H200: 500.1 of 560.0 GB free, 2 lost`."""
    groups: dict[str, list[Device]] = {}
    for device in devices:
        groups.setdefault(device.name, []).append(device)
    return ", ".join(_group_text(name, group) for name, group in groups.items())


def _group_text(name: str, group: Sequence[Device]) -> str:
    free, total = sum(each.free_bytes for each in group) / _GB, sum(each.total_bytes for each in group) / _GB
    what = f"{len(group)} × {name}" if len(group) > 1 else f"{group[0].kind}{group[0].index} {name}"
    lost = [str(each.index) for each in group if each.lost]
    return f"{what}: {free:.1f} of {total:.1f} GB free" + (f", {', '.join(lost)} lost" if lost else "")


def progress_text(progress: Progress) -> str:
    """`load`, or `fetch 1.2 of 3.4 GB`."""
    if not progress.total_bytes:
        return progress.phase
    return f"{progress.phase} {progress.done_bytes / _GB:.1f} of {progress.total_bytes / _GB:.1f} GB"


def _dim(note: str) -> Text:
    return Text(" ".join(note.split()), style="dim")


def _note(model: ModelView) -> str:
    progress = [progress_text(each.progress) for each in model.instances if each.progress]
    if model.state is InstanceState.STARTING and progress and not any(each.failures for each in model.instances):
        return progress[0]
    return model.reason


def _instance_note(instance: InstanceView) -> str:
    if instance.state is InstanceState.STARTING and instance.progress:
        return progress_text(instance.progress)
    if instance.state in (InstanceState.SLEEP_1, InstanceState.SLEEP_2) and not instance.reason:
        return f"holds {instance.pss_bytes / 1e6:.0f} MB"
    if instance.leaving:
        return f"goes once another is in its place: {instance.leaving}"
    again = f" (again in {instance.retry_in_s:.0f} s)" if instance.retry_in_s is not None else ""
    return instance.reason + again
