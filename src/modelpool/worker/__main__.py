"""`python -m modelpool.worker`: the worker of this machine as a process."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from urllib.parse import quote

import uvloop
from msgspec import structs

from modelpool import __version__, process
from modelpool.control_http import Server, bind_tcp
from modelpool.home import AlreadyRunning, Home
from modelpool.messages.models import EngineKind
from modelpool.messages.workers import WorkerDescription, WorkerInfo
from modelpool.process_group import reap
from modelpool.settings import Settings, SettingsError, from_environment, pool_url
from modelpool.tls import client_context
from modelpool.worker.address import hosts_bind, local_host, reachable_host, url_of
from modelpool.worker.compile_cache import cache_environment, prune
from modelpool.worker.devices import GB, find_devices
from modelpool.worker.fence import Fence
from modelpool.worker.forkserver import Forkserver
from modelpool.worker.host_spec import TAG, forkserver_environment
from modelpool.worker.hub import Hub
from modelpool.worker.instance_log import InstanceLog
from modelpool.worker.launcher import HostPlace, Launcher, Limits
from modelpool.worker.ports import port_range
from modelpool.worker.proxy import running_proxy
from modelpool.worker.registration import Registration
from modelpool.worker.service import worker_app
from modelpool.worker.supervisor import Supervisor, running_supervisor
from modelpool.worker_url import is_worker_url

log = logging.getLogger(__name__)

_END_DRAIN_S = 5.0
"""How long requests in flight may go on when the worker ends."""
_NO_VLLM = "vLLM is not installed in the worker's Python; `pip install 'modelpool[cpu]'`, or `[gpu]`"


def main() -> int:
    """The worker as a child of `modelpool up`, which is told why it cannot start."""
    try:
        return process.DISMISSED if run(from_environment()) else 0
    except process.StartupError as error:
        return _not_started(error.reason, error.hint)
    except (SettingsError, OSError) as error:
        return _not_started(str(error), "")


def run(settings: Settings) -> bool:
    """Be the worker of this machine until a signal, or until it is drained: True. Raises StartupError, OSError."""
    process.enter("worker", log_level=settings.log_level)
    url = pool_url(settings.worker.manager_url)
    settings = structs.replace(settings, worker=structs.replace(settings.worker, manager_url=url))
    home = Home(settings.home_path)
    try:
        with home.lock(f"worker-{settings.worker_id}"):
            return uvloop.run(_until_signal(settings, home))
    except AlreadyRunning as error:
        hint = "End it first, or give this one another name: --worker-id, WORKER_ID."
        raise process.StartupError(f"{error} in the home {home.path}.", hint) from error


def _not_started(reason: str, hint: str) -> int:
    log.error("cannot start: %s", " ".join(filter(None, (reason, hint))))
    process.announce(process.NotStarted(reason, hint))
    return 1


async def _until_signal(settings: Settings, home: Home) -> bool:
    """Serve until SIGTERM or SIGINT, then end in order; at the second signal, at once. True: it was dismissed."""
    ending, dismissed = asyncio.Event(), asyncio.Event()

    def dismiss() -> None:
        log.info("this worker is drained")
        dismissed.set()
        ending.set()

    serving = asyncio.current_task()
    assert serving is not None

    def on_signal() -> None:
        if ending.is_set():
            log.warning("ending at once")
            serving.cancel()
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        await serve(settings, home, ending, dismiss)
    except asyncio.CancelledError:
        if not ending.is_set():
            raise
    return dismissed.is_set()


async def serve(settings: Settings, home: Home, ending: asyncio.Event, dismiss: Callable[[], None]) -> None:
    """Serve until `ending` is set. Then no instance and no forkserver is left. `dismiss`: the manager says so."""
    worker = settings.worker
    token = settings.token or home.cluster_token()
    tag = f"{home.path}:{settings.worker_id}"
    ports = port_range(worker.port_range)
    declared = home.run / f"fake-devices-{quote(settings.worker_id, safe='')}"
    devices = await asyncio.to_thread(find_devices, worker.fake_devices, os.environ, declared)
    if left := await asyncio.to_thread(reap, TAG, tag):
        log.warning("killed what an earlier worker left behind: processes %s", left)
    if removed := await asyncio.to_thread(prune, home.cache, int(worker.cache_max_gb * GB)):
        log.info("%.1f GB of what engines had compiled were removed (MODELPOOL_CACHE_MAX_GB)", removed / GB)
    async with AsyncExitStack() as stack:
        flag = "--worker-port" if os.environ.get(process.READY_FD) else "--port"  # `up` has a port of its own
        sock = stack.enter_context(bind_tcp(worker.host, worker.port, flag=flag, variable="WORKER_PORT"))
        info = worker_info(settings, sock.getsockname()[1])
        place = host_place(settings, home, token, ports)
        changed = asyncio.Event()
        forkservers = make_forkservers(settings, home, tag, changed)
        log_of = instance_logs(settings, home)
        hub = Hub(
            environ={**os.environ, TAG: tag},
            timeout_s=worker.fetch_timeout_s,
            log_path=home.logs / f"fetch-{quote(settings.worker_id, safe='')}.log",
        )
        limits = Limits(start_s=worker.start_timeout_s, stall_s=worker.stall_timeout_s, wake_s=worker.wake_timeout_s)
        supervisor = Supervisor(
            Launcher(forkservers=forkservers, hub=hub, place=place, devices=devices, limits=limits, log_of=log_of),
            forkservers=forkservers,
            devices=devices,
            log_of=log_of,
            drain_s=worker.drain_timeout_s,
            changed=changed,
        )
        describe = describer(supervisor, hub, info)
        proxy = await stack.enter_async_context(
            running_proxy(supervisor, token=token, max_body_bytes=settings.gateway.max_body_bytes)
        )
        gone = asyncio.Event()
        fence = Fence(lambda: bool(supervisor.reports()))
        app = worker_app(
            supervisor, describe=describe, proxy=proxy, fence=fence, token=token, ending=gone, dismiss=dismiss
        )
        registration = Registration(
            manager_url=worker.manager_url,
            token=token,
            info=info,
            describe=describe,
            changed=changed,
            fence=fence,
            interval_s=worker.heartbeat_interval_s,
            trusted=client_context(settings.tls_ca_file),
        )
        await _run(Server(app), sock, supervisor, registration, ending, gone, info.url)


async def _run(
    server: Server,
    sock: socket.socket,
    supervisor: Supervisor,
    registration: Registration,
    ending: asyncio.Event,
    gone: asyncio.Event,
    url: str,
) -> None:
    async with asyncio.TaskGroup() as tasks:
        sock.listen(1024)  # from here on a connection is queued, so it is safe to say that we are ready
        serving = tasks.create_task(server.serve([sock]), name="http")
        async with running_supervisor(supervisor, _END_DRAIN_S):
            registering = tasks.create_task(registration.run(), name="registration")
            process.announce(process.Ready(url))
            log.info("serving at %s", url)
            await ending.wait()
            log.info("ending; requests in flight have up to %g s, a second signal ends at once", _END_DRAIN_S)
            registering.cancel()
            supervisor.take_no_more_orders()
            await registration.unregister()
        gone.set()
        server.should_exit = True
        await serving


def worker_info(settings: Settings, port: int) -> WorkerInfo:
    """Who this worker is; `port` is the one it listens on. Raises StartupError for a public URL of no use."""
    worker = settings.worker
    if worker.public_url and not is_worker_url(worker.public_url):
        raise process.StartupError(
            f"The public URL {worker.public_url!r} cannot be used.",
            "Set PUBLIC_URL to http://host:port, or http://host where the port is 80.",
        )
    return WorkerInfo(
        worker_id=settings.worker_id,
        incarnation=uuid.uuid4().hex,
        url=worker.public_url.rstrip("/") or url_of(reachable_host(worker.host, worker.manager_url), port),
        direct=not worker.public_url,
        version=__version__,
        run_id=settings.run_id,
    )


def host_place(settings: Settings, home: Home, token: str, ports: tuple[int, int]) -> HostPlace:
    worker = settings.worker
    bind = hosts_bind(worker.host, direct=not worker.public_url)
    return HostPlace(
        token=token,
        bind=bind,
        reached_here=local_host(bind),
        announced=reachable_host(bind, worker.manager_url),
        ports=ports,
        cwd=str(home.run),
        capacity=settings.models.instance_capacity,
        environ=os.environ,
    )


def make_forkservers(
    settings: Settings, home: Home, tag: str, changed: asyncio.Event
) -> Mapping[EngineKind, Forkserver]:
    """One for each engine kind; that of vLLM is started at once, since its imports take long."""
    environment = forkserver_environment(os.environ, tag=tag, run_id=settings.run_id)
    environment |= cache_environment(home.cache, os.environ)

    def make(kind: EngineKind, *, lazy: bool, missing: str = "") -> Forkserver:
        log_path = home.logs / f"forkserver-{quote(settings.worker_id, safe='')}-{kind}.log"
        return Forkserver(
            kind,
            environment=environment,
            log_path=log_path,
            changed=changed.set,
            spares=settings.worker.spare_hosts,
            lazy=lazy,
            missing=missing,
        )

    offered = offered_engines(settings.worker.engines)
    absent = dict.fromkeys(set(EngineKind) - offered, f"MODELPOOL_ENGINES={settings.worker.engines} leaves it out")
    # Found, not imported: that is for the forkserver.
    if EngineKind.VLLM in offered and not importlib.util.find_spec("vllm"):
        absent[EngineKind.VLLM] = _NO_VLLM
    return {kind: make(kind, lazy=kind is EngineKind.FAKE, missing=absent.get(kind, "")) for kind in EngineKind}


def offered_engines(names: str) -> set[EngineKind]:
    """The engine kinds of a comma-separated list. Raises StartupError for an unknown one."""
    try:
        return {EngineKind(name.strip()) for name in names.split(",") if name.strip()}
    except ValueError as error:
        known = ", ".join(EngineKind)
        reason = f"MODELPOOL_ENGINES={names!r} names an engine that there is not."
        raise process.StartupError(reason, f"Allowed, by comma: {known}.") from error


def instance_logs(settings: Settings, home: Home) -> Callable[[str], InstanceLog]:
    return lambda name: InstanceLog(home.instance_log(settings.worker_id, name))


def describer(supervisor: Supervisor, hub: Hub, info: WorkerInfo) -> Callable[[], Awaitable[WorkerDescription]]:
    async def describe() -> WorkerDescription:
        files = await hub.models_here()
        instances = supervisor.reports()
        # Devices last: they show what those who have ended gave back. What changes meanwhile is told right after.
        reading = await supervisor.reading()
        return WorkerDescription(
            info=info,
            devices=reading.devices,
            host=reading.host,
            files=files,
            engines=supervisor.engines(),
            instances=instances,
        )

    return describe


if __name__ == "__main__":
    sys.exit(main())
