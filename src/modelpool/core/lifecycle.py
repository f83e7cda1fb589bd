"""The lifecycle of an instance, as one table. docs/design.md shows the diagram that `mermaid()` makes of it."""

from __future__ import annotations

from enum import StrEnum


class InstanceState(StrEnum):
    ABSENT = "ABSENT"
    STARTING = "STARTING"
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"
    SLEEP_1 = "SLEEP_1"
    SLEEP_2 = "SLEEP_2"
    WAKING = "WAKING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


_S = InstanceState

TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    _S.ABSENT: frozenset({_S.STARTING}),
    _S.STARTING: frozenset({_S.ACTIVE, _S.FAILED, _S.ABSENT}),
    _S.ACTIVE: frozenset({_S.DRAINING, _S.FAILED}),
    # Straight to UNLOADED when the instance is removed: there is no point in putting to sleep what is to end.
    _S.DRAINING: frozenset({_S.ACTIVE, _S.SLEEP_1, _S.SLEEP_2, _S.UNLOADED, _S.FAILED}),
    _S.SLEEP_1: frozenset({_S.SLEEP_2, _S.WAKING, _S.UNLOADED, _S.FAILED}),
    _S.SLEEP_2: frozenset({_S.WAKING, _S.UNLOADED, _S.FAILED}),
    # To UNLOADED when it is removed meanwhile.
    _S.WAKING: frozenset({_S.ACTIVE, _S.UNLOADED, _S.FAILED}),
    _S.UNLOADED: frozenset({_S.STARTING, _S.ABSENT}),
    _S.FAILED: frozenset({_S.STARTING, _S.ABSENT}),
}

SLEEP_LEVEL: dict[InstanceState, int] = {
    _S.SLEEP_1: 1,
    _S.SLEEP_2: 2,
    _S.UNLOADED: 3,
    _S.ABSENT: 3,
    _S.FAILED: 3,
}


class IllegalTransition(Exception):
    """A transition that the table does not list; nothing was changed."""


def can_move(state: InstanceState, target: InstanceState) -> bool:
    """Whether the table lists the transition."""
    return target in TRANSITIONS[state]


def move(state: InstanceState, target: InstanceState) -> InstanceState:
    """The state after the transition. Raises IllegalTransition when the table does not list it."""
    if not can_move(state, target):
        allowed = ", ".join(sorted(TRANSITIONS[state]))
        raise IllegalTransition(f"{state} → {target} is not in the table; from {state}: {allowed}")
    return target


def sleep_level(state: InstanceState) -> int:
    """`sleep_level_value`: 0 awake (or on the way there), 1, 2, and 3 for no engine process."""
    return SLEEP_LEVEL.get(state, 0)


def mermaid() -> str:
    """The table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2"]
    lines += [f"    {state} --> {target}" for state, targets in TRANSITIONS.items() for target in sorted(targets)]
    return "\n".join(lines)
