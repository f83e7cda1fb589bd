"""A part of a pool as its pool runs it: a process, which says on a pipe whether it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from modelpool.process import READY_FD, Announcement, NotStarted, Ready


@contextmanager
def part_process(
    part: str, output: Path, environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Announcement]]:
    """`python -m modelpool.PART`, and what it said. Left, it is killed with its group, if it has not ended by then."""
    read, write = os.pipe()
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"modelpool.{part}"],
            env={**environ, READY_FD: str(write)},
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    os.close(write)
    try:
        with os.fdopen(read, "rb") as announcements:
            line = announcements.readline()
        assert line, output.read_text()
        yield process, msgspec.json.decode(line, type=Ready | NotStarted)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
