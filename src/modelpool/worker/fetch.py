"""Fetches a model from a hub: `python -m modelpool.worker.fetch REPOSITORY [REVISION]`.

A process of its own, so that it can be ended at any moment and its library's threads are nobody else's. Messages go to
standard output (modelpool.messages.fetch), the library's talk to standard error. What a connection lost in the middle
is resumed by the library; after a process was ended, whole files are what is kept.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import huggingface_hub
import msgspec
from huggingface_hub import constants, errors

from modelpool import process
from modelpool.messages.fetch import Fetched, FetchProgress, FromFetch, NotFetched
from modelpool.worker.model_files import OLD_WEIGHTS, SAFE_WEIGHTS, is_complete

GB = 10**9
_PROGRESS_S = 1.0
_HUB_TIMEOUT_S = 15.0
_LITTER_AGE_S = 24 * 3600.0
# Room for what the file system itself needs.
_DISK_MARGIN = 64 << 20

# Code is only run where `trust_remote_code` allows it.
_OTHER = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")
_OTHER_FRAMEWORKS = frozenset({"original", "onnx", "openvino", "coreml", "flax", "tf", "gguf", "metal"})
_HTTP_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})
_NOT_A_MODEL = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state.pth", "optimizer.pt"})


class RepoFile(msgspec.Struct, frozen=True):
    """A file of a repository: its path there, and its size in bytes."""

    name: str
    size: int


class DiskFull(Exception):
    """The message has the numbers."""


def needed_files(files: Iterable[RepoFile]) -> list[RepoFile]:
    """What an engine reads: configuration, tokenizer, templates, and one set of weights, safetensors where they are."""
    ours = [file for file in files if not _OTHER_FRAMEWORKS & set(PurePosixPath(file.name).parts[:-1])]
    weights = [file for file in ours if file.name.endswith(SAFE_WEIGHTS)]
    if not weights:
        weights = [file for file in ours if file.name.endswith(OLD_WEIGHTS) and _name(file) not in _NOT_A_MODEL]
    # Mistral publishes the same weights twice.
    if any(not _name(file).startswith("consolidated") for file in weights):
        weights = [file for file in weights if not _name(file).startswith("consolidated")]
    return weights + [file for file in ours if file.name.endswith(_OTHER)]


def _name(file: RepoFile) -> str:
    return PurePosixPath(file.name).name


def check_disk(needed_bytes: int, free_bytes: int, folder: Path) -> None:
    """Raises DiskFull."""
    if needed_bytes and needed_bytes + _DISK_MARGIN > free_bytes:
        raise DiskFull(
            f"disk full: {needed_bytes / GB:.2f} GB are to be fetched, {free_bytes / GB:.2f} GB are free in {folder} "
            "(HF_HOME chooses another place)"
        )


class Cache:
    """The library's cache of one repository."""

    def __init__(self, repository: str) -> None:
        self.root = Path(constants.HF_HUB_CACHE).expanduser()
        self._folder = self.root / f"models--{repository.replace('/', '--')}"
        self._began = time.time()

    def missing(self, files: Iterable[RepoFile], commit: str) -> list[RepoFile]:
        snapshot = self._folder / "snapshots" / commit
        return [file for file in files if not (snapshot / file.name).exists()]

    def arriving_bytes(self) -> int:
        """What has been written, since this process began, to files that are not complete."""
        return sum(
            min(stat.st_size, stat.st_blocks * 512) for stat, _ in self._incomplete() if stat.st_mtime >= self._began
        )

    def sweep(self) -> None:
        """Remove what processes that were killed long ago left; nothing can be resumed from it."""
        for stat, path in self._incomplete():
            if stat.st_mtime < self._began - _LITTER_AGE_S:
                path.unlink(missing_ok=True)

    def _incomplete(self) -> Iterator[tuple[os.stat_result, Path]]:
        for path in self._folder.glob("blobs/*.incomplete"):
            with suppress(FileNotFoundError):
                yield path.stat(), path

    def free_bytes(self) -> int:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def fetch(repository: str, revision: str | None) -> Path:
    """The model's folder, fetched as far as it was not there. Blocks; raises what the library raises, and DiskFull."""
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_S
        )
    except Exception as error:
        # Whatever keeps the hub from answering, a model that is here already can be used.
        if not _is_unreachable(error) or (snapshot := _cached(repository, revision)) is None:
            raise
        say(f"{error}: using {snapshot}")
        return snapshot
    commit = info.sha or ""
    files = needed_files(RepoFile(each.rfilename, each.size or 0) for each in info.siblings or ())
    cache = Cache(repository)
    cache.sweep()
    missing = cache.missing(files, commit)
    check_disk(sum(file.size for file in missing), cache.free_bytes(), cache.root)
    with _reported_progress(cache, files, commit):
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision,  # by name, so that it is found by name when the hub is away
            allow_patterns=[glob.escape(file.name) for file in files],
            etag_timeout=_HUB_TIMEOUT_S,
        )
    return Path(path)


