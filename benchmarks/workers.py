"""What workers cost the manager: 1,000 simulated ones with 10 instances each at a real manager process.

python -m benchmarks.workers

This process is all workers: each has a connection of its own to the manager, on which it reports every 5 s, and answers
the manager's `GET /watch`. Some reports a second come early and tell of an instance that is now at another address; how
long a gateway waits for that route is measured from before the report is sent until its line of `GET /snapshots` is
read. CPU is that of the manager's process, memory its PSS.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import psutil

from benchmarks.machine import Watch, cpu_seconds, pss_bytes, raise_descriptor_limit
from benchmarks.report import table
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.dump import Dump, StoredModel
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Delta, Snapshot, Update
from modelpool.messages.workers import (
    Address,
    Device,
    EngineStatus,
    GiB,
    Heartbeat,
    InstanceReport,
    RegisterWorker,
    WorkerInfo,
)

INSTANCES = 10
HEARTBEAT_S = 5.0
WATCH_S = 5.0
CHANGES_PER_S = 10.0
TOKEN = "benchmark"
BOUND_S = 1.0
STARTED_S = 60.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Of the manager. `delays`: of routing changes, in seconds, sorted."""

    workers: int
    seconds: float
    reports: int
    cpu_s: float
    pss_bytes: int
    delays: tuple[float, ...]


class Worker:
    """A simulated one, with its connection to the manager."""

    def __init__(self, number: int, port: int) -> None:
        self.info = WorkerInfo(
            worker_id=f"worker-{number}", incarnation="1", url=f"http://127.0.0.1:{port}/worker-{number}"
        )
        self.reports = [
            InstanceReport(
                instance=f"model-{number}-{each}",
                model=ModelSpec(alias=f"model-{number}-{each}", fake=True),
                state=InstanceState.ACTIVE,
                address=Address("127.0.0.1", 20_000),
                capacity=64,
                sleep_levels=(1, 2),
            )
            for each in range(INSTANCES)
        ]
        self._device = Device(index=0, kind="cpu", total_bytes=64 * GiB, free_bytes=32 * GiB)
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def register(self, manager_port: int) -> None:
        self._streams = await asyncio.open_connection("127.0.0.1", manager_port)
        message = RegisterWorker(
            info=self.info,
            devices=(self._device,),
            engines={"fake": EngineStatus(state="ready")},
            instances=tuple(self.reports),
        )
        await self._post("/workers/register", msgspec.json.encode(message))

    async def report(self) -> None:
        # What is free is a little different each time.
        device = msgspec.structs.replace(self._device, free_bytes=32 * GiB + random.randrange(1 << 20))
        message = Heartbeat(
            incarnation="1",
            devices=(device,),
            engines={"fake": EngineStatus(state="ready")},
            instances=tuple(self.reports),
        )
        await self._post(f"/workers/{self.info.worker_id}/heartbeat", msgspec.json.encode(message))

    def move(self, each: int) -> tuple[str, int]:
        """One of its instances is at another address: which, and its port."""
        before = self.reports[each]
        assert before.address is not None
        port = before.address.port + 1
        self.reports[each] = msgspec.structs.replace(before, address=Address("127.0.0.1", port))
        return before.instance, port

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def _post(self, path: str, body: bytes) -> None:
        assert self._streams is not None
        reader, writer = self._streams
        lines = (
            f"POST {path} HTTP/1.1",
            "Host: manager",
            f"Authorization: Bearer {TOKEN}",
            f"Content-Length: {len(body)}",
        )
        async with self._turn:
            writer.write("\r\n".join((*lines, "", "")).encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line[15:]) for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:")
            )
            text = await reader.readexactly(length)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{path}: {text.decode()}")


class Watched(asyncio.Protocol):
    """What a worker answers to `GET /watch`; it is asked nothing else, since all that is wanted runs."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        asked = data.partition(b"\r\n")[0]
        if b"/watch " not in asked:
            raise RuntimeError(f"the manager gives an order: {asked.decode()}")
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._tell()

    def _tell(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"1\r\n\n\r\n")
            asyncio.get_running_loop().call_later(WATCH_S, self._tell)


@contextmanager
def _manager() -> Iterator[tuple[psutil.Process, int]]:
    """A manager of a new pool, and its port."""
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as home:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        own = {"MODELPOOL_HOME": home, "MODELPOOL_TOKEN": TOKEN, "MANAGER_HOST": "127.0.0.1", "MANAGER_PORT": str(port)}
        with (Path(home) / "manager.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "modelpool.manager"], env={**os.environ, **own}, stdout=log, stderr=log
            )
            try:
                yield psutil.Process(process.pid), port
            finally:
                process.terminate()
                process.wait(timeout=STARTED_S)


async def _answers(port: int) -> None:
    async with asyncio.timeout(STARTED_S), httpx.AsyncClient(trust_env=False) as http:
        while True:
            with suppress(httpx.TransportError):
                if (await http.get(f"http://127.0.0.1:{port}/health")).is_success:
                    return
            await asyncio.sleep(0.1)


class Gateway:
    """Follows the routing table; knows at which port an instance is, and since when."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.changed = asyncio.Condition()
        self.delays: list[float] = []
        self.awaited: dict[tuple[str, int], float] = {}

    async def follow(self, http: httpx.AsyncClient) -> None:
        """Until cancelled."""
        async with http.stream("GET", "/snapshots", params={"gateway": "benchmark"}, timeout=None) as lines:
            async for line in lines.aiter_lines():
                if line:
                    await self._hear(msgspec.json.decode(line, type=Update))

    async def _hear(self, update: Update) -> None:
        now = time.monotonic()
        if isinstance(update, Snapshot):
            entries = update.models
        elif isinstance(update, Delta):
            entries = update.changed
        else:
            return
        for entry in entries.values():
            for route in entry.routes:
                self.ports[route.instance] = route.port
                if (since := self.awaited.pop((route.instance, route.port), None)) is not None:
                    self.delays.append(now - since)
        async with self.changed:
            self.changed.notify_all()

    async def has(self, instances: int) -> None:
        async with asyncio.timeout(STARTED_S), self.changed:
            await self.changed.wait_for(lambda: len(self.ports) == instances)


