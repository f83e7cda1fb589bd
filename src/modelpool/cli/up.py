"""`modelpool up`: start everything, show models becoming ready, print the address, serve until interrupted."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import msgspec
import setproctitle

from modelpool import demo
from modelpool.cli.embedded import EmbeddedPool, embedded_pool
from modelpool.cli.screen import Screen
from modelpool.core.lifecycle import InstanceState
from modelpool.home import Home
from modelpool.messages.admin import ModelView, PoolStatus
from modelpool.messages.models import ModelSpec, for_engine
from modelpool.pool_address import address_file, write_address
from modelpool.process import StartupError
from modelpool.settings import Settings

_POLL_S = 0.25
_FAILURES_SHOWN = 1
_DEMO_GB = 2.0


async def run_pool(settings: Settings, screen: Screen, *, with_demo: bool) -> None:
    """Run a pool until SIGINT or SIGTERM. Raises StartupError with a reason and what to do about it."""
    # Also out of the process list: a key given as a flag. The environment stays readable for its run id.
    os.environ.setdefault("SPT_NOENV", "1")
    setproctitle.setproctitle("modelpool: up")
    home = Home(settings.home_path)
    home.cluster_token()
    home.admin_key()
    with home.lock("up"):
        async with embedded_pool(settings, home, screen.notice) as pool:
            await _serve(settings, home, pool, screen, with_demo=with_demo)


async def _serve(settings: Settings, home: Home, pool: EmbeddedPool, screen: Screen, *, with_demo: bool) -> None:
    write_address(settings, pool.url, pid=os.getpid())
    try:
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(pool.keep())
            showing = tasks.create_task(_bring_up(home, pool, screen, with_demo=with_demo))
            await _interrupted()
            screen.ending()
            keeping.cancel()
            showing.cancel()
    finally:
        address_file(settings).unlink(missing_ok=True)


async def _interrupted() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process the default way; children then end with it."""
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()

    def first(number: signal.Signals) -> None:
        interrupted.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first, number)
    await interrupted.wait()


async def _bring_up(home: Home, pool: EmbeddedPool, screen: Screen, *, with_demo: bool) -> None:
    """Register the demo model, show how far the models are, and say when they are there."""
    transport = httpx.AsyncHTTPTransport(uds=str(home.control_socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://manager", timeout=30.0) as control:
        if with_demo:
            await _register_demo(control, screen)
        while True:
            try:
                answer = await control.get("/admin/status")
                status = msgspec.json.decode(answer.content, type=PoolStatus)
            except (httpx.HTTPError, msgspec.DecodeError):
                await asyncio.sleep(_POLL_S)  # the manager is being started again
                continue
            screen.progress(status.models)
            here = any(worker.alive and worker.run_id == pool.run_id for worker in status.workers)
            if here and not status.recovering and all(_settled(model) for model in status.models):
                screen.ready(pool.url, pool.run_id, status.models)
                return
            await asyncio.sleep(_POLL_S)


def _settled(model: ModelView) -> bool:
    """Whether waiting longer is no use: it serves, rests until somebody asks, has failed, or nothing can take it."""
    if model.state is InstanceState.ACTIVE or not model.wanted:
        return True
    if any(each.failures >= _FAILURES_SHOWN for each in model.instances):
        return True
    return model.permanent or (not model.instances and "no worker can take it" in model.reason)


async def _register_demo(control: httpx.AsyncClient, screen: Screen) -> None:
    """Register the demo model; one that another version or checkout registered in this home is replaced."""
    body = {
        "alias": demo.ALIAS,
        "model_name": str(demo.model_path()),
        "max_model_len": demo.MAX_MODEL_LEN,
        "gpu_memory_gb": _DEMO_GB,
        "engine_args": demo.engine_args(),
    }
    answer = await control.post("/admin/models/register", json=body)
    if answer.status_code == 409:
        path = f"/admin/models/{demo.ALIAS}"
        registered = msgspec.json.decode((await control.get(path)).content, type=ModelView)
        if for_engine(registered.spec) == for_engine(msgspec.convert(body, ModelSpec)):
            return  # its user changed its settings
        if not registered.spec.model_name.endswith("modelpool/demo/model"):
            screen.notice(f"the alias `{demo.ALIAS}` is taken by another model; the demo model is left out")
            return
        await control.delete(path)
        answer = await control.post("/admin/models/register", json=body)
    if not answer.is_success:
        raise StartupError(f"the demo model cannot be registered: {answer.text}", "Leave it out with --no-demo.")
