"""Orders to workers, and the open connection by which a worker's end is seen."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

import httpx
import msgspec

from modelpool.messages.workers import (
    EPOCH_HEADER,
    UNLOADED_LEVEL,
    InstanceReport,
    StartOrder,
    WorkerDescription,
)
from modelpool.worker_url import is_worker_url

_ORDER_DEADLINE_S = 10.0
_WATCH_SILENCE_S = 15.0
_NO_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What is raised for the answer of somebody else, who listens where a worker was."""


class WorkerUnreachable(Exception):
    """The order may or may not have arrived. `refused`: nothing listens there, or can, so its process has ended."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class OrderFailed(Exception):
    """The worker answered that it will not; the message is its own. `permanent`: nor will it the next time."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class _ErrorText(msgspec.Struct, frozen=True):
    message: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorText = _ErrorText()


class WorkerClient:
    """One HTTP client for all workers. Methods take a worker's base URL; each request says which manager asks."""

    def __init__(self, token: str, *, epoch: Callable[[], str]) -> None:

        async def sign(request: httpx.Request) -> None:
            request.headers[EPOCH_HEADER] = epoch()

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"},
            timeout=_ORDER_DEADLINE_S,
            limits=limits,
            trust_env=False,
            event_hooks={"request": [sign]},
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def start(self, url: str, order: StartOrder) -> InstanceReport:
        content = await self._post(f"{url}/instances/start", msgspec.json.encode(order))
        return msgspec.json.decode(content, type=InstanceReport)

    async def stop(self, url: str, instance: str, drain_s: float | None) -> None:
        """`drain_s`: what requests in flight have; None: what the worker gives. What is not there is done already."""
        if drain_s is None:
            await self._post(f"{url}/instances/{quote(instance)}/stop", b"", accept=(404,))
        else:
            body = msgspec.json.encode({"level": UNLOADED_LEVEL, "drain_s": drain_s})
            await self._post(f"{url}/instances/{quote(instance)}/sleep", body, accept=(404,))

    async def dismiss(self, url: str) -> None:
        """It may end."""
        await self._post(f"{url}/dismiss", b"")

    async def sleep(self, url: str, instance: str, level: int) -> None:
        await self._post(f"{url}/instances/{quote(instance)}/sleep", msgspec.json.encode({"level": level}))

    async def wake(self, url: str, instance: str) -> None:
        await self._post(f"{url}/instances/{quote(instance)}/wake", b"")

    async def _post(self, url: str, body: bytes, accept: tuple[int, ...] = ()) -> bytes:
        with _reaching(url):
            response = await self._http.post(url, content=body, headers={"Content-Type": "application/json"})
        if response.is_success or response.status_code in accept:
            return response.content
        raise OrderFailed(_message(response), permanent=response.status_code == 422)

    async def describe(self, url: str) -> WorkerDescription:
        """What it is and runs. Raises WorkerUnreachable, also where no worker answers."""
        with _reaching(url):
            response = await self._http.get(f"{url}/info")
        try:
            return msgspec.json.decode(response.content, type=WorkerDescription)
        except _NO_MESSAGE as error:
            raise WorkerUnreachable(_message(response)) from error

    async def watch(self, url: str) -> None:
        """Return when the worker closes the connection. Raises WorkerUnreachable when it cannot be made or hangs."""
        timeout = httpx.Timeout(_ORDER_DEADLINE_S, read=_WATCH_SILENCE_S)
        with _reaching(url), suppress(httpx.RemoteProtocolError):
            async with self._http.stream("GET", f"{url}/watch", timeout=timeout) as response:
                if not response.is_success:
                    raise WorkerUnreachable(f"GET /watch answered {response.status_code}")
                async for _ in response.aiter_raw():
                    pass

    async def logs(self, url: str, instance: str, *, tail: int, follow: bool) -> AsyncGenerator[bytes, None]:
        """The log of an instance, as it comes. Raises OrderFailed, WorkerUnreachable."""
        params = {"tail": str(tail), "follow": "1" if follow else "0"}
        timeout = httpx.Timeout(_ORDER_DEADLINE_S, read=None if follow else _ORDER_DEADLINE_S)
        path = f"{url}/instances/{quote(instance)}/logs"
        with _reaching(url):
            async with self._http.stream("GET", path, params=params, timeout=timeout) as response:
                if not response.is_success:
                    await response.aread()
                    raise OrderFailed(_message(response))
                async for chunk in response.aiter_raw():
                    yield chunk


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """What stands between us and a worker becomes WorkerUnreachable."""
    if not is_worker_url(url):
        raise WorkerUnreachable(f"no worker can be at {url!r}", refused=True)
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # with its path a URL may be too long
        raise _unreachable(error) from error


def _message(response: httpx.Response) -> str:
    try:
        text = msgspec.json.decode(response.content, type=_ErrorBody).error.message
    except _NO_MESSAGE:
        text = ""
    return text or f"the worker answered with status {response.status_code}"


def _unreachable(error: Exception) -> WorkerUnreachable:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionRefusedError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return WorkerUnreachable("connection refused", refused=True)
    return WorkerUnreachable(str(error) or type(error).__name__)
