"""The file by which the commands of a machine find the pool that serves there."""

from __future__ import annotations

from pathlib import Path

import msgspec

from modelpool.home import open_private
from modelpool.settings import Settings


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool leaves in its run directory. `pid` is the process to `kill`, where there is one that ends it all.

    `cert_file`: what it serves https with.
    """

    url: str
    run_id: str
    pid: int = 0
    cert_file: str = ""


def address_file(settings: Settings) -> Path:
    return settings.home_path / "run" / "pool.json"


def write_address(settings: Settings, url: str, *, pid: int = 0) -> None:
    cert_file = settings.gateway.tls_cert_file
    known = str(Path(cert_file).expanduser().absolute()) if cert_file else ""
    with open_private(address_file(settings), "wb") as file:
        file.write(msgspec.json.encode(PoolAddress(url=url, run_id=settings.run_id, pid=pid, cert_file=known)))


def local_address(settings: Settings) -> PoolAddress | None:
    """Where the pool of this home serves; None where none runs."""
    try:
        return msgspec.json.decode(address_file(settings).read_bytes(), type=PoolAddress)
    except (OSError, msgspec.DecodeError):
        return None
