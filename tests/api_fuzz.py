"""schemathesis over the OpenAPI document of a running pool: what fits each schema, and what just does not."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from tests.e2e.pool import PoolProcess, eventually
from tests.http_fuzz import OURS_5XX

MODEL = "x"
"""Registered by whoever attacks."""
EXAMPLES = 3
"""Of each operation in each turn."""
PATIENCE_S = 20.0


class ApiFuzz:
    """`seen` has how often which status was answered, with its code for errors.

    It comes with the admin key, with which no worker can be registered: one at any address would be called there.
    """

    def __init__(self, pool: PoolProcess) -> None:
        self.seen: Counter[str] = Counter()
        self._pool = pool
        self._headers = {"Authorization": pool.http.headers["authorization"]}
        self._schema = schemathesis.openapi.from_dict(pool.http.get("/openapi.json").json())
        self._operations: list[Any] = [_ok(found) for found in self._schema.get_all_operations()]
        self._session = requests.Session()
        self._processes = self._own_processes()

    def attack_for(self, seconds: float, begin: int) -> None:
        """Every operation in turn, from seeds that begin with this one, for about so long."""
        deadline, number = time.monotonic() + seconds, begin
        while time.monotonic() < deadline:
            for operation in self._operations:
                for mode in GenerationMode if operation.body or operation.query else [GenerationMode.POSITIVE]:
                    self._attack(operation, mode, number, deadline)
            number += 1

    def nothing_is_left(self) -> None:
        """Nothing is in flight, no process of the pool's own died, and none wrote a traceback."""
        eventually(lambda: not self._inflight(), 10, lambda: f"{self._inflight()} in flight")
        assert self._own_processes() == self._processes
        for part in ("gateway", "manager", "worker"):
            said = (self._pool.home / "logs" / f"{part}.log").read_text()
            assert "Traceback" not in said, said[max(0, said.index("Traceback") - 500) :][:3000]

    def _attack(self, operation: Any, mode: GenerationMode, number: int, deadline: float) -> None:
        @seed(number)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Case[Any]) -> None:
            if time.monotonic() < deadline:
                self._send(case)

        one()

    def _send(self, case: Case[Any]) -> None:
        if case.path.endswith("/logs") and "follow" in case.query:
            case.query["follow"] = False  # which would have no end
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and self.seen.total() % 2:
            case.body["model"] = MODEL  # no generator would think of
        try:
            answer = case.call(
                base_url=self._pool.url, session=self._session, headers=self._headers, timeout=PATIENCE_S
            )
        except requests.Timeout:
            raise AssertionError(f"no answer: {case.as_curl_command()}") from None
        code = _code(answer.content) if answer.status_code >= 400 else ""
        if code is None or (answer.status_code >= 500 and code not in OURS_5XX.get(answer.status_code, ())):
            raise AssertionError(f"{answer.status_code} {answer.content[:1000]!r}: {case.as_curl_command()}")
        self.seen[f"{answer.status_code} {code}".strip()] += 1
        if answer.status_code == 200:
            self._undo(case, answer.content)

    def _undo(self, case: Case[Any], content: bytes) -> None:
        """So that no model is left running, and no key."""
        if case.method.upper() == "POST" and case.path.endswith("/models/register"):
            alias = msgspec.json.decode(content)["routing"]["alias"]
            self._pool.http.delete(f"/admin/models/{quote(alias, safe='')}")
        elif case.method.upper() == "POST" and case.path == "/admin/keys":
            self._pool.http.delete(f"/admin/keys/{msgspec.json.decode(content)['key']['id']}")

    def _inflight(self) -> float:
        lines = self._pool.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("modelpool_requests_in_flight{"))

    def _own_processes(self) -> dict[str, list[int]]:
        parts = ("gateway", "manager", "worker", "forkserver")
        return {part: [each.pid for each in self._pool.processes(f"modelpool: {part}")] for part in parts}


def _ok(found: Any) -> Any:
    """An operation that schemathesis understood. Raises what it has against it."""
    return found.ok() if isinstance(found, Ok) else pytest.fail(str(found.err()))


def _code(content: bytes) -> str | None:
    """An error's code; empty where an engine has a number for it; None for what is no error of ours or theirs."""
    try:
        error = msgspec.json.decode(content)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return error.get("code") if isinstance(error.get("code"), str) else ""
