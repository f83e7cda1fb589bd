"""How a worker makes itself known: registers, reports every change, and finds its manager again."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import quote

import httpx
import msgspec

from modelpool.errors import Conflict
from modelpool.messages.workers import Heartbeat, HeartbeatAnswer, RegisterWorker, WorkerDescription, WorkerInfo
from modelpool.worker.fence import Fence

log = logging.getLogger(__name__)

_RETRY_FIRST_S = 0.2
_RETRY_MAX_S = 2.0
_TOKEN_HINT = "MODELPOOL_TOKEN must be the content of `cluster-token` in the pool's home (~/.modelpool on its machine)"
_AWAY_HINT = "start one there (`modelpool up`), or name another with --manager-url, MANAGER_URL"
_TIMEOUT = httpx.Timeout(10.0, connect=2.0)
_UNREGISTER_S = 2.0
# Reports of changes that come together go together.
_COALESCE_S = 0.02


class Refused(Exception):
    """What answers there will not have this report; the text is its own, with what to do about it."""


class NotHere(Exception):
    """What answers there cannot take this report now; another gateway may. The text says why."""


class NotRegistered(Exception):
    """The manager does not know this worker (any more)."""


class Registration:
    """Keeps the manager informed while `run` runs; whatever goes wrong there, the worker goes on.

    `describe` gives the worker as it is now. `changed` is set when that is worth telling at once. `manager_url` may be
    `unix:` and a path; where it is a gateway's, the other gateways are tried when it cannot be reached. `trusted` says
    whose certificates are believed, as for httpx.
    """

    def __init__(
        self,
        *,
        manager_url: str,
        token: str,
        info: WorkerInfo,
        describe: Callable[[], Awaitable[WorkerDescription]],
        changed: asyncio.Event,
        fence: Fence,
        interval_s: float,
        trusted: ssl.SSLContext | bool = True,
    ) -> None:
        self._own_url = manager_url
        self._trusted = trusted
        self._token = token
        self._info = info
        self._describe = describe
        self._changed = changed
        self._fence = fence
        self._interval_s = interval_s
        self._url = manager_url
        self._gateways: tuple[str, ...] = ()
        self._told: set[str] = set()
        self._registered = False
        self._number = 0

    async def run(self) -> None:
        """Register, and report; again and again, until cancelled."""
        retry_s = _RETRY_FIRST_S
        while True:
            try:
                async with _client(self._url, self._token, self._trusted) as http:
                    await self._register(http)
                    retry_s = _RETRY_FIRST_S
                    await self._keep_reporting(http)
            except NotRegistered:
                log.info("the manager at %s does not know this worker; registering again", self._url)
            except (httpx.HTTPError, httpx.InvalidURL, Refused, NotHere, OSError) as error:
                self._note(self._trouble_with(error))
                if not isinstance(error, Refused):
                    self._url = self._next_url()
                # Spread, so that all workers of a manager that comes back do not come at once.
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
                retry_s = min(_RETRY_MAX_S, 2 * retry_s)

    async def unregister(self) -> None:
        """Say goodbye, if the manager knows this worker and can be reached at once."""
        if not self._registered:
            return
        with suppress(httpx.HTTPError, OSError, TimeoutError):
            async with asyncio.timeout(_UNREGISTER_S), _client(self._url, self._token, self._trusted) as http:
                path = f"/workers/{quote(self._info.worker_id, safe='')}/unregister"
                response = await http.delete(path, params={"incarnation": self._info.incarnation})
                if response.is_success:
                    self._registered = False
                    log.info("unregistered at %s", self._url)

    def _trouble_with(self, error: Exception) -> str:
        if isinstance(error, Refused | NotHere):
            return f"{self._url}: {error}"
        text = f"no manager answers at {self._url}: {str(error) or type(error).__name__}"
        # At a control socket it is this machine's own manager, which is started again.
        return text if self._url.startswith("unix:") else f"{text}; {_AWAY_HINT}"

    def _note(self, trouble: str) -> None:
        """Log what is wrong, each thing once until it is registered again."""
        if trouble not in self._told:
            self._told.add(trouble)
            log.warning("not registered: %s; trying on", trouble)

    def _next_url(self) -> str:
        """The next of our own URL and the gateways that are known."""
        if self._own_url.startswith("unix:"):
            return self._own_url
        urls = list(dict.fromkeys((self._own_url, *self._gateways)))
        return urls[(urls.index(self._url) + 1) % len(urls)] if self._url in urls else self._own_url

    async def _register(self, http: httpx.AsyncClient) -> None:
        self._changed.clear()
        now = await self._describe()
        message = RegisterWorker(
            info=self._info,
            devices=now.devices,
            host=now.host,
            files=now.files,
            engines=now.engines,
            instances=now.instances,
            epoch=self._fence.epoch,
            number=self._next_number(),
        )
        try:
            await self._tell(http, "/workers/register", message)
        except NotRegistered:
            raise Refused(f"what answers there takes no workers (status 404); {_AWAY_HINT}") from None
        self._registered = True
        log.info("registered at %s as %s (%s)", self._url, self._info.worker_id, self._info.url)
        self._told.clear()

    async def _keep_reporting(self, http: httpx.AsyncClient) -> None:
        """Returns never. Raises NotRegistered, Refused, NotHere, and what httpx raises when the manager is away."""
        path = f"/workers/{quote(self._info.worker_id, safe='')}/heartbeat"
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._changed.wait()
                await asyncio.sleep(_COALESCE_S)
            self._changed.clear()
            now = await self._describe()
            message = Heartbeat(
                incarnation=self._info.incarnation,
                devices=now.devices,
                host=now.host,
                files=now.files,
                engines=now.engines,
                instances=now.instances,
                number=self._next_number(),
            )
            await self._tell(http, path, message)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    async def _tell(self, http: httpx.AsyncClient, path: str, message: RegisterWorker | Heartbeat) -> None:
        response = await http.post(path, content=msgspec.json.encode(message))
        if response.status_code == 404:
            raise NotRegistered
        if response.status_code == 503:
            raise NotHere(_refusal(response))
        if not response.is_success:
            raise Refused(_refusal(response))
        try:
            answer = msgspec.json.decode(response.content, type=HeartbeatAnswer)
            self._fence.hear(answer.epoch)
        except msgspec.DecodeError:
            raise Refused(f"what answers there is no Model Pool; {_AWAY_HINT}") from None
        except Conflict as error:
            raise NotHere(error.message) from None
        self._gateways = answer.gateways


class _ErrorText(msgspec.Struct, frozen=True):
    message: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _ErrorText = _ErrorText()


def _refusal(response: httpx.Response) -> str:
    """Why a report was refused, in the words of who did; for a wrong token, also where the right one is."""
    try:
        message = msgspec.json.decode(response.content, type=_ErrorBody).error.message
    except msgspec.DecodeError:
        message = ""
    text = message.rstrip(".") or f"what answers there is no Model Pool (status {response.status_code}); {_AWAY_HINT}"
    return f"{text}; {_TOKEN_HINT}" if response.status_code in (401, 403) else text


def _client(url: str, token: str, trusted: ssl.SSLContext | bool) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    if url.startswith("unix:"):
        transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"))
        return httpx.AsyncClient(base_url="http://control", transport=transport, headers=headers, timeout=_TIMEOUT)
    # No proxy of the environment: the manager is ours, and the token with it.
    return httpx.AsyncClient(
        base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT, trust_env=False, verify=trusted
    )
