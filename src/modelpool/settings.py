"""Settings: defaults, then a YAML file, then the environment, then flags; parsed once, into frozen values.

An unknown key in the file, a value of the wrong type or out of range raises SettingsError with the value's path
(`worker.port` or the variable's name) and what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from modelpool.yaml_file import BadFile, read_struct

Port = Annotated[int, Meta(ge=0, le=65535)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0)]
SecondsOrNone = Annotated[float, Meta(ge=0)]
"""0: no limit."""


class SettingsError(Exception):
    """A setting that cannot be used. The message names it, its value and what is allowed."""


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    """They share the port, the limits, and what they know of the instances' load."""
    api_key: str = ""
    """Clients must send it once it is set. Needed for any address but loopback."""
    require_key: bool = False
    """Serve nobody without a key, also while none was made. Enough for an address beyond loopback."""
    insecure_no_auth: bool = False
    metrics_open: bool = False
    """Anybody may read `/metrics`, keys or not."""
    access_log_sample: Share = 0.0
    """Of how many requests a line is written; above 0 also of all that failed with 5xx."""
    request_log_sample: Share = 0.0
    """Of how many requests for a model the body is written, with lengths in place of texts."""
    request_log_content: bool = False
    """With the texts. Credentials are never written."""
    otlp_endpoint: str = ""
    """Where traces go: the base address of an OTLP receiver, by HTTP. Empty: no traces."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 64 << 20
    connect_timeout_s: Seconds = 5.0
    first_byte_timeout_s: SecondsOrNone = 600.0
    """What an instance may take until its answer begins: for a plain request that is all of its work."""
    between_bytes_timeout_s: SecondsOrNone = 120.0
    """How long an answer that has begun may stand still."""
    total_timeout_s: SecondsOrNone = 0.0
    responses_remembered: Annotated[int, Meta(ge=1)] = 10_000
    """Of how many stored responses it is known which instance made them. For others the instances are asked."""
    cors_allowed_origins: str = ""
    """Web pages whose scripts may use it: origins by comma, or `*`. Empty: only its own."""
    root_path: Annotated[str, Meta(pattern=r"^(/[A-Za-z0-9._~-]+)*\Z")] = ""
    """What stands before every path where a proxy in front says so: `/pool`. Paths without it are served as well."""
    max_ongoing_requests: Annotated[int, Meta(ge=1)] | None = None
    """Inference requests that one gateway process sends on at once. None: what its descriptors allow."""
    waiting_max_s: Annotated[float, Meta(ge=0)] = 300.0
    """How long a request may wait for a model that is on its way, or for its turn. 0: not at all.

    Long enough for a large model's weights from a disk, and half of what OpenAI's clients wait for an answer.
    """
    waiting_max_requests: Annotated[int, Meta(ge=0)] = 8192
    """So many may wait for one model."""
    waiting_max_bytes: Annotated[int, Meta(ge=0)] = 256 << 20
    """And their bodies may have this many bytes in all."""
    waiting_heartbeat_s: Seconds = 5.0
    """A stream that waits is sent a comment this often."""
    tls_cert_file: str = ""
    """Serve https with this certificate and its chain (PEM)."""
    tls_key_file: str = ""

    @property
    def scheme(self) -> str:
        return "https" if self.tls_cert_file else "http"

    @property
    def urls_elsewhere(self) -> tuple[str, ...]:
        """Where workers on other machines reach it; nowhere, when its address means this machine, or all of them."""
        try:
            address = ipaddress.ip_address(self.host)
            own = address.is_loopback or address.is_unspecified
        except ValueError:
            own = self.host in ("", "localhost")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return () if own or not self.port else (f"{self.scheme}://{host}:{self.port}",)


class ManagerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = ""
    """Listen on TCP too, for gateways and workers elsewhere. Empty: the control socket only."""
    port: Port = 9000
    heartbeat_timeout_s: Seconds = 60.0
    store_url: str = ""
    """`postgresql://…`, or `sqlite:///` and an absolute path. Empty: `modelpool.db` in `home`."""
    lease_s: Annotated[float, Meta(ge=1)] = 10.0
    """So long after it last reached the store a manager may give orders; another one waits as long for it."""
    recovery_s: Seconds = 10.0
    """How long a new manager waits for the workers it knew before it starts anything or tells the gateways."""
    backoff_initial_s: Seconds = 1.0
    backoff_max_s: Seconds = 60.0


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    worker_id: str = ""
    """Default: the host's name."""
    host: str = "127.0.0.1"
    port: Port = 7000
    manager_url: str = "http://127.0.0.1:8000"
    """A gateway, a manager's TCP address, or `unix:` and the path of a control socket."""
    public_url: str = ""
    """Where the manager and the gateways reach this worker, when not at its own address. Proxies everything."""
    port_range: str = ""
    """`low-high`: ports for engine hosts. Empty: any."""
    engines: str = "vllm,fake"
    """The engine kinds it offers, by comma. Their imports begin with the worker, where they are installed."""
    fake_devices: str = ""
    """`COUNTxGB`, such as `4x80`: declare this many GPUs instead of looking for devices. For tests."""
    cache_max_gb: Annotated[float, Meta(ge=0)] = 20.0
    """What engines have compiled is kept up to this size, in 10^9 bytes. Looked at when a worker starts."""
    spare_hosts: Annotated[int, Meta(ge=0, le=16)] = 1
    """Hosts of each engine kind that are forked ahead, and wait for a model."""
    heartbeat_interval_s: Seconds = 5.0
    fetch_timeout_s: Seconds = 3600.0
    start_timeout_s: Seconds = 600.0
    stall_timeout_s: Seconds = 30.0
    """A host that has not answered a probe for this long is ended."""
    drain_timeout_s: Seconds = 30.0
    wake_timeout_s: Seconds = 60.0
    """An instance that takes longer to wake, or to fall asleep once its requests have ended, is ended."""


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults for models that do not say."""

    instance_capacity: Annotated[int, Meta(ge=1)] | None = None
    min_replicas: Annotated[int, Meta(ge=0)] = 0
    max_replicas: Annotated[int, Meta(ge=1)] = 4
    load_high: Annotated[float, Meta(gt=0, le=10)] = 0.7
    """Load (in flight / capacity) above which another replica is brought up."""
    load_low: Annotated[float, Meta(ge=0, le=10)] = 0.3
    scale_interval_s: Seconds = 5.0
    """Load is an average over about this long."""
    cooldown_s: SecondsOrNone = 30.0
    """From a change for the load of one model until it may put a replica to sleep."""
    idle_sleep_1_s: SecondsOrNone = 300.0
    """Without a request for so long, an instance goes down to this level."""
    idle_sleep_2_s: SecondsOrNone = 900.0
    idle_unload_s: SecondsOrNone = 3600.0
    min_residence_s: SecondsOrNone = 10.0
    """What was brought up is not made to give way before this."""
    turn_max_s: Seconds = 30.0
    """A request waits no longer than this for a busy model that is in its way."""
    swaps_per_minute: Annotated[int, Meta(ge=1)] = 12
    """On one worker, to make room for others."""


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool on Ray."""

    ray_address: str = ""
    """The cluster to join. Empty: one is started on this machine."""
    working_dir: str = ""
    """A folder that Ray takes to every node and runs this code from. Empty: it is installed there."""
    ray_args: str = ""
    """More arguments for `ray start --head`, where one is started."""
    pin_manager: bool = False
    """The manager stays on the node that it was deployed from, because its store is a file there."""
    manager_concurrency: Annotated[int, Meta(ge=1)] = 1000
    """Calls that the manager actor takes at once; as many streams besides."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    home: str = "~/.modelpool"
    run_id: str = ""
    token: str = ""
    """The cluster token. Empty: read from `home`."""
    log_level: str = "info"
    tls_ca_file: str = ""
    """Who signed the gateways' certificates, where this machine does not know them: for workers and commands."""
    gateway: GatewaySettings = GatewaySettings()
    manager: ManagerSettings = ManagerSettings()
    worker: WorkerSettings = WorkerSettings()
    models: ModelSettings = ModelSettings()
    cluster: ClusterSettings = ClusterSettings()

    @property
    def home_path(self) -> Path:
        return Path(self.home).expanduser().absolute()

    @property
    def worker_id(self) -> str:
        return self.worker.worker_id or socket.gethostname()


