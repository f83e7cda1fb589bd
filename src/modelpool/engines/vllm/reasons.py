"""Why a model could not be loaded, in a line or two, wherever in vLLM's processes it went wrong.

When EngineCore or a worker process fails, the exception stays in that process; all that its parent raises is "see root
cause above". So the loggers that report it there carry a filter (which, unlike a handler, outlives vLLM's
reconfiguration of logging in each child), and the filter writes the exception into a pipe that the host reads.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Where EngineCore and the worker processes log the exception that ends them.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor", "vllm.v1.executor.uniproc_executor")
_GENERIC = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|See root cause above")
_REASON_MAX = 400
# Where the advice begins that nobody can take who reads it in a status line.
_ADVICE = re.compile(
    r"\s*(Supported architectures: |See https?://|For further information|You can update Transformers"
    r"|To allow overriding this maximum)"
)
_SEPARATOR = b"\0"


class RootCauses(logging.Filter):
    """The exceptions that ended processes below this one, oldest first. Attached before the fork."""

    def __init__(self) -> None:
        super().__init__()
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect while the block runs, in this process and, for good, in all that are forked in it."""
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)
        try:
            yield
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not _GENERIC.search(str(error)):
            # A full pipe means that the first causes, the ones that matter, are in it already.
            with suppress(BlockingIOError):
                os.write(self._write_end, reason(error).encode()[:2000] + _SEPARATOR)
        return True

    def first(self) -> str | None:
        """The first cause since the last call."""
        data = b""
        with suppress(BlockingIOError):
            while piece := os.read(self._read_end, 65536):
                data += piece
        causes = [cause for cause in data.split(_SEPARATOR) if cause]
        return causes[0].decode(errors="replace") if causes else None


def reason(error: BaseException) -> str:
    """What went wrong, for people: no trace, no type where the text says it all, at most a few hundred characters."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"Out of memory: {_shortened(str(error)) or 'an allocation failed'}"
    if type(error).__name__ == "SafetensorError":
        return f"A weights file is damaged: {_shortened(str(error))}"
    text = _validation_text(error) or str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if not text.strip():
        return type(error).__name__
    if isinstance(error, ValueError | NotImplementedError | OSError | RuntimeError):
        return _shortened(text)
    return _shortened(f"{type(error).__name__}: {text}")


def _validation_text(error: BaseException) -> str | None:
    """The first problem of a pydantic error, which says in one line what its own text says in four."""
    errors: Any = getattr(error, "errors", None)
    if type(error).__name__ != "ValidationError" or not callable(errors):
        return None
    first = errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()))
    text = str(first.get("msg", "")).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{where}: {text}" if where else text


def _shortened(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    # A trace that was made into text: what it is about is in its last line.
    wanted = lines[-1:] if any(line.startswith("Traceback (") for line in lines) else lines[:2]
    short = " ".join(wanted)
    if advice := _ADVICE.search(short):
        short = short[: advice.start()]
    return short if len(short) <= _REASON_MAX else short[: _REASON_MAX - 1] + "…"


def is_generic(error: BaseException) -> bool:
    return bool(_GENERIC.search(str(error)))
