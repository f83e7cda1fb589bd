from __future__ import annotations

import msgspec
import pytest

from modelpool.errors import InvalidBody, InvalidRequest
from modelpool.messages.models import CHANGEABLE, ModelSpec, changed, decode_body, for_engine


def refused(body: bytes) -> InvalidBody:
    with pytest.raises(InvalidBody) as caught:
        decode_body(body, ModelSpec)
    return caught.value


def test_the_two_ways_to_ask_for_the_fake_engine_are_the_same_model() -> None:
    one = decode_body(b'{"alias":"a","fake":true}', ModelSpec)
    assert one == decode_body(b'{"alias":"a","engine":"fake"}', ModelSpec)
    assert decode_body(msgspec.json.encode(one), ModelSpec) == one


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{}", "alias", "missing required field `alias`"),
        (b"[]", None, "Expected `object`"),
        (b'{"alias":"a"}', "model_name", "required"),
        (b'{"alias":"a","model_name":"./m"}', "model_name", "give an absolute path, or a hub name"),
        (b'{"alias":"a","model_name":"../m"}', "model_name", "'../m' is a relative path"),
        (b'{"alias":"a","model_name":"m","max_model_len":"8"}', "max_model_len", 'got "8"'),
        (b'{"alias":"a","model_name":"m","gpu_memory_utilization":1.5}', "gpu_memory_utilization", "<= 1.0, got 1.5"),
        (b'{"alias":"a","model_name":"m","gpu_memory_gb":1,"gpu_memory_utilization":0.5}', "gpu_memory_gb", "not both"),
        (b'{"alias":"a","model_name":"m","min_replicas":3,"max_replicas":2}', "min_replicas", "above max_replicas"),
        (b'{"alias":"a","model_name":"m","engine_args":{"api-key":"k"}}', "engine_args.api-key", "set by the pool"),
        (b'{"alias":"a","model_name":"m","fake_capacity":2}', "fake_capacity", "only for the fake engine"),
        (b'{"alias":"a","engine":"trt"}', "engine", 'got "trt"'),
        (b'{"alias":"a b","fake":true}', "alias", "'a b'"),
        (b'{"alias":"a-r2","fake":true}', "alias", "replica"),
        (b'{"alias":"x/v1/y","fake":true}', "alias", "v1"),
        (b'{"alias":"","fake":true}', "alias", "length >= 1"),
    ],
)
def test_a_bad_body_names_the_field_the_value_and_what_is_allowed(body: bytes, param: str | None, says: str) -> None:
    error = refused(body)
    assert error.param == param
    assert says in error.message


@pytest.mark.parametrize(
    ("field", "meant"), [("fake_delay", "fake_delay_ms"), ("model", "model_name"), ("max_len", "max_model_len")]
)
def test_an_unknown_field_names_the_one_that_was_meant(field: str, meant: str) -> None:
    error = refused(msgspec.json.encode({"alias": "a", "fake": True, field: 3}))
    assert (error.param, error.code) == (field, "unknown_field")
    assert f"Did you mean `{meant}`?" in error.message


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "colour", "dtype"])
def test_an_unknown_field_that_is_like_no_other_gets_no_guess(field: str) -> None:
    error = refused(msgspec.json.encode({"alias": "a", "fake": True, field: 3}))
    assert "Did you mean" not in error.message
    assert "Allowed: alias, " in error.message


SPEC = ModelSpec(alias="a", fake=True, fake_capacity=3, max_replicas=2, idle_sleep_1_s=5)


def test_a_change_sets_what_it_names_and_null_brings_the_default_back() -> None:
    new = changed(SPEC, {"pinned": True, "max_replicas": None, "min_replicas": 7})
    assert new == ModelSpec(alias="a", fake=True, fake_capacity=3, pinned=True, min_replicas=7, idle_sleep_1_s=5)
    assert changed(SPEC, {}) == SPEC
    assert changed(SPEC, msgspec.to_builtins(SPEC)) == SPEC
    assert for_engine(new) == for_engine(SPEC)


@pytest.mark.parametrize(
    ("change", "param", "code", "says"),
    [
        ({"max_model_len": 8}, "max_model_len", "field_fixed", "`modelpool rm a`"),
        ({"alias": "b"}, "alias", "field_fixed", "what can be changed: min_replicas, "),
        ({"pinned": True, "fake_capacity": None}, "fake_capacity", "field_fixed", "keeps what it was started with"),
        ({"pined": True}, "pined", "unknown_field", "Did you mean `pinned`?"),
        ({"colour": 1}, "colour", "unknown_field", "Allowed: min_replicas, max_replicas, pinned, preload, "),
        ({"max_replicas": 0}, "max_replicas", "invalid_body", "Expected `int` >= 1, got 0"),
        ({"min_replicas": 3}, "min_replicas", "invalid_body", "3 is above max_replicas, 2"),
        ({"load_low": 0.9, "load_high": 0.8}, "load_low", "invalid_body", "0.9 must be below load_high, 0.8"),
    ],
)
def test_a_change_that_cannot_be_names_the_field_and_what_to_do(
    change: dict[str, object], param: str, code: str, says: str
) -> None:
    with pytest.raises(InvalidBody) as caught:
        changed(SPEC, change)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert says in caught.value.message


def test_whatever_may_change_has_a_default_to_come_back_to() -> None:
    assert changed(SPEC, dict.fromkeys(CHANGEABLE)) == ModelSpec(alias="a", fake=True, fake_capacity=3)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"{'a':1}"])
def test_what_is_not_json_is_a_400(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_body(body, ModelSpec)


def test_a_long_value_is_not_repeated_in_full() -> None:
    error = refused(msgspec.json.encode({"alias": 1, "model_name": "m", "x": "y" * 10_000}))
    assert len(error.message) < 1000


def test_a_size_that_no_machine_has_is_refused() -> None:
    assert refused(b'{"alias":"a","fake":true,"gpu_memory_gb":1e300}').param == "gpu_memory_gb"


def test_json_that_is_too_deep_is_a_400() -> None:
    with pytest.raises(InvalidRequest):
        decode_body(b'{"alias":"a","fake":true,"engine_args":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ModelSpec)


@pytest.mark.parametrize("alias", ["x/logs", "logs", "x/v1/y"])
def test_an_alias_that_a_path_could_not_tell_from_an_order_is_refused(alias: str) -> None:
    assert refused(msgspec.json.encode({"alias": alias, "fake": True})).param == "alias"
