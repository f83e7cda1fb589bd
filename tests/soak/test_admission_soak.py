"""The state machine of tests/unit/test_admission.py, for much longer."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.test_admission import TicketsAreServed

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

LONG = settings(max_examples=5000, stateful_step_count=200, deadline=None)


def test_tickets_are_served_in_any_order_of_events() -> None:
    run_state_machine_as_test(TicketsAreServed, settings=LONG)
