"""What a test does beside its own course."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Beside(ABC):
    """Runs in a thread of its own from when it is entered until it is left. What it raises is raised on leaving."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._thread = ThreadPoolExecutor(1, type(self).__name__)
        self._work: Future[None]

    @abstractmethod
    def run(self) -> None:
        """Until `ending` is set."""

    def __enter__(self) -> Self:
        self._work = self._thread.submit(self.run)
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._thread.shutdown()
        self._work.result()
