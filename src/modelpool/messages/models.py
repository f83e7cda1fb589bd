"""A model as its user registers it, and the decoding of bodies whose errors name field, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, NewType, TypeVar

import msgspec
from msgspec import Meta

from modelpool.errors import InvalidBody, InvalidRequest

Alias = NewType("Alias", str)
InstanceName = NewType("InstanceName", str)
WorkerId = NewType("WorkerId", str)

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_REPLICA_SUFFIX = re.compile(r"-r[0-9]+$")

_PATH_WORDS = frozenset({"v1", "logs"})

# vLLM arguments that the pool itself sets; taking them from a user would break routing or security.
OWNED_ENGINE_ARGS = frozenset(
    {"model", "served_model_name", "host", "port", "uds", "api_key", "root_path", "ssl_keyfile", "ssl_certfile"}
    | {"tensor_parallel_size", "max_model_len", "gpu_memory_utilization", "trust_remote_code", "tokens_only"}
)


class EngineKind(StrEnum):
    VLLM = "vllm"
    FAKE = "fake"


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a user registers: the body of `POST /admin/models/register`.

    Two specs are the same model exactly when they are equal. Sizes are GB (10^9 bytes), times are milliseconds.
    """

    alias: Annotated[str, Meta(min_length=1, max_length=128, description="The name clients send as `model`.")]
    model_name: Annotated[str, Meta(max_length=4096, description="Hub name or local path.")] = ""
    engine: EngineKind = EngineKind.VLLM
    max_model_len: Annotated[int, Meta(ge=1)] | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    gpu_memory_gb: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    min_replicas: Annotated[int, Meta(ge=0, le=1024)] | None = None
    max_replicas: Annotated[int, Meta(ge=1, le=1024)] | None = None
    pinned: Annotated[bool, Meta(description="Stays awake, whoever needs its memory.")] = False
    preload: Annotated[bool, Meta(description="Is brought up whenever there is room, and gives way.")] = False
    capacity: Annotated[int, Meta(ge=1, description="Requests an instance takes at once.")] | None = None
    load_high: Annotated[float, Meta(gt=0, le=10, description="Load above which a replica is added.")] | None = None
    load_low: Annotated[float, Meta(ge=0, le=10, description="Load below which one goes to sleep.")] | None = None
    cooldown_s: Annotated[float, Meta(ge=0, description="Seconds from a change to one replica less.")] | None = None
    idle_sleep_1_s: Annotated[float, Meta(ge=0, description="Seconds without a request until SLEEP_1.")] | None = None
    idle_sleep_2_s: Annotated[float, Meta(ge=0, description="Until SLEEP_2.")] | None = None
    idle_unload_s: Annotated[float, Meta(ge=0, description="Until UNLOADED.")] | None = None
    trust_remote_code: bool = False
    engine_args: dict[str, Any] = {}

    fake: Annotated[bool, Meta(description='Short for `engine: "fake"`.')] = False
    fake_response: str | None = None
    fake_delay_ms: Annotated[float, Meta(ge=0, description="Time to the first token.")] = 0
    fake_token_ms: Annotated[float, Meta(ge=0, description="Time between tokens.")] = 0
    fake_load_ms: Annotated[float, Meta(ge=0, description="Time to load: a slow start.")] = 0
    fake_capacity: Annotated[int, Meta(ge=1, description="Requests above it queue.")] = 8
    fake_crash_after_tokens: Annotated[int, Meta(ge=0)] | None = None
    fake_stall_after_tokens: Annotated[int, Meta(ge=0)] | None = None
    fake_load_error: Annotated[str, Meta(description="The start fails with this reason.")] | None = None
    fake_weights_mb: Annotated[float, Meta(ge=0, description="Memory that level 2 gives back.")] = 0
    fake_kv_mb: Annotated[float, Meta(ge=0, description="Memory that levels 1 and 2 give back.")] = 0
    fake_context_mb: Annotated[float, Meta(ge=0, description="Memory of its accelerators that it keeps.")] = 0
    fake_sleep_ms: Annotated[float, Meta(ge=0, description="Time to fall asleep.")] = 0
    fake_wake_ms: Annotated[float, Meta(ge=0, description="Time to wake.")] = 0
    fake_reload_ms: Annotated[float, Meta(ge=0, description="Time to wake from level 2, besides.")] = 0
    fake_sleep_error: Annotated[str, Meta(description="Falling asleep fails with this reason.")] | None = None
    fake_wake_error: Annotated[str, Meta(description="Waking fails with this reason.")] | None = None
    fake_wrong_canary: Annotated[bool, Meta(description="It is another model after waking.")] = False

    def __post_init__(self) -> None:
        if self.fake:
            msgspec.structs.force_setattr(self, "engine", EngineKind.FAKE)
        elif self.engine is EngineKind.FAKE:
            msgspec.structs.force_setattr(self, "fake", True)
        if problem := _problem(self):
            raise ValueError(problem)


