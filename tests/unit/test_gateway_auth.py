"""Who may do what at the gateway, as a table."""

from __future__ import annotations

import pytest

from modelpool.errors import Forbidden, PoolError, Unauthorized
from modelpool.gateway.auth import Access, check_exposure
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Scope
from modelpool.process import StartupError
from modelpool.settings import GatewaySettings

API, ADMIN, TOKEN = "sk-api", "sk-admin", "sk-cluster"


def verdict(access: Access, scope: Scope, headers: dict[str, str]) -> type[PoolError] | None:
    fields = [(name.lower().encode(), value.encode()) for name, value in {"Host": "localhost", **headers}.items()]
    try:
        access.check(Request(b"POST", b"/", fields, http10=False, keep_alive=True), scope)
    except PoolError as error:
        if "sk-" in error.message:
            raise ValueError(f"a secret is told: {error.message}") from error
        return type(error)
    return None


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
    access = Access(api_key=API, admin_key=ADMIN, cluster_token=TOKEN, local=True)
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
    access = Access(api_key="", admin_key=ADMIN, cluster_token=TOKEN, local=True)
    expected = None if open_ else Forbidden
    assert verdict(access, Scope.INFERENCE, headers) is expected
    assert verdict(access, Scope.ADMIN, headers) is expected
    assert verdict(access, Scope.OPEN, headers) is None
    assert verdict(access, Scope.WORKER, headers) is Unauthorized
    assert verdict(access, Scope.WORKER, {**headers, **bearer(TOKEN)}) is None


def test_without_a_key_elsewhere_all_is_open_but_what_needs_the_token() -> None:
    access = Access(api_key="", admin_key=ADMIN, cluster_token=TOKEN, local=False)
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
    assert "--insecure-no-auth" in caught.value.hint
    check_exposure(GatewaySettings(host=host, api_key="x"))
    check_exposure(GatewaySettings(host=host, insecure_no_auth=True))
