"""A steady load on a pool, and what came of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx
from openai import OpenAI, OpenAIError

from tests.beside import Beside


class Load(Beside):
    """One client's requests, streams and plain ones in turn, each after the one before, until it is left; what came of
    them.
    """

    def __init__(self, url: str, alias: str, key: str) -> None:
        super().__init__()
        self.statuses: Counter[int | str] = Counter()
        self._http = httpx.Client(base_url=url, headers=_headers(key), trust_env=False, timeout=60)
        self._alias = alias

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._http.close()

    def run(self) -> None:
        for stream in itertools.cycle((True, False)):
            if self.ending.wait(0.02):
                break
            body = {"model": self._alias, "prompt": "x", "stream": stream}
            try:
                self.statuses[_outcome(self._http.post("/v1/completions", json=body), stream)] += 1
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1


class Asked(NamedTuple):
    """One request: where, when (by `time.monotonic`), and what came: 200, or what instead of an answer."""

    url: str
    began: float
    ended: float
    outcome: int | str


class ConstantLoad(Beside):
    """So many requests a second to each of these gateways in turn, however long they take: plain ones and streams, by
    turns.
    """

    def __init__(self, urls: list[str], alias: str, key: str, per_second: float, **body: Any) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.streams = 0
        self._urls = urls
        self._key = key
        self._per_second = per_second
        self._body = {"model": alias, "prompt": "x", **body}

    @property
    def slowest_s(self) -> float:
        return max(each.ended - each.began for each in self.asked)

    def failed(self) -> list[Asked]:
        return [each for each in self.asked if each.outcome != 200]

    def failures(self) -> Counter[int | str]:
        """What came instead of an answer."""
        return Counter(each.outcome for each in self.failed())

    def run(self) -> None:
        asyncio.run(self._ask_all())

    async def _ask_all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        due = time.monotonic()
        async with (
            httpx.AsyncClient(headers=_headers(self._key), trust_env=False, timeout=120, limits=limits) as http,
            asyncio.TaskGroup() as asking,
        ):
            for stream, url in zip(self._turns(), itertools.cycle(self._urls), strict=False):
                if self.ending.is_set():
                    break
                asking.create_task(self._ask(http, url, stream))
                due += 1 / self._per_second
                await asyncio.sleep(due - time.monotonic())

    def _turns(self) -> itertools.cycle[bool]:
        """Each gateway gets both kinds."""
        return itertools.cycle([False] * len(self._urls) + [True] * len(self._urls))

    async def _ask(self, http: httpx.AsyncClient, url: str, stream: bool) -> None:
        began = time.monotonic()
        try:
            outcome = _outcome(await http.post(f"{url}/v1/completions", json={**self._body, "stream": stream}), stream)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        self.streams += stream
        self.asked.append(Asked(url, began, time.monotonic(), outcome))


class SdkLoad(Beside):
    """Plain requests to one gateway by the `openai` SDK as it comes, each after the one before, until it is left. It
    asks again by itself (`retries`) where a connection is refused or breaks.
    """

    def __init__(self, url: str, alias: str, key: str, **body: Any) -> None:
        super().__init__()
        self.requests = 0
        self.retries = 0
        self.slowest_s = 0.0
        self.failures: Counter[str] = Counter()
        self._client = OpenAI(base_url=f"{url}/v1", api_key=key)
        self._body = {"model": alias, "prompt": "x", **body}

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._client.close()

    def run(self) -> None:
        while not self.ending.is_set():
            began = time.monotonic()
            try:
                answer = self._client.completions.with_raw_response.create(**self._body)
                self.retries += answer.retries_taken
            except OpenAIError as error:
                self.failures[f"{type(error).__name__}: {error}"] += 1
            self.requests += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _outcome(answer: httpx.Response, stream: bool) -> int | str:
    broken = stream and answer.status_code == 200 and "[DONE]" not in answer.text
    return "broken stream" if broken else answer.status_code
