"""What starts a pool's processes: `up`, `deploy` and `undeploy`, `worker`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from modelpool.cli.command import program
from modelpool.cli.options import ConfigOption, JsonOption, settings_of
from modelpool.cli.output import fail, show
from modelpool.cli.screen import JsonLines, Terminal
from modelpool.home import AlreadyRunning, Home
from modelpool.pool_address import PoolAddress, local_address
from modelpool.process import StartupError
from modelpool.settings import Settings, to_environ

ApiKeyOption = Annotated[str | None, typer.Option(help="What clients must send. Needed beyond loopback.")]
RequireKeyOption = Annotated[bool, typer.Option("--require-key", help="Serve nobody without a key.")]
OpenlyOption = Annotated[bool, typer.Option("--insecure-no-auth", help="Serve beyond loopback openly.")]


def up(
    host: Annotated[str | None, typer.Option(help="The gateway's address.")] = None,
    port: Annotated[int | None, typer.Option(help="The gateway's port; 0 for any free one.")] = None,
    worker_host: Annotated[str | None, typer.Option(help="The worker's address.")] = None,
    gateway_processes: Annotated[int | None, typer.Option(help="Gateway processes that share the port.")] = None,
    worker_port: Annotated[int | None, typer.Option(help="The worker's port; 0 for any free one.")] = None,
    manager_host: Annotated[
        str | None, typer.Option(help="Let the manager listen on TCP too, at this address.")
    ] = None,
    manager_port: Annotated[int | None, typer.Option(help="The manager's TCP port.")] = None,
    api_key: ApiKeyOption = None,
    require_key: RequireKeyOption = False,
    insecure_no_auth: OpenlyOption = False,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="Leave the demo model out.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Start gateway, manager and one worker on this machine; end them all on Ctrl-C."""
    from modelpool.cli.up import run_pool

    settings = settings_of(
        config,
        {
            **_gateway_flags(host, port, gateway_processes, api_key, require_key, insecure_no_auth),
            "manager.host": manager_host,
            "manager.port": manager_port,
            "worker.host": worker_host,
            "worker.port": worker_port,
        },
    )
    screen = JsonLines(lambda line: print(line, flush=True)) if json else Terminal(Console())
    try:
        asyncio.run(run_pool(settings, screen, with_demo=not no_demo))
    except (StartupError, AlreadyRunning, OSError, ExceptionGroup) as raised:
        screen.close()
        _say_why(_leaf(raised), settings)
        raise
    finally:
        screen.close()


def _say_why(error: BaseException, settings: Settings) -> None:
    """End the command with why no pool runs; return where the error is none that its user could do something about."""
    if isinstance(error, StartupError):
        fail(str(error), error.hint)
    if isinstance(error, AlreadyRunning):
        end = f"; `kill {error.pid}` ends it" if error.pid else ""
        fail(
            f"{error} in the home {settings.home_path}",
            f"`{program()} status` shows the pool{end}; MODELPOOL_HOME names another home.",
        )
    if isinstance(error, OSError):
        fail(str(error), "docs/operations.md lists what a pool needs.")


def _leaf(error: BaseException) -> BaseException:
    """The first error inside a group, or group of groups; the error itself where it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def deploy(
    host: Annotated[str | None, typer.Option(help="The gateways' address, on every node.")] = None,
    port: Annotated[int | None, typer.Option(help="The gateways' port.")] = None,
    gateway_processes: Annotated[int | None, typer.Option(help="Gateway processes on every node.")] = None,
    api_key: ApiKeyOption = None,
    require_key: RequireKeyOption = False,
    insecure_no_auth: OpenlyOption = False,
    ray_address: Annotated[str | None, typer.Option(help="The cluster; one is started here if not given.")] = None,
    ray_args: Annotated[str | None, typer.Option(help="More arguments for `ray start --head`.")] = None,
    working_dir: Annotated[
        str | None, typer.Option(help="A folder with this code that Ray takes to the nodes.")
    ] = None,
    pin_manager: Annotated[
        bool, typer.Option("--pin-manager", help="Keep the manager on this node, where its store is.")
    ] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the pool up on a Ray cluster, or bring it to these settings: a manager, and a gateway on every node."""
    settings = settings_of(
        config,
        {
            **_gateway_flags(host, port, gateway_processes, api_key, require_key, insecure_no_auth),
            "cluster.ray_address": ray_address,
            "cluster.ray_args": ray_args,
            "cluster.working_dir": working_dir,
            "cluster.pin_manager": pin_manager or None,
        },
    )
    with _on_ray():
        from modelpool.cluster import deploy as cluster

        url = cluster.deploy(settings)
    show({"url": url, "run_id": settings.run_id}, json, lambda: f"Model Pool serves at [bold]{url}/v1[/] on Ray")


def undeploy(
    ray_address: Annotated[str | None, typer.Option(help="The cluster; the one of this machine if not given.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Take the pool off its Ray cluster, and end Ray where `deploy` started it. Workers and registrations stay."""
    settings = settings_of(config, {"cluster.ray_address": ray_address})
    with _on_ray():
        from modelpool.cluster import deploy as cluster

        cluster.undeploy(settings)
    show({"undeployed": True}, json, lambda: "Nothing of the pool is left on Ray; workers go on by themselves.")


@contextmanager
def _on_ray() -> Iterator[None]:
    """What goes wrong with Ray, or where there is none, ends the command with a sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        fail("Ray is not installed in this Python", "`pip install 'modelpool[ray]'`")
    except StartupError as error:
        fail(error.reason, error.hint)


def worker(
    worker_id: Annotated[str | None, typer.Option(help="Its name; the host's name if not given.")] = None,
    manager_url: Annotated[
        str | None, typer.Option(help="A gateway or manager; or unix: and a control socket.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 for any free one.")] = None,
    public_url: Annotated[str | None, typer.Option(help="Where others reach it, if not at its own address.")] = None,
    config: ConfigOption = None,
) -> None:
    """Run a worker on this machine, in the foreground, for a pool that runs here or elsewhere."""
    from modelpool.worker.__main__ import run

    settings = settings_of(
        config,
        {
            "worker.worker_id": worker_id,
            "worker.manager_url": manager_url,
            "worker.host": host,
            "worker.port": port,
            "worker.public_url": public_url,
        },
    )
    if settings.worker.manager_url == Settings().worker.manager_url and (local := local_address(settings)):
        settings = _joining(settings, local)
    os.environ.update(to_environ(settings), SPT_NOENV="1")
    try:
        run(settings)
    except StartupError as error:
        fail(error.reason, error.hint)
    except OSError as error:
        fail(str(error), "docs/operations.md lists what a worker needs.")


def _joining(settings: Settings, local: PoolAddress) -> Settings:
    """The settings of a worker of this home's pool."""
    # Where https is served, its certificate is for a name that others use, and may be known to nobody here.
    url = f"unix:{Home(settings.home_path).control_socket}" if local.cert_file else local.url
    return msgspec.structs.replace(settings, worker=msgspec.structs.replace(settings.worker, manager_url=url))


def _gateway_flags(
    host: str | None,
    port: int | None,
    processes: int | None,
    api_key: str | None,
    require_key: bool,
    insecure_no_auth: bool,
) -> dict[str, Any]:
    """A switch that is not given leaves the setting to file and environment."""
    return {
        "gateway.host": host,
        "gateway.port": port,
        "gateway.processes": processes,
        "gateway.api_key": api_key,
        "gateway.require_key": require_key or None,
        "gateway.insecure_no_auth": insecure_no_auth or None,
    }
