"""Checks a live pool from outside: `python tests/test_system.py http://127.0.0.1:8000 http://127.0.0.1:7000`.

The first address is a gateway, the second a worker of the same pool; by default these two. It prints a line per check;
its exit status is 0 when all passed, 1 when one did not, 2 when it was called wrongly. What it registers it removes.

    RUN_FULL_TESTS=1           also scales a fake model up and down: some minutes with the default settings
    RUN_REAL_AUTOSCALE_TEST=1  also a real one; the pool needs room for two of it
    MODELPOOL_TEST_MODEL       which one: a hub name, or a path on the worker; by default what is registered as `demo`

It needs the gateway's admin key and the cluster token, from `MODELPOOL_API_KEY` and `MODELPOOL_TOKEN`, else from the
pool's home on this machine (`MODELPOOL_HOME`, `~/.modelpool`); these two files are for addresses of this machine only.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import NotFoundError, OpenAI

Json = dict[str, Any]

ADDRESSES = ("http://127.0.0.1:8000", "http://127.0.0.1:7000")
ANSWER = "The pool is well, thank you for asking."
ASK: Any = [{"role": "user", "content": "How is the pool?"}]
SOON_S = 60.0
SCALED_S = 240.0
"""Two replicas come, or go, within this: averages, cooldowns and starts with the default settings."""


class Wrong(Exception):
    """Something is not as it should be; says what it is."""


class System:
    """A pool, seen through one gateway and one worker."""

    def __init__(self, gateway: str, worker: str) -> None:
        key = _secret("MODELPOOL_API_KEY", "admin-key", gateway)
        self.token = _secret("MODELPOOL_TOKEN", "cluster-token", worker)
        self.gateway = _client(gateway, key)
        self.worker = _client(worker, self.token)
        self.sdk = OpenAI(base_url=f"{gateway}/v1", api_key=key or "none", max_retries=0)

    def register(self, alias: str, **body: Any) -> None:
        answer = _read(self.gateway.post("/admin/models/register", json={"alias": alias, **body}))
        _expect(answer["status"] == "success", answer)

    def remove(self, alias: str) -> None:
        """Also where it is not there."""
        answer = self.gateway.delete(f"/admin/models/{alias}")
        if answer.status_code != 404:
            _read(answer)

    def model(self, alias: str) -> Json:
        return _read(self.gateway.get(f"/admin/models/{alias}"))

    def listed(self) -> list[str]:
        return [each.id for each in self.sdk.models.list()]

    def says(self, alias: str) -> str:
        answer = self.sdk.chat.completions.create(model=alias, messages=ASK)
        return answer.choices[0].message.content or ""

    def awake(self, alias: str) -> list[str]:
        """The replicas that take requests."""
        return [each["instance"] for each in self.model(alias)["instances"] if each["state"] == "ACTIVE"]

    def wait_awake(self, alias: str, fits: Callable[[int], bool], within: float) -> list[str]:
        """The replicas once that many take requests."""
        names: list[str] = _eventually(lambda: self.awake(alias), lambda names: fits(len(names)), within)
        return names

    @contextmanager
    def worker_of(self, alias: str) -> Iterator[httpx.Client]:
        """A client of the worker that runs the first instance of the model: the given one, or another of the pool."""
        name = self.model(alias)["instances"][0]["worker_id"]
        if name == _read(self.worker.get("/info"))["info"]["worker_id"]:
            yield self.worker
            return
        workers = _read(self.gateway.get("/workers"))["workers"]
        url = next(each["url"] for each in workers if each["worker_id"] == name)
        with _client(url, self.token) as worker:
            yield worker


# ---------------------------------------------------------------- the checks; each returns what it has to say


def gateway_is_healthy(system: System, _: str) -> str:
    return str(_read(system.gateway.get("/health"))["status"])


def worker_is_healthy(system: System, _: str) -> str:
    return str(_read(system.worker.get("/health"))["status"])


def worker_is_of_this_pool(system: System, _: str) -> str:
    name = _read(system.worker.get("/info"))["info"]["worker_id"]
    known = [each["worker_id"] for each in _read(system.gateway.get("/workers"))["workers"] if each["alive"]]
    _expect(name in known, f"the gateway knows {', '.join(known) or 'no worker'}, not {name}")
    return str(name)


def registers(system: System, alias: str) -> str:
    for _ in range(2):  # the same again is no other model
        system.register(alias, fake=True, fake_response=ANSWER, max_replicas=1)
    _expect(alias in system.listed(), "it is not in /v1/models")
    return ", ".join(system.wait_awake(alias, bool, SOON_S))


def chats(system: System, alias: str) -> str:
    return _equal(system.says(alias), ANSWER)


def streams(system: System, alias: str) -> str:
    events = system.sdk.chat.completions.create(model=alias, messages=ASK, stream=True)
    pieces = [text for event in events if event.choices and (text := event.choices[0].delta.content)]
    _equal("".join(pieces), ANSWER)
    _expect(len(pieces) > 1, "it came in one piece")
    return f"{len(pieces)} pieces"


def tells_its_status(system: System, alias: str) -> str:
    with system.worker_of(alias) as worker:
        status = _read(worker.get(f"/instances/{alias}/status"))
    _expect((status["state"], status["sleep_level_value"]) == ("ACTIVE", 0), status)
    _expect(status["requests_total"] >= 2 and status["ttft_last"] > 0, status)
    return f"{status['requests_total']} requests, {status['gpu_info']['available_memory_gb']} GB free"


def sleeps(level: int) -> Callable[[System, str], str]:
    def sleeps_at(system: System, alias: str) -> str:
        with system.worker_of(alias) as worker:
            _read(worker.post(f"/instances/{alias}/sleep", json={"level": level}))
            status = _status(worker, alias, f"SLEEP_{level}")
        _equal(status["sleep_level_value"], level)
        _expect(alias in system.listed(), "it is not in /v1/models any more")
        return f"{status['last_sleep']['seconds']:.3f} s"

    return sleeps_at


def wakes(system: System, alias: str) -> str:
    with system.worker_of(alias) as worker:
        _read(worker.post(f"/instances/{alias}/wake"))
        status = _status(worker, alias, "ACTIVE")
    _equal(status["sleep_level_value"], 0)
    _equal(system.says(alias), ANSWER)
    return f"{status['last_wake']['seconds']:.3f} s"


def request_wakes(system: System, alias: str) -> str:
    before = system.model(alias)["instances"][0]["pid"]
    _equal(system.says(alias), ANSWER)
    _equal(system.model(alias)["instances"][0]["pid"], before)
    return "by the same process"


def deletes(system: System, alias: str) -> str:
    with system.worker_of(alias) as worker:
        _read(system.gateway.delete(f"/admin/models/{alias}"))
        _expect(alias not in system.listed(), "it is still in /v1/models")
        try:
            raise Wrong(f"it still answers: {system.says(alias)!r}")
        except NotFoundError as error:
            _equal(error.code, "model_not_found")
        _eventually(lambda: worker.get(f"/instances/{alias}/status").status_code, lambda code: code == 404, SOON_S)
    return "its instance is gone"


def scales_a_fake_model(system: System, alias: str) -> str:
    system.register(alias, fake=True, fake_delay_ms=500, fake_capacity=2, max_replicas=3)
    return _follows_its_load(system, alias, most=3, clients=6)


def scales_a_real_model(system: System, alias: str) -> str:
    named = os.environ.get("MODELPOOL_TEST_MODEL")
    body = {"model_name": named} if named else _without(system.model("demo")["spec"], "alias", "pinned")
    system.register(alias, **{**body, "min_replicas": 0, "max_replicas": 2})
    system.wait_awake(alias, bool, SCALED_S)
    with system.worker_of(alias) as worker:
        capacity = _read(worker.get(f"/instances/{alias}/status"))["capacity"]
    return _follows_its_load(system, alias, most=2, clients=2 * capacity)


def _follows_its_load(system: System, alias: str, *, most: int, clients: int) -> str:
    """One replica after another comes while so many clients ask without pause, and they go when nobody does."""
    system.wait_awake(alias, bool, SOON_S)
    begun = time.monotonic()
    with _asking(system, alias, clients) as asking:
        names = system.wait_awake(alias, lambda count: count == most or bool(asking.failures), SCALED_S)
        up_s = time.monotonic() - begun
    _expect(not asking.failures, asking.failures[:3])
    _equal(sorted(names), sorted([alias, *(f"{alias}-r{number}" for number in range(2, most + 1))]))
    system.wait_awake(alias, lambda count: count <= 1, SCALED_S)
    down_s = time.monotonic() - begun - up_s
    return f"{most} replicas after {up_s:.0f} s, one again after {down_s:.0f} s; {asking.answers} answers"


class _Asking:
    """Clients that ask a model without pause."""

    def __init__(self, system: System, alias: str) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self.done = threading.Event()
        self._system = system
        self._alias = alias

    def run(self) -> None:
        while not self.done.is_set():
            try:
                self._system.sdk.completions.create(
                    model=self._alias, prompt="Count.", max_tokens=64, extra_body={"ignore_eos": True}
                )
                self.answers += 1
            except Exception as error:  # noqa: BLE001 - whatever a client may meet is a failure of the pool
                self.failures.append(_shown(error))
                return


@contextmanager
def _asking(system: System, alias: str, clients: int) -> Iterator[_Asking]:
    asking = _Asking(system, alias)
    threads = [threading.Thread(target=asking.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield asking
    finally:
        asking.done.set()
        for thread in threads:
            thread.join()


# ---------------------------------------------------------------- the run

BASIC: tuple[tuple[str, Callable[[System, str], str]], ...] = (
    ("the gateway is healthy", gateway_is_healthy),
    ("the worker is healthy", worker_is_healthy),
    ("the worker is one of this pool", worker_is_of_this_pool),
    ("a model is registered and comes up", registers),
    ("it answers a chat", chats),
    ("it streams", streams),
    ("its worker tells its status", tells_its_status),
    ("it sleeps at level 1", sleeps(1)),
    ("it wakes when told to", wakes),
    ("it sleeps at level 2", sleeps(2)),
    ("a request wakes it", request_wakes),
    ("it is deleted", deletes),
)


def main(arguments: list[str]) -> int:
    if len(arguments) > 2 or not all(each.startswith(("http://", "https://")) for each in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    gateway, worker = (each.rstrip("/") for each in (*arguments, *ADDRESSES[len(arguments) :]))
    checks = list(BASIC)
    if os.environ.get("RUN_FULL_TESTS") == "1":
        checks.append(("a fake model follows its load", scales_a_fake_model))
    if os.environ.get("RUN_REAL_AUTOSCALE_TEST") == "1":
        checks.append(("a real model follows its load", scales_a_real_model))
    system = System(gateway, worker)
    basic = f"check-{secrets.token_hex(4)}"
    # Those that scale a model have one each: what is left of the one before would count.
    aliases = [basic] * len(BASIC) + [f"{basic}-{number}" for number in range(len(BASIC), len(checks))]
    failed = 0
    try:
        for alias, (what, check) in zip(aliases, checks, strict=True):
            failed += not _passes(what, partial(check, system, alias))
            if alias != basic:
                system.remove(alias)
    finally:
        for alias in dict.fromkeys(aliases):
            with suppress(httpx.TransportError, Wrong):
                system.remove(alias)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


def _passes(what: str, check: Callable[[], str]) -> bool:
    """Whether it did, after a line that says so."""
    begun = time.monotonic()
    try:
        passed, said = True, check()
    except Exception as error:  # noqa: BLE001 - whatever it was, the other checks are still to be made
        passed, said = False, _shown(error)
    print(f"{'ok' if passed else 'FAILED':6}  {what:36}  {time.monotonic() - begun:7.2f} s  {said}", flush=True)
    return passed


# ---------------------------------------------------------------- addresses, secrets, answers


def _secret(variable: str, file: str, address: str) -> str:
    """From the environment, or, for an address of this machine, from the pool's home."""
    if value := os.environ.get(variable):
        return value
    if urlsplit(address).hostname not in ("127.0.0.1", "::1", "localhost"):
        return ""
    try:
        home = Path(os.environ.get("MODELPOOL_HOME") or "~/.modelpool").expanduser()
        return (home / file).read_text().strip()
    except OSError:
        return ""


