"""The command line's way to a pool: finds its address and key, and turns failures into sentences."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from modelpool.cli.command import program
from modelpool.messages.admin import ModelView, PoolStatus, WorkerView
from modelpool.messages.dump import Dump, Loaded
from modelpool.messages.explain import Explanation
from modelpool.messages.keys import KeyMade, KeyView
from modelpool.messages.models import ModelSpec
from modelpool.messages.requests import FinishedRequests
from modelpool.pool_address import local_address
from modelpool.process import StartupError
from modelpool.settings import Settings, pool_url
from modelpool.tls import client_context, own_context

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
MANAGER_AWAY_S = 8.0
"""How long a command waits for a manager that is being started again."""
_AWAY_RETRY_S = 0.5


class Trouble(Exception):
    """A request that came to nothing. `hint` says what to do about it; `code` is the pool's, where it has one."""

    def __init__(self, message: str, hint: str = "", *, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class PoolClient:
    """The admin API of one pool. Every call raises Trouble."""

    def __init__(self, settings: Settings, url: str | None) -> None:
        local = local_address(settings)
        self.url = pool_url(url or (local.url if local else DEFAULT_URL))
        self.local = local if local is not None and local.url == self.url else None
        """The pool of this home, if that is the one."""
        self.key = _key(settings, local=self.local is not None)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=30.0, trust_env=False, verify=self._trusted(settings)
            )
        except StartupError as error:
            raise Trouble(error.reason, error.hint) from error
        except httpx.InvalidURL as error:
            raise Trouble(f"{self.url} is no address: {error}", "Give it as http://host:port.") from error

    def _trusted(self, settings: Settings) -> ssl.SSLContext | bool:
        """The own pool by its certificate, which is for the name that others reach it by. Raises StartupError."""
        if self.local is not None and self.local.cert_file:
            return own_context(self.local.cert_file)
        return client_context(settings.tls_ca_file)

    def close(self) -> None:
        self._http.close()

    def register(self, body: dict[str, Any], *, replace: bool = False) -> ModelView:
        params = {"replace": "true"} if replace else {}
        answer = self._request("POST", "/admin/models/register", json=body, params=params)
        return self._decoded(answer, _Registered).routing

    def change(self, alias: str, change: dict[str, Any]) -> ModelView:
        answer = self._request("PATCH", f"/admin/models/{quote(alias)}", json=change)
        return self._decoded(answer, _Registered).routing

    def remove(self, alias: str) -> None:
        self._request("DELETE", f"/admin/models/{quote(alias)}", done_already=404)

    def model(self, alias: str) -> ModelView:
        return self._decoded(self._request("GET", f"/admin/models/{quote(alias)}"), ModelView)

    def specs(self) -> dict[str, ModelSpec]:
        """All registered models, as they were registered."""
        return {each.alias: each.spec for each in self.status().models}

    def status(self) -> PoolStatus:
        return self._decoded(self._request("GET", "/admin/status"), PoolStatus)

    def drain(self, worker_id: str) -> WorkerView:
        return self._decoded(self._request("POST", f"/admin/workers/{quote(worker_id, safe='')}/drain"), WorkerView)

    def keep(self, worker_id: str) -> WorkerView:
        return self._decoded(self._request("DELETE", f"/admin/workers/{quote(worker_id, safe='')}/drain"), WorkerView)

    def worker(self, worker_id: str) -> WorkerView | None:
        """None where it is not there, or not any more."""
        return next((each for each in self.status().workers if each.worker_id == worker_id), None)

    def explain(self, request_id: str) -> Explanation:
        return self._decoded(self._request("GET", f"/admin/explain/{quote(request_id, safe='')}"), Explanation)

    def dump(self) -> Dump:
        return self._decoded(self._request("GET", "/admin/dump"), Dump)

    def load(self, dump: Dump, *, restore: bool) -> Loaded:
        body, params = msgspec.to_builtins(dump), {"restore": str(restore).lower()}
        return self._decoded(self._request("POST", "/admin/load", json=body, params=params), Loaded)

    def finished(self, ended_after: float) -> FinishedRequests:
        answer = self._request("GET", "/admin/requests", params={"ended_after": repr(ended_after)})
        return self._decoded(answer, FinishedRequests)

    def make_key(self, body: dict[str, Any]) -> KeyMade:
        return self._decoded(self._request("POST", "/admin/keys", json=body), KeyMade)

    def keys(self) -> tuple[KeyView, ...]:
        return self._decoded(self._request("GET", "/admin/keys"), _KeyList).keys

    def revoke_key(self, name_or_id: str) -> KeyView:
        """The key of that id, or else the live one of that name."""
        named = [key for key in self.keys() if key.revoked is None and key.name == name_or_id]
        id = named[0].id if named else name_or_id
        return self._decoded(self._request("DELETE", f"/admin/keys/{quote(id, safe='')}"), KeyView)

    @contextmanager
    def logs(self, alias: str, *, tail: int, follow: bool) -> Iterator[Iterator[str]]:
        """The text of a model's log, piece by piece."""
        path, params = f"/admin/models/{quote(alias)}/logs", {"tail": str(tail), "follow": str(follow).lower()}
        with self.stream("GET", path, params=params, timeout=httpx.Timeout(30.0, read=None)) as response:
            yield response.iter_text()

    @contextmanager
    def stream(self, method: str, path: str, **kwargs: Any) -> Iterator[httpx.Response]:
        """A response with status 200, to be read piece by piece."""
        with self._reaching(), self._http.stream(method, path, **kwargs) as response:
            if not response.is_success:
                response.read()
                raise trouble_of(response)
            yield response

    def _request(self, method: str, path: str, *, done_already: int = 0, **kwargs: Any) -> bytes:
        """The answer's body. While the manager is away it is asked again for a while.

        A request that got no answer may have been carried out: from the second try on `done_already` is success, too.
        """
        deadline = time.monotonic() + MANAGER_AWAY_S
        tried = False
        while True:
            with self._reaching():
                response = self._http.request(method, path, **kwargs)
            if response.is_success or (tried and response.status_code == done_already):
                return response.content
            trouble = trouble_of(response)
            if trouble.code != "manager_away" or time.monotonic() >= deadline:
                raise trouble
            tried = True
            time.sleep(_AWAY_RETRY_S)

    def _decoded(self, content: bytes, type_: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=type_)
        except msgspec.DecodeError as error:
            raise Trouble(f"what answers at {self.url} is no Model Pool of this version: {error}") from error

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise Trouble(
                    f"the certificate of {self.url} is not trusted: {error}",
                    "Use the name that it is for, and say who signed it with MODELPOOL_TLS_CA_FILE.",
                ) from error
            raise Trouble(
                f"no pool answers at {self.url}",
                f"Start one with `{program()} up`, or name another with --url or MODELPOOL_URL.",
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Trouble(f"{self.url} does not answer as it should: {error or type(error).__name__}") from error


class _Registered(msgspec.Struct, frozen=True):
    routing: ModelView


class _KeyList(msgspec.Struct, frozen=True):
    keys: tuple[KeyView, ...]


def _key(settings: Settings, *, local: bool) -> str:
    """The admin key of a pool of this machine; elsewhere what MODELPOOL_API_KEY says."""
    if local:
        try:
            return (settings.home_path / "admin-key").read_text().strip()
        except OSError:
            pass
    return os.environ.get("MODELPOOL_API_KEY", "")


_KEY_HINT = "Set MODELPOOL_API_KEY to the pool's admin key (the file `admin-key` in its home)."
_AWAY_HINT = "The manager restarts by itself; try again in a moment."


def trouble_of(response: httpx.Response) -> Trouble:
    """Why a pool refused, in its own words."""
    try:
        error = msgspec.json.decode(response.content)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return Trouble(f"what answers at {response.url.join('/')} is no Model Pool (status {response.status_code})")
    needs_key = code == "invalid_api_key" or (code == "forbidden" and "admin key" in message)
    return Trouble(message, _KEY_HINT if needs_key else _AWAY_HINT if code == "manager_away" else "", code=code)
