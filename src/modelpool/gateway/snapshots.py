"""Keeps routing table and keys as the manager says: follows its stream of updates, and opens it again when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import msgspec

from modelpool.core.epoch import is_older
from modelpool.errors import PoolError
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.table import Gap, Table
from modelpool.messages.routing import KEEPALIVE_S, Keys, KeysDelta, Others, decode_update
from modelpool.relay import Pool, Response, encode_request, fetch, fixed_headers

log = logging.getLogger(__name__)

SILENCE_S = 3 * KEEPALIVE_S
RETRY_INITIAL_S = 0.05
RETRY_MAX_S = 0.5
_LINE_MAX = 256 << 20


class Broken(Exception):
    """The stream of snapshots cannot be followed any further. Says why."""


class SnapshotFeed:
    """Follows the manager. While it is away table and keys stay as they were last."""

    def __init__(
        self,
        table: Table,
        keys: KeyRing,
        control: Pool,
        *,
        gateway: str = "",
        hear: Callable[[Others], None] = lambda others: None,
    ) -> None:
        self._hear = hear
        self._table = table
        self._keys = keys
        self._control = control
        self._gateway = gateway
        self.heard_at: float | None = None
        """When the manager was last heard, on the loop's clock."""
        self.connected = False
        self._first = asyncio.Event()
        self._ahead = False
        """The manager is of this gateway's own cluster, and earlier than one that was heard."""

    async def wait_first(self, at_most_s: float) -> None:
        """Return once there is a table to route by, or when that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._first.wait()

    async def follow(self) -> None:
        """Until cancelled."""
        pause = RETRY_INITIAL_S
        while True:
            try:
                await self._follow_once()
            except (PoolError, Broken, Gap, TimeoutError) as error:
                log.log(
                    logging.WARNING if self.connected else logging.DEBUG,
                    "the manager is away: %s",
                    str(error) or "it says nothing",
                )
            if self.connected:
                pause = RETRY_INITIAL_S
            self.connected = self._table.current = False
            await asyncio.sleep(pause)
            pause = min(RETRY_MAX_S, pause * 2)

    async def _follow_once(self) -> None:
        # A gateway that knows no models follows whoever is there, but one of its own cluster is to be the latest.
        known = self._table.epoch if self._table.models() or self._ahead else ""
        self._ahead = False
        path = f"/snapshots?gateway={self._gateway}&epoch={known}".encode()
        request = encode_request(b"GET", path, [], fixed=fixed_headers(self._control.endpoint))
        async with asyncio.timeout(SILENCE_S) as silence, fetch(self._control, request) as response:
            if response.status != 200:
                raise Broken(f"its answer has status {response.status}")
            loop = asyncio.get_running_loop()
            async for line in _lines(response):
                self.heard_at = loop.time()
                silence.reschedule(self.heard_at + SILENCE_S)
                if line:
                    self._apply(line)
        raise Broken("it ended the stream")

    def _apply(self, line: bytes) -> None:
        try:
            update = decode_update(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Broken(f"its snapshot makes no sense: {error}") from error
        if update is None:
            return
        if is_older(update.epoch, self._table.epoch):
            self._ahead = True
            raise Broken(f"it has epoch {update.epoch}, and a later one was heard: {self._table.epoch}")
        if isinstance(update, Keys | KeysDelta):
            self._keys.apply(update)
            return
        if isinstance(update, Others):
            self._hear(update)
            return
        self._table.apply(update)
        self._first.set()
        if not self.connected:
            self.connected = True
            log.info("following the manager, epoch %s", self._table.epoch)


async def _lines(response: Response) -> AsyncIterator[bytes]:
    """Lines without their ends."""
    unread = bytearray()
    async for piece in response:
        unread += piece
        if b"\n" in piece:
            *lines, rest = bytes(unread).split(b"\n")
            unread = bytearray(rest)
            for line in lines:
                yield line
        elif len(unread) > _LINE_MAX:
            raise Broken("its line has no end")
