"""What crosses between parts of a pool that may be of different versions, as it was recorded, and how it may grow.

`python -m tests.recorded_messages` records what is new. It refuses what earlier versions would not understand; who
wants that all the same, since no running pool is to be changed from one to the other, removes the record first.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec.inspect import (
    AnyType,
    BoolType,
    BytesType,
    CollectionType,
    DictType,
    EnumType,
    Field,
    FloatType,
    IntType,
    Metadata,
    NoneType,
    RawType,
    StrType,
    StructType,
    TupleType,
    Type,
    UnionType,
    type_info,
)

from modelpool.manager.port import ManagerPort
from modelpool.messages import admin, cluster, demand, dump, explain, keys, models, requests, routing, workers
from modelpool.settings import Settings

Json = Any
Struct = type[msgspec.Struct]
Texts = Mapping[str, str]
RECORD = Path(__file__).parent / "data" / "messages.json"
MODULES = (admin, cluster, demand, dump, explain, keys, models, requests, routing, workers)
"""Not what a worker says to its hosts, which are of its own version. What becomes of settings: test_messages.py."""

_EXAMPLES: Mapping[Struct, Json] = {
    models.ModelSpec: {"alias": "m", "model_name": "org/model", "engine_args": {"k": [1, None]}, "pinned": True},
    Settings: {"home": "/h", "gateway": {"port": 8001}},
    keys.KeySpec: {"name": "alice", "models": ["m"], "max_concurrency": 3},
}
_PLAIN: Mapping[type[Type], tuple[str, Json]] = {
    AnyType: ("any", 1),
    BoolType: ("bool", True),
    BytesType: ("bytes", "bQ=="),
    FloatType: ("float", 1.5),
    IntType: ("int", 1),
    NoneType: ("null", None),
    RawType: ("any", 1),
    StrType: ("str", "m"),
}


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """`fields`: type and default of each, `int = 0`. `strict`: others are refused. `sparse`: defaults are left out."""

    fields: dict[str, str]
    tag: str | None = None
    strict: bool = False
    sparse: bool = False


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """`samples`: of each message one with all its fields. `port`: arguments and result of the manager's methods."""

    messages: dict[str, Message]
    samples: dict[str, Json]
    port: dict[str, dict[str, str]]


def recorded() -> Described:
    return msgspec.json.decode(RECORD.read_bytes(), type=Described)


def described() -> Described:
    """As it is now."""
    infos = {cls.__name__: info for cls, info in structs().items()}
    return Described(
        messages={name: _message(info) for name, info in infos.items()},
        samples={name: _example(info) for name, info in infos.items()},
        port={
            name: _method(method)
            for name, method in inspect.getmembers(ManagerPort, inspect.isfunction)
            if not name.startswith("_")
        },
    )


def structs() -> dict[Struct, StructType]:
    """The messages and all that they are made of, by name."""
    found: dict[Struct, StructType] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and not name.startswith("_"):
                _collect(type_info(value), found)
    return dict(sorted(found.items(), key=lambda each: each[0].__name__))


def _collect(type_: Type, found: dict[Struct, StructType]) -> None:
    if isinstance(type_, StructType):
        if type_.cls not in found and type_.cls.__module__ != Settings.__module__:
            found[type_.cls] = type_
            for field in type_.fields:
                _collect(field.type, found)
        return
    for part in _parts(type_):
        _collect(part, found)


def _parts(type_: Type) -> Iterator[Type]:
    match type_:
        case Metadata(type=described):
            yield described
        case DictType(key_type=key, value_type=value):
            yield from (key, value)
        case TupleType(item_types=parts) | UnionType(types=parts):
            yield from parts
        case CollectionType(item_type=item):
            yield item


def _message(info: StructType) -> Message:
    return Message(
        fields={each.encode_name: _text(each.type) + _default(each) for each in info.fields},
        tag=None if info.tag is None else str(info.tag),
        strict=info.forbid_unknown_fields,
        sparse=info.cls.__struct_config__.omit_defaults,
    )


