"""Where an upstream listens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit


class Endpoint(NamedTuple):
    """A TCP address; or a Unix socket: `host` is `unix:` and its path, `port` is 0."""

    host: str
    port: int = 0

    @classmethod
    def unix(cls, path: Path) -> Endpoint:
        return cls(f"unix:{path}")

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """From `http://host:port` or `unix:/path`. Raises ValueError for anything else."""
        if url.startswith("unix:"):
            return cls(url)
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not http://host:port or unix:/path")
        return cls(parts.hostname, parts.port or 80)

    @property
    def socket_path(self) -> str | None:
        return self.host.removeprefix("unix:") if self.host.startswith("unix:") else None

    @property
    def host_header(self) -> str:
        if self.socket_path is not None:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.host if self.socket_path is not None else self.host_header
