"""What would make a pool's models those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from modelpool.messages.models import CHANGEABLE, ModelSpec


class Difference(msgspec.Struct, frozen=True):
    """A field as it is, and as it is to be. None: left at its default."""

    field: str
    now: Any
    wanted: Any


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`: "register", "change" while it runs, "replace" (another engine has to be started), or "remove"."""

    kind: str
    alias: str
    spec: ModelSpec | None = None
    """As it is to be; None where it is to go."""
    differences: tuple[Difference, ...] = ()


def plan(there: Mapping[str, ModelSpec], wanted: Mapping[str, ModelSpec], *, prune: bool) -> list[Step]:
    """The steps, in their order: what makes room comes first. `prune`: a model that the file does not name goes."""
    gone = [Step(kind="remove", alias=alias) for alias in there if alias not in wanted] if prune else []
    changed = [_change(there[alias], spec) for alias, spec in wanted.items() if alias in there and there[alias] != spec]
    new = [Step(kind="register", alias=alias, spec=spec) for alias, spec in wanted.items() if alias not in there]
    return [*gone, *changed, *new]


def patch(step: Step) -> dict[str, Any]:
    """The change, as a JSON merge patch."""
    return {each.field: each.wanted for each in step.differences}


def _change(now: ModelSpec, wanted: ModelSpec) -> Step:
    before, after = msgspec.to_builtins(now), msgspec.to_builtins(wanted)
    names = [name for name in ModelSpec.__struct_fields__ if before.get(name) != after.get(name)]
    kind = "change" if set(names) <= set(CHANGEABLE) else "replace"
    differences = tuple(Difference(name, before.get(name), after.get(name)) for name in names)
    return Step(kind=kind, alias=wanted.alias, spec=wanted, differences=differences)


_SIGNS = {"register": "+", "change": "~", "replace": "!", "remove": "-"}


def lines(steps: list[Step]) -> list[str]:
    """For people, a line a model and a line a field."""
    shown = []
    for step in steps:
        shown.append(f"{_SIGNS[step.kind]} {step.kind} {step.alias}")
        shown += [f"    {each.field}: {_text(each.now)} → {_text(each.wanted)}" for each in step.differences]
    return shown


def _text(value: Any) -> str:
    return "(default)" if value is None else msgspec.json.encode(value).decode()
