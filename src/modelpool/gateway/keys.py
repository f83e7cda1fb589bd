"""The managed API keys as this gateway knows them: whose a key is, and what it may do."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from modelpool.core.limits import Limits
from modelpool.errors import Forbidden, Unauthorized
from modelpool.gateway.table import Gap
from modelpool.messages.routing import KeyEntry, KeysDelta, KeysUpdate


class Caller:
    """Who sends a request: one object per key, the same for all its requests. Nothing but `live` ever changes."""

    __slots__ = ("id", "limits", "live", "models", "name", "priority")

    def __init__(self, entry: KeyEntry) -> None:
        self.id = entry.id
        self.name = entry.name
        self.models = frozenset(entry.models)
        """Aliases it may use; empty: all."""
        self.priority = entry.priority
        """The higher, the sooner a request of it is served when there is a queue."""
        limits = Limits(
            requests=entry.requests_per_minute, tokens=entry.tokens_per_minute, concurrency=entry.max_concurrency
        )
        self.limits = None if limits == Limits() else limits
        self.live = True
        """False once it is revoked."""

    def may_use(self, alias: str) -> bool:
        return not self.models or alias in self.models

    def check(self, alias: str) -> None:
        """Raises Unauthorized where the key was revoked since the request's head came, Forbidden for the model.

        Forbidden as OpenAI has it for projects, and said before anyone looks whether the model is there: who may not
        use it need not learn that it is.
        """
        if not self.live:
            raise Unauthorized("The API key was revoked.")
        if self.models and alias not in self.models:
            raise Forbidden(
                f"This API key may not use a model `{alias}`; GET /v1/models lists those that it may.",
                param="model",
                code="model_not_allowed",
            )


class KeyRing:
    """The live keys, by the digest of their secrets: the secrets themselves are nowhere.

    `known` is False until the manager was heard; `required` once a key was ever made, even if all are revoked.
    """

    def __init__(self) -> None:
        self.known = False
        self.required = False
        self._epoch = ""
        self._sequence = 0
        self._entries: dict[str, KeyEntry] = {}
        self._callers: dict[bytes, Caller] = {}
        self._when_gone: list[Callable[[Caller], None]] = []

    def when_gone(self, act: Callable[[Caller], None]) -> None:
        """Have `act` called for each caller whose key is revoked."""
        self._when_gone.append(act)

    def caller(self, secret: bytes) -> Caller | None:
        """Whose key it is. In a dict of digests there is nothing to time: nobody can choose a digest."""
        return self._callers.get(sha256(secret).digest())

    def apply(self, update: KeysUpdate) -> None:
        """Raises table.Gap, having changed nothing."""
        if isinstance(update, KeysDelta):
            if (update.epoch, update.sequence) != (self._epoch, self._sequence + 1):
                raise Gap(f"keys {update.epoch}/{update.sequence} do not follow {self._epoch}/{self._sequence}")
            kept = {id: entry for id, entry in self._entries.items() if id not in update.revoked}
            self._hold({**kept, **{entry.id: entry for entry in update.made}})
            self.required = self.required or bool(update.made)
        else:
            self._hold({entry.id: entry for entry in update.keys})
            self.required = update.required
        self.known = True
        self._epoch, self._sequence = update.epoch, update.sequence

    def _hold(self, entries: dict[str, KeyEntry]) -> None:
        before = {caller.id: caller for caller in self._callers.values()}
        callers: dict[bytes, Caller] = {}
        for id, entry in entries.items():
            same = self._entries.get(id) == entry
            callers[bytes.fromhex(entry.digest)] = before.pop(id) if same else Caller(entry)
        for gone in before.values():
            gone.live = False
        self._entries, self._callers = entries, callers
        for caller in before.values():
            for act in self._when_gone:
                act(caller)
