from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.lifecycle import (
    TRANSITIONS,
    IllegalTransition,
    InstanceState,
    can_move,
    mermaid,
    move,
    sleep_level,
)

S = InstanceState


@given(st.sampled_from(S), st.sampled_from(S))
def test_move_follows_the_table_and_nothing_else(state: InstanceState, target: InstanceState) -> None:
    if can_move(state, target):
        assert move(state, target) is target
    else:
        with pytest.raises(IllegalTransition, match=f"{state} → {target}"):
            move(state, target)


def test_every_state_leads_back_to_absent() -> None:
    reaching = {S.ABSENT}
    while more := {state for state, targets in TRANSITIONS.items() if targets & reaching} - reaching:
        reaching |= more
    assert reaching == set(S)


def test_every_state_with_a_process_can_fail() -> None:
    with_process = {S.STARTING, S.ACTIVE, S.DRAINING, S.SLEEP_1, S.SLEEP_2, S.WAKING}
    assert all(can_move(state, S.FAILED) for state in with_process)


def test_an_engine_cannot_go_from_sleep_to_active_without_waking() -> None:
    assert not can_move(S.SLEEP_1, S.ACTIVE)
    assert not can_move(S.SLEEP_2, S.ACTIVE)


def test_sleep_level_counts_what_was_given_back() -> None:
    levels = [sleep_level(state) for state in (S.ACTIVE, S.SLEEP_1, S.SLEEP_2, S.UNLOADED)]
    assert levels == [0, 1, 2, 3]


def test_the_documentation_shows_the_diagram_of_the_table() -> None:
    design = Path(__file__).parents[2] / "docs" / "design.md"
    assert mermaid() in design.read_text()
