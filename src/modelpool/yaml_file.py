"""YAML that people write: what is wrong in a file is said with its line; nothing in it is passed over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")

_VALUES_MAX = 1_000_000
"""So many values may a short file have, each alias counted as what it stands for."""


class BadFile(Exception):
    """`FILE:LINE: ` and what is wrong there. Nothing was done with it."""


def read_struct(file: Path, type_: type[T]) -> T:
    """What a file says, as a struct; an empty one says nothing. Raises BadFile."""
    try:
        raw, _ = parsed(text_of(file.read_bytes(), str(file)), str(file))
        return msgspec.convert({} if raw is None else raw, type_)
    except OSError as error:
        raise BadFile(f"{file}: cannot be read: {error.strerror}") from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadFile(f"{file}: {error}") from error


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


def parsed(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """What a YAML file says, and where it says it: see `node_at`. Raises BadFile."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None and _values(root, {}) > max(_VALUES_MAX, len(text)):
            raise bad(name, root, f"its aliases stand for more than {_VALUES_MAX:,} values")
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


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are at and below a node, aliases written out."""
    if isinstance(node, yaml.CollectionNode) and id(node) not in known:
        known[id(node)] = 1  # where it is in itself again, which is refused later
        below = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
        known[id(node)] = 1 + sum(_values(each, known) for each in below)
    return known.get(id(node), 1)


def _refuse_repeated_keys(node: yaml.Node | None, name: str) -> None:
    for mapping in _mappings(node, set()):
        seen: set[str] = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise bad(name, key, f"`{key.value}` is there twice")
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


def node_at(node: yaml.Node | None, path: list[str | int]) -> yaml.Node | None:
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


def bad(name: str, node: yaml.Node | None, problem: str) -> BadFile:
    line = node.start_mark.line + 1 if node is not None else 1
    return BadFile(f"{name}:{line}: {problem}")
