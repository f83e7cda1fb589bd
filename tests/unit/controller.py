"""The controller, checked at every step: looking only at what may have changed decides as looking at all does."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from modelpool.core.ledger import ledger
from modelpool.core.pool import Event, Pool, apply, instances_on
from modelpool.core.reconcile import Effect, reconcile


def checked_step(pool: Pool, event: Event, now: float) -> tuple[Pool, Sequence[Effect]]:
    """`step`, which must decide as it does when it looks at every model, and must keep its indexes right.

    But for those who wait for room: these are looked at once a second. Nor is said at once what those wait for who give
    way in this very round: they are looked at in the next.
    """
    applied = apply(pool, event, now)
    after, effects = reconcile(applied, now)
    everything = frozenset(applied.models.keys() | applied.of_model.keys())
    touched = (everything - applied.shortages.keys()) | applied.touched
    whole, all_effects = reconcile(replace(applied, touched=touched), now)
    assert effects == all_effects
    assert after.instances == whole.instances
    later = after.touched - applied.touched
    assert {each: after.shortages.get(each) for each in everything - later} == {
        each: whole.shortages.get(each) for each in everything - later
    }
    assert after.hopeless - later == whole.hopeless - later
    for index, group in (
        (after.of_model, lambda key: after.instances[key].alias),
        (after.on_worker, lambda key: key[0]),
    ):
        assert {(name, key) for name, keys in index.items() for key in keys} == {
            (group(key), key) for key in after.instances
        }
        assert sum(map(len, index.values())) == len(after.instances)
    for worker_id, books in after.ledgers.items():
        assert books == ledger(after.workers[worker_id], instances_on(after, worker_id))
    return after, effects
