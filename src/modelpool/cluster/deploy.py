"""`modelpool deploy` and `undeploy`: the pool on a Ray cluster, as a whole."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelpool.cluster import APPLICATION, MANAGER, NAMESPACE
from modelpool.cluster.actor import STREAMS, ManagerActor
from modelpool.cluster.code import deployed_code
from modelpool.cluster.gateway import GATEWAYS
from modelpool.cluster.gateways import end_left_behind
from modelpool.cluster.head import address_of_head, end_head, remember_head, start_head
from modelpool.cluster.nodes import live_nodes
from modelpool.gateway.auth import check_exposure
from modelpool.home import AlreadyRunning, Home
from modelpool.manager.store import StoreError, reach_store
from modelpool.messages.cluster import Deployment, deployed_run_id, encode_deployment
from modelpool.pool_address import address_file, local_address
from modelpool.process import StartupError
from modelpool.settings import Settings

_MANAGER_S = 90.0
_CONNECT_S = 5.0
_ASIDE_S = 10.0
_POLL_S = 0.1


def deploy(settings: Settings) -> str:
    """Bring the pool up on the cluster, or bring it to these settings and this code; where this node's gateway serves.

    Raises StartupError.
    """
    check_exposure(settings.gateway)
    code = deployed_code(settings.cluster.working_dir)
    home = Home(settings.home_path)
    with _alone(home), _connected(settings, home, start=True):
        # What Ray was started with is no part of what is deployed.
        settings = msgspec.structs.replace(
            settings,
            home=str(home.path),
            token=settings.token or home.cluster_token(),
            cluster=msgspec.structs.replace(settings.cluster, ray_args=""),
        )
        _check_store(settings)
        deployment = _create_manager(Deployment(settings, home.admin_key(), code))
        _await_manager()
        serve.start(proxy_location="Disabled")
        try:
            serve.run(
                GATEWAYS.options(num_replicas=live_nodes(), version=_version(deployment), _internal=True).bind(
                    deployment
                ),
                name=APPLICATION,
                route_prefix=None,
                external_scaler_enabled=True,
            )
        except (RuntimeError, RayError) as error:
            raise StartupError(f"The gateways cannot be started: {_gateway_trouble() or error}") from error
    address = local_address(settings)
    return address.url if address else ""


def undeploy(settings: Settings) -> None:
    """Take all of it down: gateways, manager, and Ray where `deploy` started it. Workers and the store stay.

    Raises StartupError where the cluster that RAY_ADDRESS names cannot be reached.
    """
    home = Home(settings.home_path)
    with _alone(home):
        try:
            if settings.cluster.ray_address or address_of_head(home):
                with _connected(settings, home, start=False):
                    serve.delete(APPLICATION)
                    if not serve.status().applications:
                        serve.shutdown()
                    with suppress(ValueError):
                        ray.kill(ray.get_actor(MANAGER, NAMESPACE))
        except StartupError:
            if settings.cluster.ray_address:
                raise  # where it is our own Ray that is broken, that ends here all the same
        end_head(home)
        end_left_behind(home)
        home.give_back()
        address_file(settings).unlink(missing_ok=True)


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Of two at once each would take the other's Ray for one that was left behind. Raises StartupError."""
    try:
        with home.lock("deploy"):
            yield
    except AlreadyRunning as error:
        raise StartupError(
            f"Another `deploy` or `undeploy` of {home.path} is under way (process {error.pid or 'unknown'}).",
            "Wait for its end, or end it.",
        ) from error