# Where two names mean the same, the later one wins.
ENVIRONMENT: tuple[tuple[str, str], ...] = (
    ("MODELPOOL_HOME", "home"),
    ("MODELPOOL_RUN_ID", "run_id"),
    ("MODELPOOL_TOKEN", "token"),
    ("MODELPOOL_LOG_LEVEL", "log_level"),
    ("MODELPOOL_TLS_CA_FILE", "tls_ca_file"),
    ("ROUTER_HOST", "gateway.host"),
    ("SERVE_HOST", "gateway.host"),
    ("ROUTER_PORT", "gateway.port"),
    ("SERVE_PORT", "gateway.port"),
    ("MODELPOOL_GATEWAY_PROCESSES", "gateway.processes"),
    ("MODELPOOL_API_KEY", "gateway.api_key"),
    ("MODELPOOL_REQUIRE_KEY", "gateway.require_key"),
    ("MODELPOOL_INSECURE_NO_AUTH", "gateway.insecure_no_auth"),
    ("MODELPOOL_METRICS_OPEN", "gateway.metrics_open"),
    ("MODELPOOL_ACCESS_LOG_SAMPLE", "gateway.access_log_sample"),
    ("MODELPOOL_REQUEST_LOG_SAMPLE", "gateway.request_log_sample"),
    ("MODELPOOL_REQUEST_LOG_CONTENT", "gateway.request_log_content"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "gateway.otlp_endpoint"),
    ("MODELPOOL_MAX_BODY_BYTES", "gateway.max_body_bytes"),
    ("MODELPOOL_CONNECT_TIMEOUT", "gateway.connect_timeout_s"),
    ("MODELPOOL_FIRST_BYTE_TIMEOUT", "gateway.first_byte_timeout_s"),
    ("MODELPOOL_BETWEEN_BYTES_TIMEOUT", "gateway.between_bytes_timeout_s"),
    ("MODELPOOL_TOTAL_TIMEOUT", "gateway.total_timeout_s"),
    ("MODELPOOL_RESPONSES_REMEMBERED", "gateway.responses_remembered"),
    ("MODELPOOL_CORS_ALLOWED_ORIGINS", "gateway.cors_allowed_origins"),
    ("MODELPOOL_ROOT_PATH", "gateway.root_path"),
    ("SERVE_MAX_ONGOING_REQUESTS", "gateway.max_ongoing_requests"),
    ("MODELPOOL_WAITING_MAX", "gateway.waiting_max_s"),
    ("MODELPOOL_WAITING_MAX_REQUESTS", "gateway.waiting_max_requests"),
    ("MODELPOOL_WAITING_MAX_BYTES", "gateway.waiting_max_bytes"),
    ("MODELPOOL_WAITING_HEARTBEAT", "gateway.waiting_heartbeat_s"),
    ("MODELPOOL_TLS_CERT_FILE", "gateway.tls_cert_file"),
    ("MODELPOOL_TLS_KEY_FILE", "gateway.tls_key_file"),
    ("MANAGER_HOST", "manager.host"),
    ("MANAGER_PORT", "manager.port"),
    ("MODELPOOL_HEARTBEAT_TIMEOUT", "manager.heartbeat_timeout_s"),
    ("MODELPOOL_STORE_URL", "manager.store_url"),
    ("MODELPOOL_LEASE", "manager.lease_s"),
    ("MODELPOOL_RECOVERY", "manager.recovery_s"),
    ("MODELPOOL_BACKOFF_INITIAL", "manager.backoff_initial_s"),
    ("MODELPOOL_BACKOFF_MAX", "manager.backoff_max_s"),
    ("WORKER_ID", "worker.worker_id"),
    ("WORKER_HOST", "worker.host"),
    ("WORKER_PORT", "worker.port"),
    ("MANAGER_URL", "worker.manager_url"),
    ("PUBLIC_URL", "worker.public_url"),
    ("WORKER_PORT_RANGE", "worker.port_range"),
    ("MODELPOOL_ENGINES", "worker.engines"),
    ("MODELPOOL_FAKE_DEVICES", "worker.fake_devices"),
    ("MODELPOOL_CACHE_MAX_GB", "worker.cache_max_gb"),
    ("MODELPOOL_SPARE_HOSTS", "worker.spare_hosts"),
    ("MODELPOOL_HEARTBEAT_INTERVAL", "worker.heartbeat_interval_s"),
    ("MODELPOOL_FETCH_TIMEOUT", "worker.fetch_timeout_s"),
    ("MODELPOOL_START_TIMEOUT", "worker.start_timeout_s"),
    ("MODELPOOL_STALL_TIMEOUT", "worker.stall_timeout_s"),
    ("MODELPOOL_DRAIN_TIMEOUT", "worker.drain_timeout_s"),
    ("MODELPOOL_WAKE_TIMEOUT", "worker.wake_timeout_s"),
    ("RAY_ADDRESS", "cluster.ray_address"),
    ("RAY_WORKING_DIR", "cluster.working_dir"),
    ("MODELPOOL_RAY_ARGS", "cluster.ray_args"),
    ("MODELPOOL_PIN_MANAGER", "cluster.pin_manager"),
    ("MODELPOOL_MANAGER_CONCURRENCY", "cluster.manager_concurrency"),
    ("MODEL_INSTANCE_CAPACITY", "models.instance_capacity"),
    ("MODEL_MIN_REPLICAS", "models.min_replicas"),
    ("MODEL_MAX_REPLICAS", "models.max_replicas"),
    ("MODEL_LOAD_HIGH", "models.load_high"),
    ("MODEL_LOAD_LOW", "models.load_low"),
    ("MODEL_SCALE_INTERVAL", "models.scale_interval_s"),
    ("MODEL_COOLDOWN", "models.cooldown_s"),
    ("MODEL_IDLE_SLEEP_1", "models.idle_sleep_1_s"),
    ("MODEL_IDLE_SLEEP_2", "models.idle_sleep_2_s"),
    ("MODEL_IDLE_UNLOAD", "models.idle_unload_s"),
    ("MODEL_MIN_RESIDENCE", "models.min_residence_s"),
    ("MODEL_TURN_MAX", "models.turn_max_s"),
    ("MODEL_SWAPS_PER_MINUTE", "models.swaps_per_minute"),
)


