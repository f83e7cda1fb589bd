"""What the manager learns of its models by watching them, kept in the store so that the next one knows it at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from modelpool.core.learned import Learned, from_record, to_record
from modelpool.core.pool import Pool, at_rest
from modelpool.manager.store import Store, StoredExperience, StoreError

log = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
"""At most so often. A manager that is killed takes what it learned since with it, which does no harm."""


class Recollection:
    """Writes what is new, all of it in one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: Mapping[str, tuple[Learned, bool]] = {}

    async def recall(self) -> dict[str, tuple[str, Learned, bool]]:
        """By alias: the key of the model that it is about, what was learned, and whether it was at rest."""
        stored = await self._store.experience()
        recalled = {each.alias: (each.key, from_record(each.measured), each.resting) for each in stored}
        self._kept = {alias: (learned, resting) for alias, (_, learned, resting) in recalled.items()}
        return recalled

    async def save(self, pool: Pool) -> None:
        """Not while models are registered or removed. What cannot be written now is tried again with the next."""
        resting = at_rest(pool)
        now = {alias: (learned, alias in resting) for alias, learned in pool.learned.items()}
        new = [
            StoredExperience(
                alias=alias,
                key=pool.models[alias].key,
                resting=resting_,
                measured=to_record(learned),
            )
            for alias, (learned, resting_) in now.items()
            if (before := self._kept.get(alias)) is None or before[0] is not learned or before[1] != resting_
        ]
        if not new:
            return
        try:
            await self._store.keep_experience(new)
        except StoreError as error:
            log.warning("what was learned of %d models is not kept yet: %s", len(new), error)
        else:
            self._kept = now