@contextmanager
def _connected(settings: Settings, home: Home, *, start: bool) -> Iterator[None]:
    """As a driver of the cluster that RAY_ADDRESS names, or of the one of this home, which is started if it must."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address := settings.cluster.ray_address:
        _join(address, settings)
    else:
        _join_own(settings, home, start=start)
    try:
        yield
    finally:
        ray.shutdown()


def _join_own(settings: Settings, home: Home, *, start: bool) -> None:
    """The Ray that was started for this home. One that lost its head is ended, and started anew."""
    if address := address_of_head(home):
        try:
            _join(address, settings)
            return
        except StartupError:
            if not start:
                raise
    end_head(home)
    start_head(home, settings.cluster.ray_args)
    address = address_of_head(home)
    remember_head(home, address)
    _join(address, settings)


def _join(address: str, settings: Settings) -> None:
    """Raises StartupError."""
    working_dir = settings.cluster.working_dir
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"working_dir": working_dir} if working_dir else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise StartupError(f"Ray cannot be reached at {address}: {error}", "RAY_ADDRESS names the cluster.") from error


def _check_reachable(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def _check_store(settings: Settings) -> None:
    """Raises StartupError where a manager, also one that is started again elsewhere, would not find its store."""
    if live_nodes() > 1 and _store_is_a_file(settings) and not settings.cluster.pin_manager:
        raise StartupError(
            "The cluster has several nodes, and the store is a file on this one, which a manager that is started "
            "again elsewhere would not find.",
            "Name a PostgreSQL with MODELPOOL_STORE_URL, or keep the manager on this node with --pin-manager "
            "(MODELPOOL_PIN_MANAGER).",
        )
    url = settings.manager.store_url
    if url and not url.startswith("sqlite:"):
        _await_store(url)


def _await_store(url: str) -> None:
    """So that a manager which runs gives way to none that cannot start. Where none runs, the store may still be coming.

    Raises StartupError.
    """
    deadline = time.monotonic() + (0.0 if _manager_is_there() else _MANAGER_S)
    while True:
        try:
            asyncio.run(reach_store(url))
            return
        except StoreError as error:
            if time.monotonic() > deadline:
                raise StartupError(f"{error} Nothing was changed.", "MODELPOOL_STORE_URL names the store.") from error
        time.sleep(_POLL_S)


def _manager_is_there() -> bool:
    try:
        ray.get_actor(MANAGER, NAMESPACE)
    except ValueError:
        return False
    return True


def _store_is_a_file(settings: Settings) -> bool:
    return not settings.manager.store_url.startswith(("postgres://", "postgresql://"))


def _create_manager(wanted: Deployment) -> bytes:
    """The actor, unless there is one with this deployment already. Where its store is a file, it stays on this node.

    What was deployed in the end: a pool that runs keeps its run id.
    """
    with suppress(ValueError):
        actor = ray.get_actor(MANAGER, NAMESPACE)
        deployed = _deployed(actor)
        settings = msgspec.structs.replace(wanted.settings, run_id=deployed_run_id(deployed))
        wanted = msgspec.structs.replace(wanted, settings=settings)
        if deployed == encode_deployment(wanted):
            return deployed
        # One of an earlier version, or of a node that does not answer, may not be able to.
        with suppress(AttributeError, RayError):
            ray.get(actor.step_aside.remote(), timeout=_ASIDE_S)
        ray.kill(actor)
        _await_gone()
    deployment = encode_deployment(wanted)
    settings = wanted.settings
    pinned = settings.cluster.pin_manager or _store_is_a_file(settings)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    concurrency = settings.cluster.manager_concurrency
    kind = ray.remote(concurrency_groups={STREAMS: concurrency})(ManagerActor)
    kind.options(
        name=MANAGER,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=concurrency,
        scheduling_strategy=here if pinned else None,
    ).remote(deployment)
    return deployment


def _deployed(actor: ActorHandle[Any]) -> bytes:
    """What it was made with, once it is there: Ray may still have to find its node dead, and to start it again.

    Raises StartupError.
    """
    deadline = time.monotonic() + _MANAGER_S
    while True:
        try:
            deployed: bytes = ray.get(actor.deployed.remote(), timeout=_MANAGER_S)
            return deployed
        except RayError as error:
            if time.monotonic() > deadline:
                raise StartupError(f"The manager actor does not answer: {error}") from error
        time.sleep(_POLL_S)


def _await_gone() -> None:
    """Wait until the name is free again."""
    deadline = time.monotonic() + _MANAGER_S
    while _manager_is_there() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _await_manager() -> None:
    """Raises StartupError with what keeps the manager from starting."""
    actor = ray.get_actor(MANAGER, NAMESPACE)
    deadline = time.monotonic() + _MANAGER_S
    while True:
        try:
            health: dict[str, str] = ray.get(actor.health.remote(), timeout=_MANAGER_S)
        except RayError as error:
            raise StartupError(f"The manager actor cannot be started: {error}") from error
        if health["status"] == "ok":
            return
        if time.monotonic() > deadline:
            raise StartupError(f"The manager cannot start: {health['reason']}")
        time.sleep(_POLL_S)


def _version(deployment: bytes) -> str:
    """Without one of ours Ray Serve takes every deployment for a new version, and starts all replicas anew."""
    return hashlib.sha256(deployment).hexdigest()[:16]


def _gateway_trouble() -> str:
    """What Ray Serve says of the deployment that does not come up."""
    application = serve.status().applications.get(APPLICATION)
    return "; ".join(each.message for each in application.deployments.values()) if application else ""
