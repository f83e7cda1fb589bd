"""Where a model may be asked, and whether one that is nowhere may be waited for."""

from __future__ import annotations

from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Instance, Pool, instances_of, is_alive

RETRIED_AT_ONCE_S = 2.0
_NOT_UP = (InstanceState.FAILED, InstanceState.SLEEP_1, InstanceState.SLEEP_2)


def is_routed(pool: Pool, instance: Instance) -> bool:
    """Whether it takes requests for its model."""
    model = pool.models.get(instance.alias)
    awake = instance.state is InstanceState.ACTIVE and not instance.stopping
    return awake and model is not None and instance.key in (model.key, *model.replaces)


def on_its_way(pool: Pool, alias: str, now: float) -> bool:
    """It starts, or will because somebody asks. Not where it failed to start, and where nothing can make room for it.

    A first failure counts as on its way, since it is tried again at once: mostly an engine that died while it served.
    """
    if here := [each for each in instances_of(pool, alias) if is_alive(pool, each.worker_id)]:
        hopeless = alias in pool.hopeless
        return any(each.stopping or _is_coming(each, now, hopeless=hopeless) for each in here)
    if pool.missed:
        return True
    return alias not in pool.hopeless and any(worker.alive for worker in pool.workers.values())


def _is_coming(instance: Instance, now: float, *, hopeless: bool) -> bool:
    """`hopeless`: nothing makes room for what is not up."""
    if instance.failures and instance.permanent:
        return False
    if hopeless and instance.state in _NOT_UP:
        return False
    if instance.retry_at is not None:
        return instance.failures == 1 and instance.retry_at - now < RETRIED_AT_ONCE_S
    return instance.state is not InstanceState.FAILED