async def measure(workers: int, seconds: float) -> Measured:
    """A new manager with so many workers, once all of their instances are routed."""
    server = await asyncio.get_running_loop().create_server(Watched, "127.0.0.1", 0, backlog=workers)
    port = int(server.sockets[0].getsockname()[1])
    pool = [Worker(number, port) for number in range(workers)]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with _manager() as (process, manager_port):
        await _answers(manager_port)
        url = f"http://127.0.0.1:{manager_port}"
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=STARTED_S) as http:
            for each in pool:
                await each.register(manager_port)
            models = [StoredModel(spec=report.model, created=0) for each in pool for report in each.reports]
            loaded = await http.post("/admin/load", content=msgspec.json.encode(Dump(cluster="", models=tuple(models))))
            loaded.raise_for_status()
            gateway = Gateway()
            following = asyncio.create_task(gateway.follow(http))
            beating = [asyncio.create_task(_beat(each, HEARTBEAT_S * random.random())) for each in pool]
            await gateway.has(workers * INSTANCES)
            await asyncio.sleep(2 * HEARTBEAT_S)
            begun, before = time.monotonic(), cpu_seconds([process])
            changes = await _change(pool, gateway, seconds)
            took, cpu_s = time.monotonic() - begun, cpu_seconds([process]) - before
            for task in (following, *beating):
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(following, *beating, return_exceptions=True)
            measured = Measured(
                workers=workers,
                seconds=took,
                reports=int(took / HEARTBEAT_S * workers) + changes,
                cpu_s=cpu_s,
                pss_bytes=pss_bytes([process]),
                delays=tuple(sorted(gateway.delays)),
            )
        for each in pool:
            each.close()
    server.close()
    return measured


async def _beat(worker: Worker, first_s: float) -> None:
    await asyncio.sleep(first_s)
    due = time.monotonic()
    while True:
        await worker.report()
        due += HEARTBEAT_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _change(pool: list[Worker], gateway: Gateway, seconds: float) -> int:
    """Move instances for so long, and wait until the gateway knows of all of them: how many."""
    end, changes = time.monotonic() + seconds, 0
    while (now := time.monotonic()) < end:
        worker = random.choice(pool)
        gateway.awaited[worker.move(random.randrange(INSTANCES))] = now
        changes += 1
        await worker.report()
        await asyncio.sleep(random.expovariate(CHANGES_PER_S))
    async with asyncio.timeout(STARTED_S), gateway.changed:
        await gateway.changed.wait_for(lambda: not gateway.awaited)
    return changes


def _row(each: Measured) -> list[str]:
    p50, p99 = (each.delays[int(len(each.delays) * share)] * 1e3 for share in (0.5, 0.99))
    return [
        f"{each.workers:,}",
        f"{each.workers * INSTANCES:,}",
        f"{each.reports / each.seconds:,.0f}",
        f"{each.cpu_s / each.seconds:.1%}",
        f"{each.cpu_s / each.seconds / each.workers * 1e6:,.0f}",
        f"{each.pss_bytes / 1e6:,.0f}",
        *(f"{value:,.1f}" for value in (p50, p99, each.delays[-1] * 1e3)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seconds", type=float, default=30.0, help="that are measured")
    options = parser.parse_args()
    raise_descriptor_limit()
    watch = Watch()
    measured = [asyncio.run(measure(workers, options.seconds)) for workers in options.workers]
    head = ["workers", "instances", "reports/s", "CPU of a core", "µs/s a worker", "PSS MB"]
    print(table([*head, "route p50 ms", "p99 ms", "max ms"], map(_row, measured)))
    machine = watch.machine()
    print(f"\n{machine.cores} cores of {machine.processor}, of which others took {machine.others:.0%}")
    return 1 if any(each.delays[int(len(each.delays) * 0.99)] > BOUND_S for each in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