def _client(address: str, secret: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False)


def _read(answer: httpx.Response) -> Json:
    """Its body. Raises Wrong for any status but 200."""
    request = answer.request
    _expect(answer.status_code == 200, f"{request.method} {request.url}: {answer.status_code} {answer.text[:300]}")
    body: Json = answer.json()
    return body


def _status(worker: httpx.Client, alias: str, state: str) -> Json:
    """What the worker says of the instance, once it is in that state."""

    def look() -> Json:
        return _read(worker.get(f"/instances/{alias}/status"))

    status: Json = _eventually(look, lambda seen: seen["state"] == state, SOON_S)
    return status


def _eventually(look: Callable[[], Any], fits: Callable[[Any], bool], within: float) -> Any:
    deadline = time.monotonic() + within
    while not fits(seen := look()):
        _expect(time.monotonic() < deadline, f"after {within:g} s it is still: {seen}")
        time.sleep(0.05)
    return seen


def _equal(found: Any, wanted: Any) -> str:
    _expect(found == wanted, f"{found!r} instead of {wanted!r}")
    return str(found)


def _expect(right: bool, otherwise: Any) -> None:
    if not right:
        raise Wrong(otherwise)


def _shown(error: Exception) -> str:
    return str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"


def _without(mapping: Json, *names: str) -> Json:
    return {name: value for name, value in mapping.items() if name not in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
