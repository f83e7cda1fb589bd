"""One instance of a model, put to sleep and woken by the orders of its worker, and asked at some door."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.e2e.pool import Json, PoolProcess, eventually


class Ladder:
    """The first instance of a model. `http` and `path`: where it is asked."""

    def __init__(self, alias: str, worker: httpx.Client, http: httpx.Client, path: str) -> None:
        self.alias = alias
        self.worker = worker
        self.http = http
        self.path = path

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
        """Its greedy answer."""
        body = {"model": self.alias, "prompt": "Model Pool", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = self.http.post(self.path, json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def first_token_s(self, *, wake: bool = False) -> float:
        """Seconds to the first token of a stream; from the order to wake, where nobody else gives it."""
        body = {"model": self.alias, "prompt": "Model", "max_tokens": 4, "temperature": 0, "stream": True}
        begin = time.monotonic()
        if wake:
            self.order_wake()
        while time.monotonic() < begin + 30:
            with self.http.stream("POST", self.path, json=body) as answer:
                if answer.status_code == 200:
                    lines = answer.iter_lines()
                    next(line for line in lines if line.startswith("data: {"))
                    taken = time.monotonic() - begin
                    assert "data: [DONE]" in list(lines)
                    return taken
                assert (wake, answer.status_code) == (True, 503), answer.read()
            time.sleep(0.002)
        raise AssertionError(f"no first token: {self.report()}")


@contextmanager
def ladder(pool: PoolProcess, alias: str) -> Iterator[Ladder]:
    """Asked through the gateway, which has a sleeper woken."""
    with pool.worker_http() as worker:
        yield Ladder(alias, worker, pool.http, "/v1/completions")


def settled(pool: PoolProcess, alias: str) -> None:
    """Return once the manager knows that nobody asks for the model: it would wake it again at once."""
    eventually(lambda: pool.model(alias)["decision"].startswith("none: idle"), 15, lambda: f"idle: {pool.model(alias)}")
