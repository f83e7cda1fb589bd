"""Where models come from: a folder on this machine, or a hub, by a fetch that all who want the same model share."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from modelpool.home import open_private
from modelpool.messages.fetch import Fetched, FetchProgress, FromFetch, NotFetched
from modelpool.worker.model_files import cached_models, hub_cache

log = logging.getLogger(__name__)

GB = 10**9
_TERM_S = 2.0
_LOOK_S = 30.0
"""So often it is looked at which models are here."""
_NOT_FOR_FETCH = frozenset({"MODELPOOL_TOKEN", "MODELPOOL_API_KEY", "MODELPOOL_READY_FD"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

OnProgress = Callable[[int, int], None]
"""(bytes here, bytes in all)"""


class FetchFailed(Exception):
    """The model is not on this machine and cannot be brought here; the text is one line for people.

    `permanent`: the name itself is wrong, and will be at the next try.
    """

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


class Hub:
    """Brings models to this machine. `environ` is what fetch processes get; `timeout_s` is for one fetch."""

    def __init__(self, *, environ: Mapping[str, str], timeout_s: float, log_path: Path) -> None:
        kept = {name: value for name, value in environ.items() if name not in _NOT_FOR_FETCH}
        self._environ = {**kept, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._timeout_s = timeout_s
        self._log_path = log_path
        self._fetches: dict[tuple[str, str | None], _Fetch] = {}
        # Those that were asked for, by the names that they were asked for with.
        self._folders: dict[str, Path] = {}
        self._here: tuple[str, ...] = ()
        self._looked_at = -math.inf

    async def local_path(self, name: str, *, revision: str | None, on_progress: OnProgress) -> str:
        """The folder of a model, after fetching it where it is not one. Raises FetchFailed.

        A fetch ends when nobody waits for it any more.
        """
        if (folder := await asyncio.to_thread(local_folder, name)) is not None:
            if name not in self._folders:
                self._folders[name] = Path(folder)
                self._looked_at = -math.inf
            return folder
        key = (name, revision)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = _Fetch(name, revision, self._environ, self._timeout_s, self._log_path)
        fetch.join(on_progress)
        try:
            await asyncio.wait({fetch.task})
            return fetch.task.result()
        finally:
            self._looked_at = -math.inf
            if fetch.leave(on_progress) and self._fetches.get(key) is fetch:
                del self._fetches[key]
                fetch.task.cancel()
                await asyncio.wait({fetch.task})

    async def models_here(self) -> tuple[str, ...]:
        """Models whose files are on this machine: all in the hub's cache, and those of the folders asked for so far."""
        if time.monotonic() - self._looked_at > _LOOK_S:
            self._looked_at = time.monotonic()
            self._here = await asyncio.to_thread(self._look)
        return self._here

    def _look(self) -> tuple[str, ...]:
        folders = (name for name, folder in list(self._folders.items()) if folder.is_dir())
        return tuple(sorted({*cached_models(hub_cache(self._environ)), *folders}))


class _Fetch:
    """One fetch process, owned by those who wait for it."""

    def __init__(
        self, name: str, revision: str | None, environ: Mapping[str, str], timeout_s: float, log_path: Path
    ) -> None:
        self._name = name
        self._revision = revision
        self._environ = environ
        self._timeout_s = timeout_s
        self._log_path = log_path
        self._progress = FetchProgress(0, 0)
        self._waiting: list[OnProgress] = []
        self.task = asyncio.create_task(self._run(), name=f"fetch {name}")

    def join(self, on_progress: OnProgress) -> None:
        self._waiting.append(on_progress)
        on_progress(self._progress.done_bytes, self._progress.total_bytes)

    def leave(self, on_progress: OnProgress) -> bool:
        """Whether nobody is left."""
        self._waiting.remove(on_progress)
        return not self._waiting

    async def _run(self) -> str:
        """Raises FetchFailed."""
        process = await self._spawn()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._read(process)
        except TimeoutError:
            done, total = self._progress.done_bytes / GB, self._progress.total_bytes / GB
            raise FetchFailed(
                f"{self._name} was not fetched within {self._timeout_s:g} s ({done:.2f} of {total:.2f} GB are here)"
            ) from None
        finally:
            await _end(process)

    async def _spawn(self) -> Process:
        command = ["-m", "modelpool.worker.fetch", self._name]
        if self._revision:
            command.append(self._revision)
        with open_private(self._log_path, "ab") as output:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                env=dict(self._environ),
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=output,
                start_new_session=True,
            )

    async def _read(self, process: Process) -> str:
        assert process.stdout is not None
        async for line in process.stdout:
            match msgspec.json.decode(line, type=FromFetch):
                case FetchProgress() as progress:
                    self._progress = progress
                    for on_progress in self._waiting:
                        on_progress(progress.done_bytes, progress.total_bytes)
                case Fetched(path):
                    log.info("%s is in %s", self._name, path)
                    return path
                case NotFetched(reason, permanent):
                    raise FetchFailed(reason, permanent=permanent)
        status = await process.wait()
        raise FetchFailed(f"fetching {self._name} ended with status {status}; {self._log_path} says why")


def local_folder(name: str) -> str | None:
    """The absolute path when `name` is a folder here, None when it can only be on a hub. Raises FetchFailed. Blocks."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.exists():
        raise FetchFailed(f"model_name: {name} is a file, not the folder of a model", permanent=True)
    if name.startswith(("/", "./", "../", "~")):
        raise FetchFailed(f"model_name: {name} does not exist", permanent=True)
    if not _HUB_NAME.fullmatch(name):
        raise FetchFailed(f"model_name: {name} is neither a folder on this machine nor a name on a hub", permanent=True)
    return None


async def _end(process: Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_TERM_S):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
