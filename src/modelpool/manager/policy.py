"""What the settings say of models, as the controller takes it."""

from __future__ import annotations

from modelpool.core.pool import Policy
from modelpool.core.scaling import ScalingPolicy
from modelpool.settings import Settings


def policy_of(settings: Settings) -> Policy:
    models = settings.models
    return Policy(
        min_replicas=models.min_replicas,
        max_replicas=models.max_replicas,
        scaling=ScalingPolicy(
            load_high=models.load_high,
            load_low=models.load_low,
            averaged_over_s=models.scale_interval_s,
            cooldown_s=models.cooldown_s,
            idle_sleep_1_s=models.idle_sleep_1_s,
            idle_sleep_2_s=models.idle_sleep_2_s,
            idle_unload_s=models.idle_unload_s,
        ),
        min_residence_s=models.min_residence_s,
        turn_max_s=models.turn_max_s,
        swaps_per_minute=models.swaps_per_minute,
        heartbeat_timeout_s=settings.manager.heartbeat_timeout_s,
        backoff_initial_s=settings.manager.backoff_initial_s,
        backoff_max_s=settings.manager.backoff_max_s,
    )