def load(environ: Mapping[str, str], *, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `file` (or `MODELPOOL_CONFIG`), `environ`, and `flags` (dotted paths; None means not given)."""
    if file is None and environ.get("MODELPOOL_CONFIG"):
        file = Path(environ["MODELPOOL_CONFIG"])
    return over(_from_file(file) if file is not None else Settings(), environ, flags)


def over(settings: Settings, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Settings:
    """These settings, but for what `environ` and `flags` say."""
    for variable, path in ENVIRONMENT:
        if environ.get(variable):
            settings = _replace(settings, path, environ[variable], source=variable)
    for path, value in (flags or {}).items():
        if value is not None:
            settings = _replace(settings, path, value, source=path)
    return settings


def to_environ(settings: Settings) -> dict[str, str]:
    """The variables that make `load` give these settings again: how a parent hands them to its children."""
    variables: dict[str, str] = {}
    for variable, path in ENVIRONMENT:
        value = _get(settings, path)
        if value is not None and value != "":
            variables[variable] = str(value).lower() if isinstance(value, bool) else str(value)
    return variables


def given(settings: Settings) -> dict[str, Any]:
    """What of these settings is not the default, as in a file."""
    return _differing(msgspec.to_builtins(settings), msgspec.to_builtins(Settings()))


def _differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _differing(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def pool_url(text: str) -> str:
    """A pool's address as people write it, as a base URL: `host:8000` gets its scheme, a final `/` or `/v1` is cut."""
    if text.startswith("unix:"):
        return text
    url = text.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"


def _from_file(file: Path) -> Settings:
    try:
        return read_struct(file, Settings)
    except BadFile as error:
        raise SettingsError(str(error)) from error


def _replace(settings: Settings, path: str, value: Any, *, source: str) -> Settings:
    """`settings` with the value at a dotted path; text is converted (`strict=False`), ranges are checked."""
    raw = msgspec.to_builtins(settings)
    *parents, leaf = path.split(".")
    target = raw
    for part in parents:
        if not isinstance(target.get(part), dict):
            raise SettingsError(f"{source}: there is no setting {path}")
        target = target[part]
    target[leaf] = value
    try:
        return msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).rsplit(" - at ", 1)[0]
        raise SettingsError(f"{source}={value!r}: {reason}") from error


def _get(settings: Settings, path: str) -> Any:
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


def from_environment() -> Settings:
    """`load` for a process of ours that a parent started."""
    return load(os.environ)