def _problem(spec: ModelSpec) -> str | None:
    """What the types alone do not rule out, as `field: what is wrong`, or None."""
    if not _ALIAS.fullmatch(spec.alias):
        return f"alias: {spec.alias!r} must be letters, digits, '.', '_', '-', in parts joined by '/'"
    if _REPLICA_SUFFIX.search(spec.alias):
        return f"alias: {spec.alias!r} ends like a replica's name (`-r` and a number), which the pool gives itself"
    if reserved := _PATH_WORDS & set(spec.alias.split("/")):
        return f"alias: {spec.alias!r} has a part `{min(reserved)}`, which would be ambiguous in a path"
    if spec.engine is EngineKind.VLLM and not spec.model_name:
        return "model_name: required, a hub name or a local path"
    if spec.model_name in (".", "..") or spec.model_name.startswith(("./", "../")):
        return f"model_name: {spec.model_name!r} is a relative path; give an absolute path, or a hub name"
    if spec.engine is EngineKind.VLLM and (set_ := [name for name in _FAKE_FIELDS if _is_set(spec, name)]):
        return f"{set_[0]}: only for the fake engine (`fake: true`)"
    if spec.gpu_memory_utilization is not None and spec.gpu_memory_gb is not None:
        return "gpu_memory_gb: give this or gpu_memory_utilization, not both"
    if spec.min_replicas is not None and spec.max_replicas is not None and spec.min_replicas > spec.max_replicas:
        return f"min_replicas: {spec.min_replicas} is above max_replicas, {spec.max_replicas}"
    if spec.load_low is not None and spec.load_high is not None and spec.load_low >= spec.load_high:
        return f"load_low: {spec.load_low:g} must be below load_high, {spec.load_high:g}"
    if owned := [name for name in spec.engine_args if name.replace("-", "_") in OWNED_ENGINE_ARGS]:
        return f"engine_args.{owned[0]}: set by the pool; it is a field of the model or not for users to choose"
    return None


_FAKE_FIELDS = tuple(name for name in ModelSpec.__struct_fields__ if name.startswith("fake_"))
_DEFAULTS = dict(zip(reversed(ModelSpec.__struct_fields__), reversed(ModelSpec.__struct_defaults__), strict=False))


def _is_set(spec: ModelSpec, name: str) -> bool:
    return bool(getattr(spec, name) != _DEFAULTS[name])


CHANGEABLE = (
    "min_replicas",
    "max_replicas",
    "pinned",
    "preload",
    "capacity",
    "load_high",
    "load_low",
    "cooldown_s",
    "idle_sleep_1_s",
    "idle_sleep_2_s",
    "idle_unload_s",
)
"""What only the controller and the gateways heed: it may change while instances run."""


def for_engine(spec: ModelSpec) -> ModelSpec:
    """What instances are started with: those of one spec serve every other one that is the same in this."""
    return msgspec.structs.replace(spec, **{name: _DEFAULTS[name] for name in CHANGEABLE})


def changed(spec: ModelSpec, change: dict[str, Any]) -> ModelSpec:
    """`spec` with the fields of a JSON merge patch: null brings the default back. Raises InvalidBody."""
    raw = {**msgspec.to_builtins(spec), **change}
    try:
        new = msgspec.convert({name: value for name, value in raw.items() if value is not None}, ModelSpec)
    except msgspec.ValidationError as error:
        raise _explain(error, raw, CHANGEABLE) from error
    if fixed := [name for name in change if name not in CHANGEABLE and getattr(new, name) != getattr(spec, name)]:
        raise InvalidBody(
            f"`{fixed[0]}`: an instance keeps what it was started with. Remove the model (`modelpool rm {spec.alias}`) "
            f"and register it anew; what can be changed: {', '.join(CHANGEABLE)}.",
            param=fixed[0],
            code="field_fixed",
        )
    return new


T = TypeVar("T")

_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_GOT = re.compile(r", got `[^`]*`$")
_OURS = re.compile(r"(?P<field>[a-z_][\w.-]*): (?P<problem>.*)", re.DOTALL)


def decode_body(body: bytes, type_: type[T]) -> T:
    """`body` as `type_`.

    Raises InvalidRequest (400) for what is not JSON and InvalidBody (422) for what does not fit, naming the field,
    the value found there and what is allowed.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    try:
        return msgspec.convert(raw, type_)
    except msgspec.ValidationError as error:
        raise _explain(error, raw, getattr(type_, "__struct_fields__", ())) from error


def _explain(error: msgspec.ValidationError, raw: Any, fields: Sequence[str]) -> InvalidBody:
    """`fields`: those that the body may have."""
    text = str(error)
    at = _AT_PATH.search(text)
    path = at["path"] if at else ""
    text = text[: at.start()] if at else text
    if unknown := _UNKNOWN.search(text):
        allowed = list(fields) if not path else []
        nearest = _nearest(unknown["name"], allowed)
        hint = f" Did you mean `{nearest}`?" if nearest else ""
        names = f" Allowed: {', '.join(allowed)}." if allowed else ""
        field = ".".join(part for part in (path, unknown["name"]) if part)
        return InvalidBody(f"Unknown field `{field}`.{hint}{names}", param=field, code="unknown_field")
    if not path and (ours := _OURS.fullmatch(text)):
        return InvalidBody(f"`{ours['field']}`: {ours['problem']}.", param=ours["field"])
    if not path:
        return InvalidBody(f"{text}.", param=_missing_field(text))
    return InvalidBody(f"`{path}`: {_GOT.sub('', text)}, got {_shown(raw, path)}.", param=path)


def _nearest(name: str, allowed: list[str]) -> str | None:
    """The field that was surely meant: a slip of the keys, or one word of its name at the beginning or the end."""
    close = difflib.get_close_matches(name, allowed, 1, cutoff=0.7)
    part = [each for each in allowed if each.startswith(f"{name}_") or each.endswith(f"_{name}")]
    return next(iter(close + part), None)


def _missing_field(text: str) -> str | None:
    match = re.search(r"missing required field `([^`]*)`", text)
    return match[1] if match else None


def _shown(raw: Any, path: str) -> str:
    """The value at a msgspec path such as `a.b[0]`, shortened to 80 characters."""
    value = raw
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return "another value"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:79] + "…"


def alias_of(instance: str) -> str:
    """The model of an instance of this name: replicas are `alias`, `alias-r2`, …"""
    return _REPLICA_SUFFIX.sub("", instance)
