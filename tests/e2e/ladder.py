"""One instance of a running pool, put to sleep and woken by the orders of its worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.e2e.pool import Json, PoolProcess, eventually


class Ladder:
    """The first instance of a model."""

    def __init__(self, pool: PoolProcess, alias: str, worker: httpx.Client) -> None:
        self.pool = pool
        self.alias = alias
        self.worker = worker

    def status(self) -> Json:
        status: Json = self.worker.get(f"/instances/{self.alias}/status").json()
        return status

    def report(self) -> Json:
        report: Json = self.worker.get(f"/instances/{self.alias}").json()
        return report

    def sleep(self, level: int) -> Json:
        """The change of level, once it sleeps."""
        answer = self.worker.post(f"/instances/{self.alias}/sleep", json={"level": level})
        assert answer.status_code == 200, answer.text
        change: Json = self._reached(f"SLEEP_{level}")["last_sleep"]
        return change

    def wake(self) -> Json:
        """The change of level, once it is awake."""
        self.order_wake()
        change: Json = self._reached("ACTIVE")["last_wake"]
        return change

    def order_wake(self) -> None:
        answer = self.worker.post(f"/instances/{self.alias}/wake")
        assert answer.status_code == 200, answer.text

    def _reached(self, state: str) -> Json:
        def reached() -> Json | None:
            report = self.report()
            return report if report["state"] == state else None

        return eventually(reached, 30, lambda: f"{state}: {self.report()}")

    def pss(self) -> int:
        """Bytes of its process tree, now."""
        return int(self.status()["memory_bytes"])

    def says(self, tokens: int = 24) -> str:
        """Its greedy answer, through the gateway, which has a sleeper woken."""
        body = {"model": self.alias, "prompt": "Model Pool", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = self.pool.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def first_token_s(self) -> float:
        """Seconds to the first token of a stream through the gateway, which has a sleeper woken."""
        body = {"model": self.alias, "prompt": "Model", "max_tokens": 4, "temperature": 0, "stream": True}
        begin = time.monotonic()
        with self.pool.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            next(line for line in answer.iter_lines() if line.startswith("data: {"))
            taken = time.monotonic() - begin
            for _ in answer.iter_lines():
                pass
        return taken


@contextmanager
def ladder(pool: PoolProcess, alias: str) -> Iterator[Ladder]:
    with pool.worker_http() as worker:
        yield Ladder(pool, alias, worker)
