"""Parts of different versions understand each other: what crosses between them is held to what was recorded of it.

Where a test fails here, give a new field a default, and leave what is there as it is (tests/recorded_messages.py).
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from modelpool.messages.cluster import Deployment, deployed_run_id, encode_deployment
from modelpool.messages.routing import Others, decode_update
from modelpool.settings import GatewaySettings, Settings
from tests.recorded_messages import Described, Message, breaks, described, recorded, structs

_TOO = {"type", "model_name"}
"""The tag; and what no model of an engine but the fake one is without."""
CLASSES: dict[str, type[msgspec.Struct]] = {cls.__name__: cls for cls in structs()}


def understood(said: object, as_: type[msgspec.Struct]) -> msgspec.Struct:
    return msgspec.json.decode(msgspec.json.encode(said), type=as_)


def test_nothing_that_was_ever_said_has_changed() -> None:
    assert breaks(recorded(), described()) == []


def test_all_that_is_said_is_recorded() -> None:
    assert recorded() == described(), "python -m tests.recorded_messages"


@pytest.mark.parametrize("name", recorded().samples)
def test_what_an_older_part_says_is_understood(name: str) -> None:
    understood(recorded().samples[name], CLASSES[name])


@pytest.mark.parametrize("name", recorded().messages)
def test_what_an_older_part_cannot_do_without_is_said(name: str) -> None:
    needed = {field for field, text in recorded().messages[name].fields.items() if " = " not in text}
    whole = recorded().samples[name]
    barest = understood({field: whole[field] for field in whole if field in needed | _TOO}, CLASSES[name])
    assert needed <= msgspec.json.decode(msgspec.json.encode(barest)).keys()


OLD = Message(fields={"a": "int", "b": 'str = ""'})


@pytest.mark.parametrize(
    ("old", "new", "broken"),
    [
        ({}, {"fields": {**OLD.fields, "c": "int = 0"}}, None),
        ({}, {"fields": {**OLD.fields, "c": "int"}}, "`c` is new, and has no default"),
        ({}, {"fields": {"a": "int"}}, "`b` was `str = \"\"`, is `gone`"),
        ({}, {"fields": {**OLD.fields, "a": "str"}}, "`a` was `int`, is `str`"),
        ({}, {"fields": {**OLD.fields, "a": "int = 0"}}, None),
        ({}, {"fields": {**OLD.fields, "a": "int = 0"}, "sparse": True}, "`a` was `int`, is `int = 0`"),
        ({}, {"fields": {**OLD.fields, "b": "str"}}, "`b` was `str = \"\"`, is `str`"),
        ({}, {"strict": True}, "refuses what it does not know"),
        ({"tag": "x"}, {"tag": "y"}, "was tagged x, is tagged y"),
        ({"strict": True}, {"strict": True, "fields": {**OLD.fields, "c": "int = 0"}}, "it needs `omit_defaults`"),
        ({"strict": True}, {"strict": True, "fields": {**OLD.fields, "c": "int = 0"}, "sparse": True}, None),
    ],
)  # fmt: skip
def test_a_message_may_only_grow_by_what_others_need_not_know(
    old: dict[str, Any], new: dict[str, Any], broken: str | None
) -> None:
    before, after = (
        Described(messages={"M": msgspec.structs.replace(OLD, **each)}, samples={}, port={}) for each in (old, new)
    )
    found = breaks(before, after)
    assert found == [] if broken is None else broken in "; ".join(found)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ({"a": "int", "b": "int = 0", "return": "M | N"}, None),
        ({"a": "int", "b": "int", "return": "M"}, "a new argument without a default"),
        ({"b": "int = 0", "a": "int", "return": "M"}, "was {'a': 'int', 'return': 'M'}, is"),
        ({"a": "int", "return": "N"}, "gave M, gives N"),
        ({}, "was {'a': 'int', 'return': 'M'}, is {}"),
    ],
)
def test_a_method_may_only_grow_by_arguments_at_its_end(method: dict[str, str], broken: str | None) -> None:
    before = Described(messages={}, samples={}, port={"call": {"a": "int", "return": "M"}})
    found = breaks(before, Described(messages={}, samples={}, port={"call": method}))
    assert found == [] if broken is None else broken in "; ".join(found)


def test_what_was_not_seen_before_says_that_something_is_gone() -> None:
    before = Described(messages={"M": OLD}, samples={}, port={})
    assert breaks(before, Described(messages={}, samples={}, port={})) == ["M is gone"]


def test_a_gateway_goes_on_where_a_later_manager_says_what_it_does_not_know() -> None:
    assert decode_update(b'{"type": "omens", "epoch": "c.1"}') is None
    others = Others(epoch="c.1", number=1, nodes=2)
    assert decode_update(msgspec.json.encode({**msgspec.to_builtins(others), "omens": [1]})) == others
    with pytest.raises(msgspec.ValidationError):
        decode_update(b'{"type": "others", "epoch": "c.1"}')


def test_of_settings_only_those_that_were_given_cross_to_other_versions() -> None:
    """So an older one refuses none that it does not know, unless it is asked for."""
    settings = Settings(home="/h", run_id="r", gateway=GatewaySettings(port=8001, waiting_max_s=300.0))
    deployment = Deployment(settings, "key", "c0de")
    encoded = encode_deployment(deployment)
    assert msgspec.json.decode(encoded, type=Deployment) == deployment
    assert msgspec.json.decode(encoded)["settings"] == {"home": "/h", "run_id": "r", "gateway": {"port": 8001}}


def test_what_was_deployed_by_an_earlier_version_is_read_with_defaults_for_the_rest() -> None:
    deployment = msgspec.json.decode(b'{"settings": {"home": "/h"}, "admin_key": "k"}', type=Deployment)
    assert deployment == Deployment(Settings(home="/h"), "k")


def test_the_run_of_a_later_deployment_is_known() -> None:
    assert deployed_run_id(b'{"settings": {"run_id": "r", "omens": {"good": true}}, "omen": 1}') == "r"
