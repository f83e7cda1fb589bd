"""What is registered beside what is to be: in what two bodies of a model differ, and which are not there yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from modelpool.errors import Conflict
from modelpool.messages.dump import StoredModel
from modelpool.messages.models import ModelSpec


def differences(one: ModelSpec, other: ModelSpec) -> list[str]:
    """The fields."""
    return [name for name in ModelSpec.__struct_fields__ if getattr(one, name) != getattr(other, name)]


def missing(known: Mapping[str, ModelSpec], dumped: Iterable[StoredModel]) -> list[StoredModel]:
    """Those that are not known yet. Raises Conflict for one that is another under the same alias."""
    new: dict[str, StoredModel] = {}
    for each in dumped:
        alias = each.spec.alias
        there = known.get(alias) or (new[alias].spec if alias in new else None)
        if there is not None and there != each.spec:
            raise Conflict(
                f"The alias `{alias}` is registered with another body (it differs in "
                f"{', '.join(differences(there, each.spec))}).",
                param="models",
                code="alias_taken",
            )
        if there is None:
            new[alias] = each
    return list(new.values())
