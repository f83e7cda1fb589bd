"""Who may do what: the API key, the admin key, the cluster token, and what is open on loopback."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from modelpool.errors import Forbidden, Unauthorized
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Scope
from modelpool.process import StartupError
from modelpool.settings import GatewaySettings


class Access:
    """The rules.

    | scope     | no API key set                       | API key set                       |
    |-----------|--------------------------------------|-----------------------------------|
    | OPEN      | open                                 | open                              |
    | INFERENCE | open, to local names only if `local` | the API key or the admin key      |
    | ADMIN     | open, to local names only if `local` | the admin key; API key: forbidden |
    | WORKER    | the cluster token                    | the cluster token                 |

    Keys come as `Authorization: Bearer` or `x-api-key`. `local`: bound to loopback, where a web page could reach us
    under a name of its own (DNS rebinding), so a foreign Host or Origin is refused.
    """

    def __init__(self, *, api_key: str, admin_key: str, cluster_token: str, local: bool) -> None:
        self._api_key = api_key.encode()
        self._usual = b"Bearer " + self._api_key
        self._admin_key = admin_key.encode()
        self._cluster_token = cluster_token.encode()
        self._local = local

    def check(self, request: Request, scope: Scope) -> None:
        """Raises Unauthorized or Forbidden."""
        if scope is Scope.OPEN:
            return
        if scope is Scope.WORKER:
            if not _any_equal(_presented(request), self._cluster_token):
                raise Unauthorized("The cluster token (`Authorization: Bearer`) is missing or wrong.")
        elif not self._api_key:
            if self._local:
                _refuse_foreign(request)
        elif scope is not Scope.INFERENCE or not hmac.compare_digest(
            request.by_name.get(b"authorization", b""), self._usual
        ):
            self._check_keys(_presented(request), scope)

    def _check_keys(self, presented: list[bytes], scope: Scope) -> None:
        if _any_equal(presented, self._admin_key):
            return
        known = _any_equal(presented, self._api_key)
        if known and scope is Scope.INFERENCE:
            return
        if known:
            raise Forbidden("This needs the admin key, which lies in the file `admin-key` in MODELPOOL_HOME.")
        if presented:
            raise Unauthorized("The API key is wrong.")
        raise Unauthorized("An API key is needed: send `Authorization: Bearer` and the key.")


def check_exposure(gateway: GatewaySettings) -> None:
    """Raises StartupError when anybody on a network could use the gateway and nobody said that they may."""
    if not (gateway.api_key or gateway.insecure_no_auth or is_loopback(gateway.host)):
        raise StartupError(
            f"{gateway.host or 'every address'} can be reached from elsewhere, and no API key is set.",
            "Set one with --api-key (MODELPOOL_API_KEY), or say --insecure-no-auth if anybody there may use it.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address or name. An empty one means every address."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _presented(request: Request) -> list[bytes]:
    keys = []
    if authorization := request.by_name.get(b"authorization"):
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            keys.append(key.strip())
    if key := request.by_name.get(b"x-api-key", b""):
        keys.append(key.strip())
    return keys


def _any_equal(presented: Iterable[bytes], expected: bytes) -> bool:
    return any(hmac.compare_digest(each, expected) for each in presented)


def _refuse_foreign(request: Request) -> None:
    host = request.by_name.get(b"host")
    if host is not None and not _is_local(f"//{host.decode('latin-1')}"):
        raise Forbidden("This gateway answers to local names only (localhost, 127.0.0.1): the Host is a foreign one.")
    origin = request.by_name.get(b"origin")
    if origin is not None and not _is_local(origin.decode("latin-1")):
        raise Forbidden("This gateway answers local pages only: the Origin is a foreign one.")


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
