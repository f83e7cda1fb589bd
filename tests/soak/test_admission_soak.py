"""The state machines of tests/unit, for much longer."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.unit.test_admission import TicketsAreServed
from tests.unit.test_hold import NothingIsLost
from tests.unit.test_limits import LimitsMachine
from tests.unit.test_routing import LeasesComeBack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]


@pytest.mark.parametrize("machine", [TicketsAreServed, NothingIsLost, LimitsMachine, LeasesComeBack])
def test_in_any_order_of_events(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=5000, stateful_step_count=200, deadline=None))