def _text(type_: Type) -> str:
    match type_:
        case Metadata(type=described):
            return _text(described)
        case StructType(cls=cls):
            return cls.__name__
        case EnumType(cls=cls):
            return "/".join(each.value for each in cls)
        case DictType(key_type=key, value_type=value):
            return f"{{{_text(key)}: {_text(value)}}}"
        case TupleType(item_types=items):
            return f"({', '.join(map(_text, items))})"
        case UnionType(types=types):
            return " | ".join(map(_text, types))
        case CollectionType(item_type=item):
            return f"[{_text(item)}]"
        case _:
            given = {name: getattr(type_, name) for name in type_.__struct_fields__ if getattr(type_, name) is not None}
            bounds = "".join(f" {name} {value}" for name, value in given.items())
            return _PLAIN[type(type_)][0] + bounds


def _default(field: Field) -> str:
    if field.required:
        return ""
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f" = {msgspec.json.encode(default).decode()}"


def _example(type_: Type) -> Json:
    match type_:
        case Metadata(type=described):
            return _example(described)
        case StructType(cls=cls) if cls in _EXAMPLES:
            return _EXAMPLES[cls]
        case StructType(fields=fields, tag_field=tag_field, tag=tag):
            tagged = {tag_field: tag} if tag_field else {}
            return {**tagged, **{each.encode_name: _example(each.type) for each in fields}}
        case EnumType(cls=cls):
            return next(iter(cls)).value
        case DictType(key_type=key, value_type=value):
            return {str(_example(key)): _example(value)}
        case TupleType(item_types=items):
            return [_example(each) for each in items]
        case UnionType(types=types):
            return _example(types[0])
        case CollectionType(item_type=item):
            return [_example(item)]
        case _:
            return _PLAIN[type(type_)][1]


def _method(method: Any) -> dict[str, str]:
    hints = get_type_hints(method, include_extras=True)
    result = hints["return"]
    if get_origin(result) is AsyncIterator:
        (result,) = get_args(result)
    arguments = {}
    for name, each in list(inspect.signature(method).parameters.items())[1:]:
        default = "" if each.default is inspect.Parameter.empty else f" = {json.dumps(each.default)}"
        arguments[name] = _text(type_info(hints[name])) + default
    return {**arguments, "return": _text(type_info(result))}


def breaks(old: Described, new: Described) -> list[str]:
    """What parts of the two versions would not understand of each other, in either direction."""
    found = []
    for name, message in old.messages.items():
        if name in new.messages:
            found += [f"{name}: {each}" for each in _message_breaks(message, new.messages[name])]
        else:
            found.append(f"{name} is gone")
    for name, method in old.port.items():
        found += [f"{name}(): {each}" for each in _method_breaks(method, new.port.get(name, {}))]
    return found


def _message_breaks(old: Message, new: Message) -> Iterator[str]:
    if new.tag != old.tag:
        yield f"was tagged {old.tag}, is tagged {new.tag}"
    if new.strict and not old.strict:
        yield "refuses what it does not know, and did not"
    for field, text in old.fields.items():
        now = new.fields.get(field, "gone")
        was_made_optional = now.startswith(f"{text} = ") and " = " not in text and not new.sparse
        if now != text and not was_made_optional:
            yield f"`{field}` was `{text}`, is `{now}`"
    for field, text in new.fields.items():
        if field in old.fields:
            continue
        if " = " not in text:
            yield f"`{field}` is new, and has no default"
        if old.strict and not new.sparse:
            yield f"`{field}` is new, and always said to who refuses what they do not know: it needs `omit_defaults`"


def _method_breaks(old: Texts, new: Texts) -> Iterator[str]:
    if list(new.items())[: len(old) - 1] != list(old.items())[:-1]:
        yield f"was {dict(old)}, is {dict(new)}"
    elif any(" = " not in text for name, text in new.items() if name not in old):
        yield "has a new argument without a default"
    elif not set(old["return"].split(" | ")) <= set(new["return"].split(" | ")):
        yield f"gave {old['return']}, gives {new['return']}"


if __name__ == "__main__":
    if RECORD.exists() and (broken := breaks(recorded(), described())):
        sys.exit("\n".join(broken))
    RECORD.write_bytes(msgspec.json.format(msgspec.json.encode(described()), indent=1) + b"\n")
