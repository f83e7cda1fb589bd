"""Worker ↔ forkserver ↔ engine host, over socket pairs. JSON throughout.

Forkserver (`python -m modelpool.engines.forkserver --fd N --engine vllm|fake`): SOCK_SEQPACKET, one message a packet.

    worker → forkserver   Fork (with one descriptor: the host's end of its control socket), Adopt
    forkserver → worker   Imported | ImportFailed (once), Forked, Exited

Host: SOCK_STREAM, one message a line.

    worker → host         HostSpec (first, once), Probe, Drain, Sleep, Wake, Shutdown
    host → worker         Loading, Loaded | LoadFailed (once), HostStatus (an answer to each Probe), and to each of
                          Drain: Drained | SleepRefused, Sleep: Slept | SleepRefused | SleepFailed,
                          Wake: Woken | WakeFailed; one such order at a time

End of file means the other side is gone. A host then ends its whole process group; a forkserver kills the group of
every host that it forked or adopted, and ends; a worker kills the host's group, or starts a new forkserver and has it
adopt the hosts that still run.
"""

from __future__ import annotations

import msgspec

from modelpool.messages.models import ModelSpec


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Fork a host. The packet carries the descriptor of its control socket, which ends if there can be no fork."""

    instance: str


class Adopt(msgspec.Struct, frozen=True, tag="adopt"):
    """Hosts of an earlier forkserver: their groups end with this worker too."""

    pids: tuple[int, ...]


class Imported(msgspec.Struct, frozen=True, tag="imported"):
    seconds: float


class ImportFailed(msgspec.Struct, frozen=True, tag="import_failed"):
    """`reason` is one line for people. `missing`: the engine is not installed, as against broken."""

    reason: str
    missing: bool = False


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    instance: str
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """A host ended and its process group was killed. `status` as in `os.waitstatus_to_exitcode` (-9: SIGKILL).

    None for an adopted host: only a parent learns the status.
    """

    pid: int
    status: int | None


ToForkserver = Fork | Adopt
FromForkserver = Imported | ImportFailed | Forked | Exited


class HostSpec(msgspec.Struct, frozen=True, kw_only=True, tag="host_spec"):
    """All that a host needs to know; a forked child inherits nothing of the worker's environment.

    `model_path` is a local folder by now. `env` holds every variable to set (devices, `VLLM_*`, `HF_TOKEN`, ports).
    `bind` and `ports`: the address to listen on; ports (0, 0) mean any free one, else the first free one of the range,
    both ends included. `token`: what `Authorization: Bearer` must carry. `memory_bytes`: this instance's share of each
    of its devices, 0 for the engine's own default.
    """

    instance: str
    model: ModelSpec
    model_path: str
    token: str
    bind: str
    ports: tuple[int, int]
    env: dict[str, str]
    cwd: str
    log_path: str
    device_kind: str
    devices: tuple[int, ...]
    memory_bytes: int
    capacity: int | None = None
    """Overrides what the engine says it can run at once (`MODEL_INSTANCE_CAPACITY`)."""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    pass


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Take no new requests (503 `instance_draining`), let those in flight end for up to `drain_s`, then end."""

    drain_s: float


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take no new requests (503 `instance_draining`), and let those in flight end for up to `drain_s`: then sleep.

    Where they do not end, it goes on as before.
    """

    drain_s: float


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Give memory back: at level 1 the KV cache (on an accelerator the weights move to host memory), at 2 all.

    From awake, after a drain, or from level 1.
    """

    level: int


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Take the memory again, check with the canary that the model is what it was, and take requests."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    phase: str


class StartPhase(msgspec.Struct, frozen=True):
    """A part of a start, and how long it took."""

    name: str
    seconds: float


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The host listens. `capacity`: requests it runs at once. `phases`: where the time went, in their order.

    `sleep_levels`: those its engine has; empty for one that can only be ended. `weights_bytes`: of all its weights.
    """

    port: int
    capacity: int
    sleep_levels: tuple[int, ...] = ()
    weights_bytes: int = 0
    phases: tuple[StartPhase, ...] = ()
    max_model_len: int | None = None
    num_gpu_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """`reason` is the real one, in a line or two, never a stack trace (that is in the log).

    `permanent`: the same registration will fail in the same way each time.
    """

    reason: str
    permanent: bool = False


class HostStatus(msgspec.Struct, frozen=True, kw_only=True, tag="host_status"):
    """Counted in the host's ASGI wrapper, whatever way the requests came. Times in seconds."""

    inflight: int
    requests_total: int
    ttft_last: float | None = None
    ttft_avg: float | None = None
    e2e_last: float | None = None
    e2e_avg: float | None = None
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float | None = None
    draining: bool = False


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """Nothing is in flight any more, after so many seconds, and nothing new is taken."""

    seconds: float


class Slept(msgspec.Struct, frozen=True, kw_only=True, tag="slept"):
    """It sleeps. `freed_bytes`: what the engine says it gave back; 0 where it cannot tell."""

    level: int
    seconds: float
    freed_bytes: int = 0


class SleepRefused(msgspec.Struct, frozen=True, tag="sleep_refused"):
    """It stays as it was, and takes requests if it did: they would not end, or a wake could not be checked."""

    reason: str


class SleepFailed(msgspec.Struct, frozen=True, tag="sleep_failed"):
    """It is of no use any more, and ends."""

    reason: str


class Woken(msgspec.Struct, frozen=True, kw_only=True, tag="woken"):
    """It takes requests. `seconds` include `canary_s`, the check that the model is what it was."""

    level: int
    """The one it slept at."""
    seconds: float
    canary_s: float


class WakeFailed(msgspec.Struct, frozen=True, tag="wake_failed"):
    """It is of no use any more, and ends. It took no request."""

    reason: str


ToHost = HostSpec | Probe | Drain | Sleep | Wake | Shutdown
FromHost = (
    Loading | Loaded | LoadFailed | HostStatus | Drained | Slept | SleepRefused | SleepFailed | Woken | WakeFailed
)
