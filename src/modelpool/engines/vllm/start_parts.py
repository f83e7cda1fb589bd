"""How long the parts of a start take that happen in vLLM's worker processes.

Their methods are timed where they are defined, in the host, for as long as it forks; the children inherit that and
write each time into a pipe. Where vLLM spawns its processes instead, nothing is written, and a start has no parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from modelpool.messages.engine import StartPhase

_PARTS = {
    "load_model": "weights",
    "determine_available_memory": "kv_cache",
    "initialize_from_config": "kv_cache",
    "compile_or_warm_up_model": "warm_up",
}


class StartParts:
    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @contextmanager
    def timed(self, worker: type) -> Iterator[None]:
        """Time the methods of this class in all processes that are forked while the block runs."""
        before = {name: worker.__dict__.get(name) for name in _PARTS}
        for name, part in _PARTS.items():
            setattr(worker, name, self._timed(getattr(worker, name), part))
        try:
            yield
        finally:
            for name, method in before.items():
                if method is None:
                    delattr(worker, name)
                else:
                    setattr(worker, name, method)
            os.close(self._write_end)

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            result = method(*args, **kwargs)
            with suppress(OSError):  # nobody needs it so much that a start may fail for it
                os.write(self._write_end, f"{part} {os.getpid()} {time.monotonic() - began}\n".encode())
            return result

        return timed

    def parts(self) -> tuple[StartPhase, ...]:
        """All parts, once: of workers side by side, the slowest one's time."""
        with suppress(BlockingIOError), os.fdopen(self._read_end, "rb") as pipe:
            return slowest(pipe.read() or b"")
        return ()


def slowest(lines: bytes) -> tuple[StartPhase, ...]:
    """The parts in lines of `part worker seconds`; a part may come several times for one worker."""
    sums: dict[str, dict[bytes, float]] = {part: {} for part in _PARTS.values()}
    for line in lines.splitlines():
        part, worker, seconds = line.split()
        of_workers = sums[part.decode()]
        of_workers[worker] = of_workers.get(worker, 0.0) + float(seconds)
    return tuple(StartPhase(part, max(of_workers.values())) for part, of_workers in sums.items() if of_workers)
