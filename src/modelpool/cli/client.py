"""The command line's way to a pool: finds its address and key, and turns failures into sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import msgspec
import typer
from rich.console import Console

from modelpool.messages.admin import ModelView, PoolStatus
from modelpool.settings import Settings

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True):
    """What `modelpool up` leaves in its run directory for the commands that come after it."""

    url: str
    run_id: str


def address_file(settings: Settings) -> Path:
    return settings.home_path / "run" / "pool.json"


def fail(message: str, hint: str = "", *, code: int = 1) -> NoReturn:
    """Say what is wrong and what to do about it, and end."""
    console = Console(stderr=True)
    console.print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
    if hint:
        console.print(f"[dim]{hint}[/]", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


class PoolClient:
    """The admin API of one pool."""

    def __init__(self, settings: Settings, url: str | None) -> None:
        local = local_address(settings)
        self.url = (url or (local.url if local else DEFAULT_URL)).rstrip("/")
        self.key = _key(settings, local=local is not None and local.url == self.url)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def register(self, body: dict[str, Any]) -> ModelView:
        answer = self._request("POST", "/admin/models/register", json=body)
        return msgspec.convert(msgspec.json.decode(answer)["routing"], ModelView)

    def remove(self, alias: str) -> None:
        self._request("DELETE", f"/admin/models/{quote(alias)}")

    def model(self, alias: str) -> ModelView:
        return msgspec.json.decode(self._request("GET", f"/admin/models/{quote(alias)}"), type=ModelView)

    def status(self) -> PoolStatus:
        return msgspec.json.decode(self._request("GET", "/admin/status"), type=PoolStatus)

    @contextmanager
    def logs(self, alias: str, *, tail: int, follow: bool) -> Iterator[Iterator[str]]:
        """The text of a model's log, piece by piece."""
        path, params = f"/admin/models/{quote(alias)}/logs", {"tail": str(tail), "follow": str(follow).lower()}
        timeout = httpx.Timeout(30.0, read=None)
        with self._reaching(), self._http.stream("GET", path, params=params, timeout=timeout) as response:
            if not response.is_success:
                response.read()
                _fail_with(response)
            yield response.iter_text()

    def _request(self, method: str, path: str, **kwargs: Any) -> bytes:
        with self._reaching():
            response = self._http.request(method, path, **kwargs)
        if not response.is_success:
            _fail_with(response)
        return response.content

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            fail(
                f"no pool answers at {self.url}.",
                "Start one with `modelpool up`, or name another with --url or MODELPOOL_URL.",
            )
        except httpx.HTTPError as error:
            fail(f"{self.url} does not answer as it should: {error or type(error).__name__}.")


def local_address(settings: Settings) -> PoolAddress | None:
    """Where the pool of this home serves; None where none runs."""
    try:
        return msgspec.json.decode(address_file(settings).read_bytes(), type=PoolAddress)
    except (OSError, msgspec.DecodeError):
        return None


def _key(settings: Settings, *, local: bool) -> str:
    """The admin key of a pool of this machine; elsewhere what MODELPOOL_API_KEY says."""
    if local:
        try:
            return (settings.home_path / "admin-key").read_text().strip()
        except OSError:
            pass
    return os.environ.get("MODELPOOL_API_KEY", "")


def _fail_with(response: httpx.Response) -> NoReturn:
    try:
        error = msgspec.json.decode(response.content)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        fail(f"the pool answered with status {response.status_code}.")
    hints = {
        "invalid_api_key": "Set MODELPOOL_API_KEY to the pool's admin key (the file `admin-key` in its home).",
        "forbidden": "Set MODELPOOL_API_KEY to the pool's admin key (the file `admin-key` in its home).",
        "manager_away": "The manager restarts by itself; try again in a moment.",
    }
    fail(message, hints.get(code, ""))
