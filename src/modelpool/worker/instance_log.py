"""The log file of an instance: its last lines, what is added to it, and its rotation. All but `follow` blocks."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

MAX_BYTES = 16 << 20
KEEP = 2
_BLOCK = 1 << 16
_TAIL_MAX_BYTES = 8 << 20
_FOLLOW_INTERVAL_S = 0.25

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LEVEL = re.compile(r"\b(CRITICAL|ERROR|WARNING|INFO|DEBUG)\b")
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b")
_OUR_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ \w+ +\S+ \S+: ")


class InstanceLog:
    """One file, appended to by the host, rotated here: `name.log`, `name.log.1`, `name.log.2`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return self.path.exists()

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def tail(self, lines: int) -> tuple[bytes, int]:
        """The last `lines` lines, from the rotated files too, and where the file ended then."""
        end = self.size()
        text, missing = _last_lines(self.path, lines, end)
        for number in range(1, KEEP + 1):
            older = self._older(number)
            if missing <= 0 or not older.exists():
                break
            more, missing = _last_lines(older, missing, older.stat().st_size)
            text = more + text
        return text, end

    def read_from(self, offset: int) -> tuple[bytes, int]:
        """What was added since `offset`, a block at most, and the new offset. After a rotation, from the beginning."""
        if self.size() < offset:
            offset = 0
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.read(_BLOCK)
        except FileNotFoundError:
            return b"", 0
        return data, offset + len(data)

    async def follow(self, lines: int) -> AsyncIterator[bytes]:
        """The last lines, then what is added, until the caller ends it."""
        data, offset = await asyncio.to_thread(self.tail, lines)
        yield data
        while True:
            data, offset = await asyncio.to_thread(self.read_from, offset)
            if data:
                yield data
            else:
                await asyncio.sleep(_FOLLOW_INTERVAL_S)

    def rotate(self, max_bytes: int = MAX_BYTES) -> bool:
        """Copy the file away and truncate it where it has grown too large.

        The host keeps its descriptor and appends, so the file itself must stay; what it writes between the copy and
        the truncation is lost.
        """
        if self.size() <= max_bytes:
            return False
        for number in range(KEEP, 1, -1):
            if self._older(number - 1).exists():
                os.replace(self._older(number - 1), self._older(number))
        shutil.copy(self.path, self._older(1))  # with its mode
        os.truncate(self.path, 0)
        return True

    def last_words(self, since: int = 0) -> str:
        """The line after the offset `since` that most likely says why a process ended; "" if there is none.

        The last of the gravest ones, without colours and prefix. In a traceback that is the exception.
        """
        size = self.size()
        start = max(since if size >= since else 0, size - _BLOCK)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read(_BLOCK).decode(errors="replace")
        except FileNotFoundError:
            return ""
        lines = [line for line in _ESCAPES.sub("", text).splitlines() if _says_something(line)]
        if not lines:
            return ""
        line = max(reversed(lines), key=_gravity)
        line = _OUR_PREFIX.sub("", line.strip())
        return line if len(line) <= 300 else line[:299] + "…"


def _says_something(line: str) -> bool:
    """Not so: frames and carets of a traceback, which are indented, and rulers."""
    return bool(line[:1].strip()) and any(character.isalnum() for character in line)


def _gravity(line: str) -> int:
    level = _LEVEL.search(line, 0, 80)
    if level is not None:
        return {"CRITICAL": 3, "ERROR": 2}.get(level[0], 0)
    return 2 if _EXCEPTION.match(line) else 1


def _last_lines(path: Path, lines: int, end: int) -> tuple[bytes, int]:
    """Up to `lines` last lines of the first `end` bytes, and how many are missing."""
    if lines <= 0 or end == 0:
        return b"", lines
    data = b""
    start = end
    with path.open("rb") as file:
        while start > 0 and data.count(b"\n") <= lines and end - start < _TAIL_MAX_BYTES:
            start = max(0, start - _BLOCK)
            file.seek(start)
            data = file.read(end - start)
    found = data.splitlines(keepends=True)[-lines:]
    return b"".join(found), lines - len(found)
