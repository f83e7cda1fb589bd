"""What the manager learns of its models by watching them, and what workers run, kept in the store so that the next one
knows it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from modelpool.core.learned import Learned, from_record, to_record
from modelpool.core.pool import Pool, at_rest
from modelpool.manager.store import Store, StoredExperience, StoreError
from modelpool.manager.views import WorkerFacts
from modelpool.messages.workers import WorkerDescription

log = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0
"""At most so often. A manager that is killed takes what it learned since with it, which does no harm."""


class Recollection:
    """Writes what is new, all of it in one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: Mapping[str, tuple[Learned, bool]] = {}
        self._kept_of: Mapping[str, object] = {}

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

    async def save_workers(self, known: Mapping[str, WorkerFacts]) -> None:
        """What workers run, for a manager that comes while they are silent. Tried again with the next."""
        now = {
            worker_id: (facts.info, {name: report.changed_at for name, report in facts.reports.items()})
            for worker_id, facts in known.items()
        }
        new = [known[worker_id] for worker_id, said in now.items() if self._kept_of.get(worker_id) != said]
        if not new:
            return
        descriptions = [
            WorkerDescription(
                info=facts.info,
                devices=facts.devices,
                engines=dict(facts.engines),
                instances=tuple(facts.reports.values()),
                host=facts.host,
            )
            for facts in new
        ]
        try:
            await self._store.keep_last_known(descriptions)
        except StoreError as error:
            log.warning("what %d workers run is not kept yet: %s", len(new), error)
        else:
            self._kept_of = now
