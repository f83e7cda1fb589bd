"""Worker ↔ forkserver ↔ engine host, over socket pairs. JSON throughout.

Forkserver (`python -m modelpool.engines.forkserver --fd N --engine vllm|fake`): SOCK_SEQPACKET, one message a packet.

    worker → forkserver   Fork (with one descriptor: the host's end of its control socket), Adopt
    forkserver → worker   Imported | ImportFailed (once), Forked, Exited

Host: SOCK_STREAM, one message a line.

    worker → host         HostSpec (first, once), Probe, Shutdown
    host → worker         Loading, Loaded | LoadFailed (once), HostStatus (an answer to each Probe)

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


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    phase: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The host listens. `capacity`: requests it runs at once."""

    port: int
    capacity: int
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


ToHost = HostSpec | Probe | Shutdown
FromHost = Loading | Loaded | LoadFailed | HostStatus
