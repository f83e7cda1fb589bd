"""What the command line shows of a pool."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import InstanceView, ModelView, PoolStatus, WorkerView
from modelpool.messages.workers import Device, Progress

_COLOUR = {
    InstanceState.ACTIVE: "green",
    InstanceState.STARTING: "yellow",
    InstanceState.WAKING: "yellow",
    InstanceState.FAILED: "red",
}
_GB = 10**9


def models_table(models: Iterable[ModelView]) -> Table:
    """One line a model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("MODEL", "STATE", "ENGINE", "REPLICAS", "WHERE", "NOTE"):
        table.add_column(column, overflow="fold")
    for model in models:
        active = sum(each.state is InstanceState.ACTIVE for each in model.instances)
        table.add_row(
            model.alias,
            state_text(model.state),
            model.spec.engine,
            f"{active}/{max(1, len(model.instances))}",
            ", ".join(dict.fromkeys(each.worker_id for each in model.instances)) or "–",
            Text(_note(model), style="dim"),
        )
    return table


def instances_table(models: Iterable[ModelView]) -> Table:
    """One line an instance."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("INSTANCE", "STATE", "WORKER", "DEVICES", "PID", "NOTE"):
        table.add_column(column, overflow="fold")
    for instance in (each for model in models for each in model.instances):
        table.add_row(
            instance.instance,
            state_text(instance.state),
            instance.worker_id,
            ",".join(map(str, instance.devices)) or "–",
            str(instance.pid or "–"),
            Text(_instance_note(instance), style="dim"),
        )
    return table


def workers_table(workers: Iterable[WorkerView]) -> Table:
    """One line a worker."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("WORKER", "STATE", "URL", "DEVICES", "ENGINES", "NOTE"):
        table.add_column(column, overflow="fold")
    for worker in workers:
        engines = ", ".join(f"{kind} {status.state}" for kind, status in sorted(worker.engines.items()))
        problems = [f"{kind}: {status.reason}" for kind, status in sorted(worker.engines.items()) if status.reason]
        table.add_row(
            worker.worker_id,
            Text("alive", style="green") if worker.alive else Text("lost", style="red"),
            worker.url,
            "\n".join(device_text(device) for device in worker.devices),
            engines,
            Text("; ".join([worker.reason, *problems] if worker.reason else problems), style="dim"),
        )
    return table


def status_line(status: PoolStatus) -> str:
    active = sum(model.state is InstanceState.ACTIVE for model in status.models)
    alive = sum(worker.alive for worker in status.workers)
    recovering = ", waiting for the workers it knew" if status.recovering else ""
    return (
        f"Model Pool {status.version}: {active} of {len(status.models)} models active, "
        f"{alive} of {len(status.workers)} workers alive{recovering} (run {status.run_id or '–'}, epoch {status.epoch})"
    )


def state_text(state: InstanceState) -> Text:
    return Text(state, style=_COLOUR.get(state, "dim"))


def device_text(device: Device) -> str:
    free, total = device.free_bytes / _GB, device.total_bytes / _GB
    return f"{device.kind}{device.index} {device.name}: {free:.1f} of {total:.1f} GB free"


def progress_text(progress: Progress) -> str:
    """`load`, or `fetch 1.2 of 3.4 GB`."""
    if not progress.total_bytes:
        return progress.phase
    return f"{progress.phase} {progress.done_bytes / _GB:.1f} of {progress.total_bytes / _GB:.1f} GB"


def _note(model: ModelView) -> str:
    progress = [progress_text(each.progress) for each in model.instances if each.progress]
    if model.state is InstanceState.STARTING and progress and not any(each.failures for each in model.instances):
        return progress[0]
    return model.reason


def _instance_note(instance: InstanceView) -> str:
    if instance.state is InstanceState.STARTING and instance.progress:
        return progress_text(instance.progress)
    again = f" (again in {instance.retry_in_s:.0f} s)" if instance.retry_in_s is not None else ""
    return instance.reason + again
