"""What users and workers say, as core/ takes it."""

from __future__ import annotations

import hashlib

import msgspec

from modelpool.core import pool as core
from modelpool.core.events import Report, WorkerReported
from modelpool.core.pool import Model
from modelpool.messages.dump import StoredModel
from modelpool.messages.models import ModelSpec, for_engine
from modelpool.messages.workers import (
    Device,
    EngineStatus,
    Heartbeat,
    InstanceReport,
    RegisterWorker,
    WorkerDescription,
    WorkerInfo,
)

_FIRST_START_ONLY = ("fetch", "import")


def worker_reported(info: WorkerInfo, said: RegisterWorker | Heartbeat | WorkerDescription) -> WorkerReported:
    return WorkerReported(
        worker_id=info.worker_id,
        incarnation=info.incarnation,
        devices=tuple(map(_device, said.devices)),
        host=_device(said.host) if said.host else None,
        files=frozenset(said.files),
        engines={kind: _engine_refusal(kind, status) for kind, status in said.engines.items()},
        reports=tuple(_report(each, beside_host=said.host is not None) for each in said.instances),
    )


def key_of(spec: ModelSpec) -> str:
    return hashlib.sha256(msgspec.json.encode(for_engine(spec), order="deterministic")).hexdigest()[:16]


def model_of(stored: StoredModel) -> Model:
    spec = stored.spec
    return Model(
        alias=spec.alias,
        key=key_of(spec),
        replaces=stored.replaces,
        engine=spec.engine,
        created=stored.created,
        source=spec.model_name,
        devices=spec.tensor_parallel_size,
        memory_bytes=None if spec.gpu_memory_gb is None else int(spec.gpu_memory_gb * 10**9),
        memory_fraction=spec.gpu_memory_utilization,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        pinned=spec.pinned,
        preload=spec.preload,
        capacity=spec.capacity,
        load_high=spec.load_high,
        load_low=spec.load_low,
        cooldown_s=spec.cooldown_s,
        idle_sleep_1_s=spec.idle_sleep_1_s,
        idle_sleep_2_s=spec.idle_sleep_2_s,
        idle_unload_s=spec.idle_unload_s,
    )


def _device(device: Device) -> core.Device:
    return core.Device(
        index=device.index,
        kind=device.kind,
        name=device.name,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        lost=device.lost,
        others=device.others,
    )


def _engine_refusal(kind: str, status: EngineStatus) -> str:
    if status.state in ("ready", "importing"):
        return ""
    return f"the engine {kind!r} is {status.state} there" + (f": {status.reason}" if status.reason else "")


def _report(report: InstanceReport, *, beside_host: bool) -> Report:
    return Report(
        instance=report.instance,
        alias=report.model.alias,
        key=key_of(report.model),
        state=report.state,
        reason=report.reason,
        permanent=report.permanent,
        ending=report.ending,
        devices=report.devices,
        memory_bytes=report.memory_bytes,
        held_bytes=report.device_bytes,
        host_bytes=report.pss_bytes if beside_host else 0,
        weights_bytes=report.weights_bytes,
        capacity=report.capacity,
        levels=report.sleep_levels,
        changed_at=report.changed_at,
        aside_s=sum(phase.seconds for phase in report.phases if phase.name in _FIRST_START_ONLY),
        slept_s=report.last_sleep.seconds if report.last_sleep else 0.0,
    )
