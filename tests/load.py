"""A steady load on a pool, and what came of it."""

from __future__ import annotations

import threading
from collections import Counter

import httpx


class Load:
    """Requests, streams and plain ones in turn, until it is left; what came of them."""

    def __init__(self, url: str, alias: str, key: str) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60)
        self._alias = alias
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._http.close()

    def _ask(self) -> None:
        stream = False
        while not self._ending.wait(0.02):
            stream = not stream
            body = {"model": self._alias, "prompt": "x", "stream": stream}
            try:
                answer = self._http.post("/v1/completions", json=body)
                broken = stream and answer.status_code == 200 and "[DONE]" not in answer.text
                self.statuses["broken stream" if broken else answer.status_code] += 1
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1
