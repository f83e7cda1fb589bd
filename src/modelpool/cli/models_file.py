"""Files of models and dumps: what is wrong in one is said with its line and field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
import yaml

from modelpool.errors import PoolError
from modelpool.messages.dump import Dump
from modelpool.messages.models import ModelSpec, decode_body
from modelpool.yaml_file import bad, node_at, parsed

T = TypeVar("T")

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_OURS = re.compile(r"`(?P<path>[^`]*)`: (?P<field>[a-z_]\w*): ")


def read_models(text: str, name: str) -> dict[str, ModelSpec]:
    """The models of a file `{models: [{alias: …, …}, …]}`, by alias. Raises BadFile."""
    raw, root = parsed(text, name)
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), list):
        raise bad(name, root, "must be `models:` and a list below it")
    if unknown := [field for field in raw if field != "models"]:
        raise bad(name, node_at(root, [unknown[0]]), f"`{unknown[0]}`: only `models` may stand here")
    models: dict[str, ModelSpec] = {}
    for number, each in enumerate(raw["models"]):
        spec = _decoded(each, root, ["models", number], ModelSpec, name)
        if spec.alias in models:
            node = node_at(root, ["models", number, "alias"])
            raise bad(name, node, f"`models[{number}].alias`: {spec.alias!r} is there twice")
        models[spec.alias] = spec
    return models


def read_dump(text: str, name: str) -> Dump:
    """What `modelpool dump` printed. Raises BadFile."""
    raw, root = parsed(text, name)
    if not isinstance(raw, dict) or "cluster" not in raw:
        raise bad(name, root, "is no dump, which begins with `cluster:`; a file of models is for `apply -f`")
    return _decoded(raw, root, [], Dump, name)


def _decoded(raw: Any, root: yaml.Node | None, at: list[str | int], type_: type[T], name: str) -> T:
    """A part of a file as a struct, checked as the API checks it. Raises BadFile."""
    try:
        return decode_body(msgspec.json.encode(raw), type_)
    except (TypeError, ValueError, OverflowError) as error:  # what YAML has and JSON has not
        raise bad(name, node_at(root, at), str(error)) from error
    except RecursionError as error:
        raise bad(name, node_at(root, at), f"in `{_written(at)}`: is nested too deep, or in itself") from error
    except PoolError as error:
        path = error.param or ""
        if ours := _OURS.match(error.message):
            path = f"{ours['path']}.{ours['field']}"
        steps = [int(number) if number else word for word, number in _STEP.findall(path)]
        where = _written([*at, *steps])
        prefix = f"in `{where}`: " if where else ""
        raise bad(name, node_at(root, [*at, *steps]), prefix + error.message.rstrip(".")) from error


def _written(path: list[str | int]) -> str:
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")
