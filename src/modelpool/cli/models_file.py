"""YAML files that people write: what is wrong in one is said with its line and field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import yaml

from modelpool.errors import PoolError
from modelpool.messages.dump import Dump
from modelpool.messages.models import ModelSpec, decode_body

T = TypeVar("T")

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_OURS = re.compile(r"`(?P<path>[^`]*)`: (?P<field>[a-z_]\w*): ")


class BadFile(Exception):
    """`FILE:LINE: ` and what is wrong there. Nothing was done with it."""


def read_models(text: str, name: str) -> dict[str, ModelSpec]:
    """The models of a file `{models: [{alias: …, …}, …]}`, by alias. Raises BadFile."""
    raw, root = _parsed(text, name)
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), list):
        raise _bad(name, root, "must be `models:` and a list below it")
    if unknown := [field for field in raw if field != "models"]:
        raise _bad(name, _node_at(root, [unknown[0]]), f"`{unknown[0]}`: only `models` may stand here")
    models: dict[str, ModelSpec] = {}
    for number, each in enumerate(raw["models"]):
        spec = _decoded(each, root, ["models", number], ModelSpec, name)
        if spec.alias in models:
            node = _node_at(root, ["models", number, "alias"])
            raise _bad(name, node, f"`models[{number}].alias`: {spec.alias!r} is there twice")
        models[spec.alias] = spec
    return models


def read_dump(text: str, name: str) -> Dump:
    """What `modelpool dump` printed. Raises BadFile."""
    raw, root = _parsed(text, name)
    if not isinstance(raw, dict) or "cluster" not in raw:
        raise _bad(name, root, "is no dump, which begins with `cluster:`; a file of models is for `apply -f`")
    return _decoded(raw, root, [], Dump, name)


def text_of(data: bytes, name: str) -> str:
    """The text of a file. Raises BadFile where it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadFile(f"{name}:{line}: is no text: {error.reason} of UTF-8, {data[error.start]:#04x}") from error


class _Loader(yaml.SafeLoader):
    """YAML with the line of each value that cannot be made, or that JSON has not."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ValueError as error:  # 2024-13-01, a number of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"{value} is no number that could be meant"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


def _parsed(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """What a YAML file says, and where it says it."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        _refuse_repeated_keys(root, name)
        return (None if root is None else loader.construct_document(root)), root
    except yaml.constructor.ConstructorError as error:
        raise BadFile(f"{name}:{_line(error)}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        raise BadFile(f"{name}:{_line(error)}: is no YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadFile(f"{name}:{line}: is no YAML: the character #x{error.character:02x} may not stand here") from error
    except RecursionError as error:
        raise BadFile(f"{name}: is nested too deep") from error


def _line(error: yaml.MarkedYAMLError) -> int:
    return error.problem_mark.line + 1 if error.problem_mark else 1


def _refuse_repeated_keys(node: yaml.Node | None, name: str) -> None:
    for mapping in _mappings(node, set()):
        seen: set[str] = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _bad(name, key, f"`{key.value}` is there twice")
            seen.add(str(key.value))


def _mappings(node: yaml.Node | None, met: set[int]) -> Iterator[yaml.MappingNode]:
    if node is None or id(node) in met:
        return
    met.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, met)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from _mappings(each, met)


def _decoded(raw: Any, root: yaml.Node | None, at: list[str | int], type_: type[T], name: str) -> T:
    """A part of a file as a struct, checked as the API checks it. Raises BadFile."""
    try:
        return decode_body(msgspec.json.encode(raw), type_)
    except (TypeError, ValueError, OverflowError) as error:  # what YAML has and JSON has not
        raise _bad(name, _node_at(root, at), str(error)) from error
    except RecursionError as error:
        raise _bad(name, _node_at(root, at), f"in `{_written(at)}`: is nested too deep, or in itself") from error
    except PoolError as error:
        path = error.param or ""
        if ours := _OURS.match(error.message):
            path = f"{ours['path']}.{ours['field']}"
        steps = [int(number) if number else word for word, number in _STEP.findall(path)]
        where = _written([*at, *steps])
        prefix = f"in `{where}`: " if where else ""
        raise _bad(name, _node_at(root, [*at, *steps]), prefix + error.message.rstrip(".")) from error


def _written(path: list[str | int]) -> str:
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")


def _node_at(node: yaml.Node | None, path: list[str | int]) -> yaml.Node | None:
    """The node there, a field's by its name; as near to it as there is one."""
    for step in path:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if str(key.value) == str(step)]
            if not pairs:
                return node
            key, value = pairs[0]
            node = value if isinstance(value, yaml.CollectionNode) else key
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            return node
    return node


def _bad(name: str, node: yaml.Node | None, problem: str) -> BadFile:
    line = node.start_mark.line + 1 if node is not None else 1
    return BadFile(f"{name}:{line}: {problem}")
