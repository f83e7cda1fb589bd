"""Instances that are to go without a request being lost: others come up in their place first.

Those on a worker that is drained, and those of a model as it was before it was registered anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelpool.core.demand import Demand
from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Instance, Pool
from modelpool.core.scaling import Replica, ScalingPolicy, Step

UNHURRIED_S = 86_400.0
"""What requests in flight have where an instance goes because of a change: as long as they take, within reason."""

_UP = (InstanceState.ACTIVE, InstanceState.STARTING, InstanceState.WAKING)


def why_outgoing(pool: Pool, instance: Instance) -> str:
    """Why it is to go, in a clause; "" when it stays."""
    if instance.worker_id in pool.draining:
        return f"{instance.worker_id} is being drained"
    model = pool.models.get(instance.alias)
    return "its model was registered anew" if model is not None and instance.key in model.replaces else ""


def is_up(instance: Instance) -> bool:
    """Awake or on its way there: not to go before another is in its place."""
    return instance.order is Step.WAKE or (instance.order is Step.NONE and instance.state in _UP)


def needed(scaling: ScalingPolicy, demand: Demand, serving: Sequence[Replica]) -> int:
    """How many of these are enough for what is asked of the model now; at least one, and those to be kept."""
    least = max(1, scaling.min_replicas)
    asked = demand.total + demand.waiting
    for count in range(least, len(serving)):
        if asked <= scaling.load_high * sum(each.capacity for each in serving[:count]):
            return count
    return min(scaling.max_replicas, max(least, len(serving)))