def _cached(repository: str, revision: str | None) -> Path | None:
    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(path) if is_complete(Path(path)) else None


@contextmanager
def _reported_progress(cache: Cache, files: Sequence[RepoFile], commit: str) -> Iterator[None]:
    """Send FetchProgress at once, every second meanwhile, and at the end."""
    total = sum(file.size for file in files)
    ended = threading.Event()

    def report() -> None:
        here = total - sum(file.size for file in cache.missing(files, commit))
        send(FetchProgress(min(total, here + cache.arriving_bytes()), total))

    def keep_reporting() -> None:
        while not ended.wait(_PROGRESS_S):
            report()

    report()
    reporter = threading.Thread(target=keep_reporting, name="progress", daemon=True)
    reporter.start()
    try:
        yield
        ended.set()
        reporter.join()
        report()
    finally:
        ended.set()


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub gave no answer, or none of use. The library has changed its HTTP client more than once."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    if isinstance(error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError):
        return True
    return type(error).__module__.partition(".")[0] in _HTTP_CLIENTS


def is_no_such_model(error: BaseException) -> bool:
    """Whether the name is wrong, as against a hub that is away or wants something first."""
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError there
        return False
    return isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError)


def explain(error: BaseException, repository: str, revision: str | None) -> str:
    """Any error of `fetch` as one line that says what to do."""
    endpoint = constants.ENDPOINT
    token = bool(os.environ.get("HF_TOKEN"))
    if isinstance(error, DiskFull):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while fetching {repository} into {constants.HF_HUB_CACHE} (HF_HOME chooses another place)"
    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint}/{repository}"
        if token:
            return f"{repository} is gated, and the account of HF_TOKEN has no access: ask for it at {page}"
        return f"{repository} is gated: accept its conditions at {page} and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "the HF_TOKEN that is set may not read it" if token else "set HF_TOKEN if it is private"
        return f"{repository} was not found at {endpoint}; check the name ({hint})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r} at {endpoint}"
    if isinstance(error, errors.HFValidationError):
        return f"model_name: {repository!r} is neither a folder on this machine nor a name on a hub"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return f"{endpoint} refuses the HF_TOKEN that is set (401): it is wrong or has expired"
        if status < 500:
            return f"{endpoint} refuses {repository} with status {status}: {_first_line(error)}"
    if _is_unreachable(error):
        return (
            f"{endpoint} cannot be reached ({_first_line(error)}), and {repository} is not complete on this machine; "
            "check the network, HF_ENDPOINT and the proxy settings"
        )
    if isinstance(error, PermissionError):
        return f"{error.filename} cannot be written (HF_HOME chooses another place)"
    return f"{repository} cannot be fetched: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def send(message: FromFetch) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(*_: object) -> None:
    """SIGTERM: nothing can be resumed from what is half written, so it is removed."""
    with suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                if (path := os.readlink(entry.path)).endswith(".incomplete"):
                    os.unlink(path)
    os._exit(1)


def main(argv: Sequence[str]) -> int:
    repository = argv[0]
    revision = argv[1] if len(argv) > 1 else None
    signal.signal(signal.SIGTERM, _leave)
    process.end_with_parent()
    say(f"fetching {repository}{f' at {revision}' if revision else ''} from {constants.ENDPOINT}")
    try:
        path = fetch(repository, revision)
    except Exception as error:  # noqa: BLE001  the top of a process: whatever it is, the worker is told
        say(f"{type(error).__name__}: {error}")
        send(NotFetched(explain(error, repository, revision), permanent=is_no_such_model(error)))
        return 1
    send(Fetched(str(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
