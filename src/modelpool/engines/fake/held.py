"""Real memory that a fake engine holds, so that giving it back can be seen from outside."""

from __future__ import annotations

import mmap

_MB = 10**6


class Held:
    """So many megabytes, every page of them touched, while taken."""

    def __init__(self, megabytes: float) -> None:
        self.bytes = int(megabytes * _MB)
        self._memory: mmap.mmap | None = None

    def take(self) -> None:
        if self.bytes and self._memory is None:
            self._memory = mmap.mmap(-1, self.bytes)
            self._memory.write(b"\1" * self.bytes)

    def give_back(self) -> int:
        """Returns how many bytes it were."""
        if self._memory is None:
            return 0
        self._memory.close()
        self._memory = None
        return self.bytes
