from __future__ import annotations

from modelpool.cli.plan import lines, patch, plan
from modelpool.messages.models import CHANGEABLE, ModelSpec, changed


def fake(alias: str, **more: object) -> ModelSpec:
    return ModelSpec(alias=alias, fake=True, **more)  # type: ignore[arg-type]


def by_alias(*specs: ModelSpec) -> dict[str, ModelSpec]:
    return {spec.alias: spec for spec in specs}


def test_what_is_as_wanted_takes_no_step() -> None:
    there = by_alias(fake("a"), fake("b", max_replicas=2))
    assert plan(there, there, prune=True) == []


def test_what_makes_room_comes_first_and_nothing_goes_unless_asked() -> None:
    there, wanted = by_alias(fake("a"), fake("gone")), by_alias(fake("new"), fake("a", pinned=True))
    steps = plan(there, wanted, prune=True)
    assert [(step.kind, step.alias) for step in steps] == [("remove", "gone"), ("change", "a"), ("register", "new")]
    assert [step.kind for step in plan(there, wanted, prune=False)] == ["change", "register"]


def test_a_change_is_the_patch_that_makes_it_so() -> None:
    now = fake("a", max_replicas=2, pinned=True, idle_unload_s=5)
    wanted = fake("a", max_replicas=3, min_replicas=1)
    (step,) = plan(by_alias(now), by_alias(wanted), prune=False)
    assert step.kind == "change"
    assert changed(now, patch(step)) == wanted
    assert lines([step]) == [
        "~ change a",
        "    min_replicas: (default) → 1",
        "    max_replicas: 2 → 3",
        "    pinned: true → (default)",
        "    idle_unload_s: 5 → (default)",
    ]


def test_what_an_engine_is_started_with_needs_another_engine() -> None:
    (step,) = plan(by_alias(fake("a")), by_alias(fake("a", max_model_len=9, pinned=True)), prune=False)
    assert step.kind == "replace"
    assert [each.field in CHANGEABLE for each in step.differences] == [False, True]
