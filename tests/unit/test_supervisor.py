"""Orders that meet in one moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import StartOrder
from modelpool.worker.devices import Machine
from modelpool.worker.hub import Hub
from modelpool.worker.instance_log import InstanceLog
from modelpool.worker.launcher import HostPlace, Launcher, Limits
from modelpool.worker.supervisor import Supervisor


def supervisor_in(folder: Path) -> Supervisor:
    """One that has no forkservers: what it starts fails."""
    devices = Machine()
    place = HostPlace(
        token="t",
        bind="127.0.0.1",
        reached_here="127.0.0.1",
        announced="127.0.0.1",
        ports=(0, 0),
        cwd=str(folder),
        capacity=None,
        environ={},
    )
    launcher = Launcher(
        forkservers={},
        hub=Hub(environ={}, timeout_s=30, log_path=folder / "fetch.log"),
        place=place,
        devices=devices,
        limits=Limits(start_s=30, stall_s=30, wake_s=30),
        log_of=lambda name: InstanceLog(folder / name),
    )
    return Supervisor(
        launcher,
        forkservers={},
        devices=devices,
        log_of=lambda name: InstanceLog(folder / name),
        drain_s=1,
        changed=asyncio.Event(),
    )


def test_an_instance_that_is_stopped_in_the_moment_of_its_start_is_gone_and_can_be_started_again(
    tmp_path: Path,
) -> None:
    """As where both orders waited for a worker that stood still."""

    async def story() -> None:
        supervisor = supervisor_in(tmp_path)
        order = StartOrder(model=ModelSpec(alias="m", fake=True))
        async with asyncio.TaskGroup() as tasks:
            supervisor.attach(tasks)
            await supervisor.start(order)
            supervisor.stop("m")
            while supervisor.reports():
                supervisor.changed.clear()
                await supervisor.changed.wait()
            assert (await supervisor.start(order)).state == "STARTING"

    asyncio.run(asyncio.wait_for(story(), 30))
