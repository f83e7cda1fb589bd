"""Fetch process → its worker, a line of JSON each on standard output: how far it is, and how it ended."""

from __future__ import annotations

import msgspec


class FetchProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Of the files that are needed, what is on this machine. At most once a second."""

    done_bytes: int
    total_bytes: int


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """The model's folder."""

    path: str


class NotFetched(msgspec.Struct, frozen=True, tag="not_fetched"):
    """`reason` is one line for people. `permanent`: the hub answered that there is no such model."""

    reason: str
    permanent: bool = False


FromFetch = FetchProgress | Fetched | NotFetched
