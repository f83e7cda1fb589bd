"""Who may do what at the gateway, as a table."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256

import pytest

from modelpool.errors import Forbidden, ManagerAway, PoolError, Unauthorized
from modelpool.gateway.auth import Access, check_exposure
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Scope
from modelpool.gateway.table import Gap
from modelpool.messages.routing import KeysDelta
from modelpool.process import StartupError
from modelpool.settings import GatewaySettings
from tests.gateway_world import key, keys_of

API, ADMIN, TOKEN = "sk-api", "sk-admin", "sk-cluster"


def asking(headers: dict[str, str]) -> Request:
    fields = [(name.lower().encode(), value.encode()) for name, value in {"Host": "localhost", **headers}.items()]
    return Request(b"POST", b"/", fields, http10=False, keep_alive=True)


def verdict(access: Access, scope: Scope, headers: dict[str, str]) -> type[PoolError] | None:
    try:
        access.check(asking(headers), scope)
    except PoolError as error:
        if "sk-" in error.message:
            raise ValueError(f"a secret is told: {error.message}") from error
        return type(error)
    return None


def ring(*secrets: str, required: bool = False) -> KeyRing:
    keys = KeyRing()
    keys.apply(keys_of(*(key(secret, id=f"key-{secret}") for secret in secrets), required=required or bool(secrets)))
    return keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "inference", "admin", "worker"),
    [
        ({}, Unauthorized, Unauthorized, Unauthorized),
        (bearer("wrong"), Unauthorized, Unauthorized, Unauthorized),
        (bearer(""), Unauthorized, Unauthorized, Unauthorized),
        (bearer(API), None, Forbidden, Unauthorized),
        (bearer(ADMIN), None, None, Unauthorized),
        (bearer(TOKEN), Unauthorized, Unauthorized, None),
        ({"x-api-key": API}, None, Forbidden, Unauthorized),
        ({"x-api-key": ADMIN}, None, None, Unauthorized),
        ({"Authorization": f"bearer  {API}"}, None, Forbidden, Unauthorized),
        ({"Authorization": API}, Unauthorized, Unauthorized, Unauthorized),
        ({"Authorization": f"Basic {API}"}, Unauthorized, Unauthorized, Unauthorized),
        ({"Host": "evil.example", **bearer(API)}, None, Forbidden, Unauthorized),
    ],
)
def test_with_an_api_key_set(
    headers: dict[str, str],
    inference: type[PoolError] | None,
    admin: type[PoolError] | None,
    worker: type[PoolError] | None,
) -> None:
    access = Access(api_key=API, admin_key=ADMIN, cluster_token=TOKEN, local=True, keys=ring())
    expected = {Scope.OPEN: None, Scope.INFERENCE: inference, Scope.ADMIN: admin, Scope.WORKER: worker}
    assert {scope: verdict(access, scope, headers) for scope in Scope} == expected


@pytest.mark.parametrize(
    ("headers", "open_"),
    [
        ({}, True),
        (bearer("anything"), True),
        ({"Host": "localhost:8000"}, True),
        ({"Host": "LOCALHOST."}, True),
        ({"Host": "127.0.0.1:8000"}, True),
        ({"Host": "127.1.2.3"}, True),
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "localhost.evil.example:8000"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "evil@localhost.example"}, False),
        ({"Host": "192.168.1.1"}, False),
        ({"Host": "0.0.0.0"}, False),
        ({"Host": ""}, False),
        ({"Host": "[::1"}, False),
        ({"Origin": "http://localhost:3000"}, True),
        ({"Origin": "https://127.0.0.1"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://localhost.evil.example"}, False),
    ],
)
def test_without_a_key_on_loopback_only_local_names_and_pages_are_answered(
    headers: dict[str, str], open_: bool
) -> None:
    access = Access(api_key="", admin_key=ADMIN, cluster_token=TOKEN, local=True, keys=ring())
    expected = None if open_ else Forbidden
    assert verdict(access, Scope.INFERENCE, headers) is expected
    assert verdict(access, Scope.ADMIN, headers) is expected
    assert verdict(access, Scope.OPEN, headers) is None
    assert verdict(access, Scope.WORKER, headers) is Unauthorized
    assert verdict(access, Scope.WORKER, {**headers, **bearer(TOKEN)}) is None


@pytest.mark.parametrize("static", ["", API])
@pytest.mark.parametrize(
    ("headers", "inference", "admin", "caller"),
    [
        ({}, Unauthorized, Unauthorized, None),
        (bearer(""), Unauthorized, Unauthorized, None),
        ({"x-api-key": ""}, Unauthorized, Unauthorized, None),
        (bearer("mp-sk-a"), None, Forbidden, "key-mp-sk-a"),
        ({"Authorization": "bearer  mp-sk-b "}, None, Forbidden, "key-mp-sk-b"),
        ({"x-api-key": "mp-sk-b"}, None, Forbidden, "key-mp-sk-b"),
        ({"x-api-key": "mp-sk-b", **bearer("mp-wrong")}, None, Forbidden, "key-mp-sk-b"),
        (bearer("mp-sk-a "), None, Forbidden, "key-mp-sk-a"),
        (bearer("mp-sk-"), Unauthorized, Unauthorized, None),
        (bearer("mp-sk-aa"), Unauthorized, Unauthorized, None),
        ({"Authorization": "mp-sk-a"}, Unauthorized, Unauthorized, None),
        (bearer(sha256(b"mp-sk-a").hexdigest()), Unauthorized, Unauthorized, None),
        (bearer(ADMIN), None, None, None),
    ],
)
def test_a_managed_key_opens_inference_and_says_who_calls(
    static: str,
    headers: dict[str, str],
    inference: type[PoolError] | None,
    admin: type[PoolError] | None,
    caller: str | None,
) -> None:
    access = Access(api_key=static, admin_key=ADMIN, cluster_token=TOKEN, local=True, keys=ring("mp-sk-a", "mp-sk-b"))
    expected = {Scope.OPEN: None, Scope.INFERENCE: inference, Scope.ADMIN: admin, Scope.WORKER: Unauthorized}
    assert {scope: verdict(access, scope, headers) for scope in Scope} == expected
    asked = asking(headers)
    with suppress(Unauthorized):
        access.check(asked, Scope.INFERENCE)
    assert (asked.caller.id if asked.caller else None) == caller


@pytest.mark.parametrize(("require_key", "made"), [(True, False), (False, True)])
def test_no_key_at_all_is_not_open_when_one_is_required_or_was_ever_made(require_key: bool, made: bool) -> None:
    access = Access(
        api_key="",
        admin_key=ADMIN,
        cluster_token=TOKEN,
        local=True,
        keys=ring(required=made),
        require_key=require_key,
    )
    for headers in ({}, bearer(""), bearer("mp-revoked"), {"x-api-key": ""}):
        assert verdict(access, Scope.INFERENCE, headers) is Unauthorized
        assert verdict(access, Scope.ADMIN, headers) is Unauthorized
    assert verdict(access, Scope.INFERENCE, bearer(ADMIN)) is None


@pytest.mark.parametrize("static", ["", API])
def test_before_the_manager_was_heard_nobody_is_let_in_whose_key_only_it_can_know(static: str) -> None:
    access = Access(api_key=static, admin_key=ADMIN, cluster_token=TOKEN, local=True, keys=KeyRing())
    assert verdict(access, Scope.INFERENCE, bearer("mp-sk-a")) is ManagerAway
    assert verdict(access, Scope.INFERENCE, {}) is (Unauthorized if static else ManagerAway)
    assert verdict(access, Scope.ADMIN, {}) is (Unauthorized if static else ManagerAway)
    assert verdict(access, Scope.ADMIN, bearer(ADMIN)) is None


def test_a_key_works_from_its_making_to_its_revocation_whatever_comes_between() -> None:
    keys = ring()
    access = Access(api_key="", admin_key=ADMIN, cluster_token=TOKEN, local=True, keys=keys)
    assert verdict(access, Scope.INFERENCE, {}) is None
    a, b = key("mp-sk-a", id="key-a"), key("mp-sk-b", id="key-b", models=("m",))
    keys.apply(KeysDelta(epoch="e1", sequence=2, made=(a,)))
    keys.apply(KeysDelta(epoch="e1", sequence=3, made=(b,)))
    assert verdict(access, Scope.INFERENCE, {}) is Unauthorized
    before = keys.caller(b"mp-sk-a"), keys.caller(b"mp-sk-b")
    keys.apply(keys_of(a, b, epoch="e2", sequence=0))  # another manager
    assert (keys.caller(b"mp-sk-a"), keys.caller(b"mp-sk-b")) == before
    with pytest.raises(Gap):
        keys.apply(KeysDelta(epoch="e2", sequence=2, revoked=("key-b",)))
    keys.apply(KeysDelta(epoch="e2", sequence=1, revoked=("key-a",)))
    assert verdict(access, Scope.INFERENCE, bearer("mp-sk-a")) is Unauthorized
    assert verdict(access, Scope.INFERENCE, bearer("mp-sk-b")) is None
    assert [each and each.live for each in before] == [False, True]
    keys.apply(keys_of(epoch="e3", required=True))
    assert verdict(access, Scope.INFERENCE, bearer("mp-sk-b")) is Unauthorized
    assert verdict(access, Scope.INFERENCE, {}) is Unauthorized


def test_a_key_that_was_revoked_between_head_and_body_of_a_request_is_seen_and_no_model_is_told_of() -> None:
    keys = ring()
    keys.apply(KeysDelta(epoch="e1", sequence=2, made=(key("mp-sk-a", id="key-a", models=("m", "org/n")),)))
    caller = keys.caller(b"mp-sk-a")
    assert caller is not None
    caller.check("org/n")
    with pytest.raises(Forbidden, match="`other`") as refused:
        caller.check("other")
    assert (refused.value.code, refused.value.param) == ("model_not_allowed", "model")
    keys.apply(KeysDelta(epoch="e1", sequence=3, revoked=("key-a",)))
    with pytest.raises(Unauthorized, match="revoked"):
        caller.check("m")


def test_without_a_key_elsewhere_all_is_open_but_what_needs_the_token() -> None:
    access = Access(api_key="", admin_key=ADMIN, cluster_token=TOKEN, local=False, keys=ring())
    foreign = {"Host": "pool.example", "Origin": "https://pool.example"}
    assert verdict(access, Scope.ADMIN, foreign) is None
    assert verdict(access, Scope.WORKER, foreign) is Unauthorized


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.1.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_exposure(GatewaySettings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org"])
def test_any_other_address_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(StartupError) as caught:
        check_exposure(GatewaySettings(host=host))
    assert "--api-key" in caught.value.hint
    assert "--require-key" in caught.value.hint
    assert "--insecure-no-auth" in caught.value.hint
    check_exposure(GatewaySettings(host=host, api_key="x"))
    check_exposure(GatewaySettings(host=host, require_key=True))
    check_exposure(GatewaySettings(host=host, insecure_no_auth=True))
