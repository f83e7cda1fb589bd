"""The models of the pool: registered, changed, removed. A change is in the store before it is known."""

from __future__ import annotations

import difflib
import logging
import time
from functools import partial
from typing import Any

from modelpool.core import events
from modelpool.errors import Conflict, ModelNotFound
from modelpool.manager import views
from modelpool.manager.parts import in_parts
from modelpool.manager.recollection import Recollection
from modelpool.manager.registered import differences
from modelpool.manager.state import State
from modelpool.manager.store import Store
from modelpool.manager.translation import key_of, model_of
from modelpool.manager.writing import Writing
from modelpool.messages.admin import ModelView
from modelpool.messages.dump import StoredModel
from modelpool.messages.models import CHANGEABLE, ModelSpec, changed

log = logging.getLogger(__name__)

_FORMER_MAX = 8
"""So many changes of a model back, what it was may still be served by instances that run."""


class Models:
    def __init__(self, state: State, store: Store, writing: Writing) -> None:
        self._state = state
        self._store = store
        self._writing = writing

    async def recall(self, recollection: Recollection) -> None:
        experience = await recollection.recall()
        known = []
        for stored in await self._store.models():
            self._state.specs[stored.spec.alias] = stored.spec
            model = model_of(stored)
            key, learned, resting = experience.get(model.alias, ("", {}, False))
            if key != model.key:
                learned, resting = {}, False
            known.append(events.ModelRegistered(model, learned, resting))
        self._state.register(known)

    async def reread(self) -> None:
        """Know what the store knows. Raises StoreError. Held to be writing."""
        specs = self._state.specs
        stored = {each.spec.alias: each for each in await self._store.models()}
        for alias in [alias for alias in specs if alias not in stored]:
            self._forget(alias)
        new = [each for alias, each in stored.items() if alias not in specs]
        self._state.register(events.ModelRegistered(model_of(each)) for each in new)
        specs |= {each.spec.alias: each.spec for each in new}
        for alias, each in stored.items():
            if specs[alias] != each.spec:
                self._take(each)

    async def register(self, spec: ModelSpec, *, replace: bool) -> None:
        """Raises Conflict for another spec under an alias that is taken, unless it is to `replace` that."""
        async with self._writing.in_turn():
            known = self._state.specs.get(spec.alias)
            if known is not None and known != spec and not replace:
                raise _taken(known, spec)
            if known is None:
                stored = StoredModel(spec, int(time.time()))
                await self._store.add_model(stored.spec, stored.created)
                self._take(stored)
                log.info("registered %s (%s)", spec.alias, spec.model_name or spec.engine)
            elif known != spec:
                await self._change(known, spec)

    async def change(self, alias: str, change: dict[str, Any]) -> None:
        """Raises ModelNotFound, InvalidBody."""
        async with self._writing.in_turn():  # each change is one to what the one before left
            self.require(alias)
            before = self._state.specs[alias]
            spec = changed(before, change)
            if spec != before:
                await self._change(before, spec)

    async def _change(self, before: ModelSpec, spec: ModelSpec) -> None:
        """What instances of other keys serve stays in use until those of the new one do."""
        known, key = self._state.pool.models[spec.alias], key_of(spec)
        former = (known.key, *known.replaces) if key != known.key else known.replaces
        replaces = tuple(each for each in former if each != key)[:_FORMER_MAX]
        await self._store.change_model(spec, replaces)
        self._take(StoredModel(spec, known.created, replaces))
        log.info("changed %s: %s", spec.alias, ", ".join(differences(before, spec)))

    async def remove(self, alias: str) -> None:
        """Raises ModelNotFound."""
        async with self._writing.in_turn():
            self.require(alias)
            await self._store.remove_model(alias)
            self._forget(alias)
            log.info("removed %s", alias)

    def _take(self, stored: StoredModel) -> None:
        """What the store has of a model: it is new, or has changed."""
        model = model_of(stored)
        before = self._state.pool.models.get(model.alias)
        if before is None:
            self._state.apply(events.ModelRegistered(model))
        else:
            self._state.apply(events.ModelChanged(model) if before.key == model.key else events.ModelReplaced(model))
        self._state.specs[model.alias] = stored.spec

    def _forget(self, alias: str) -> None:
        del self._state.specs[alias]
        self._state.apply(events.ModelRemoved(alias))

    def require(self, alias: str) -> None:
        """Raises ModelNotFound."""
        if alias not in self._state.specs:
            raise ModelNotFound(alias, difflib.get_close_matches(alias, self._state.specs, 3))

    def view(self, alias: str) -> ModelView:
        """Raises ModelNotFound."""
        self.require(alias)
        return views.model_view(self._state.known(), alias)

    async def views(self) -> list[ModelView]:
        return await in_parts(partial(views.model_view, self._state.known_for_long()), sorted(self._state.pool.models))


def _taken(known: ModelSpec, spec: ModelSpec) -> Conflict:
    differing = differences(known, spec)
    cure = "PATCH /admin/models/{alias} (`modelpool set`) changes that."
    if not set(differing) <= set(CHANGEABLE):
        cure = "Replace it (`replace=true`, `modelpool register --replace`), or use another alias."
    return Conflict(
        f"The alias `{spec.alias}` is registered with another body (it differs in {', '.join(differing)}). {cure}",
        param="alias",
        code="alias_taken",
    )
