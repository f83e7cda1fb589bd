"""Manager → command line and other programs: API keys, as `POST`, `GET` and `DELETE /admin/keys` have them."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta

from modelpool.messages.models import ModelSpec

SECRET_PREFIX = "mp-"
ID_PREFIX = "key-"

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._@+-]*[A-Za-z0-9])?")

AliasText = Annotated[str, Meta(min_length=1, max_length=128)]
PerMinute = Annotated[int, Meta(ge=1, le=10**12)]
Concurrency = Annotated[int, Meta(ge=1, le=10**6)]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]


class KeySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key may do: the body of `POST /admin/keys`. Without a limit there is none; without models, all."""

    name: Annotated[str, Meta(min_length=1, max_length=128, description="Whose it is. No other live key has it.")]
    models: Annotated[tuple[AliasText, ...], Meta(max_length=1000, description="Aliases; empty: all.")] = ()
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    max_concurrency: Concurrency | None = None
    priority: Priority = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} must be letters, digits, and ' ', '.', '_', '-', '@', '+' between")
        if self.name.startswith(ID_PREFIX):
            raise ValueError(f"name: {self.name!r} begins with `{ID_PREFIX}`, as the keys' ids do")
        for alias in self.models:
            _check_alias(alias)


def _check_alias(alias: str) -> None:
    """Raises ValueError for what no model can be registered as. Whether one is does not matter: it may be later."""
    try:
        ModelSpec(alias=alias, fake=True)
    except ValueError as error:
        raise ValueError(f"models: {str(error).removeprefix('alias: ')}") from error


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """A key as its owner's administrator sees it. Its secret is nowhere. Times are in seconds since 1970."""

    id: str
    name: str
    models: tuple[str, ...]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    priority: int
    created: int
    revoked: int | None = None


class KeyMade(msgspec.Struct, frozen=True, kw_only=True):
    """The only time that the secret is shown."""

    key: KeyView
    secret: str
