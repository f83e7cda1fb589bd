"""What a worker says of an instance."""

from __future__ import annotations

from modelpool.core.lifecycle import InstanceState
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Address, InstanceReport


def active(alias: str) -> InstanceReport:
    """One of a fake model that serves, where nobody listens."""
    return InstanceReport(
        instance=alias,
        model=ModelSpec(alias=alias, fake=True),
        state=InstanceState.ACTIVE,
        address=Address("127.0.0.1", 9),
        changed_at=1.0,
    )
