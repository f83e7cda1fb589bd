"""Who may do what: managed keys, the API key, the admin key, the cluster token, and what is open on loopback."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from modelpool.errors import Forbidden, ManagerAway, Unauthorized
from modelpool.gateway.cors import Cors
from modelpool.gateway.keys import KeyRing
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Scope
from modelpool.gateway.table import RETRY_S
from modelpool.messages.keys import SECRET_PREFIX
from modelpool.process import StartupError
from modelpool.settings import GatewaySettings

_MANAGED = b"Bearer " + SECRET_PREFIX.encode()
_IN_PROTOCOL = b"openai-insecure-api-key."


class Access:
    """The rules.

    | scope     | no key needed                        | keys needed                                         |
    |-----------|--------------------------------------|-----------------------------------------------------|
    | OPEN      | open                                 | open                                                |
    | INFERENCE | open, to local names only if `local` | a managed key, the API key or the admin key         |
    | ADMIN     | open, to local names only if `local` | the admin key; another key: forbidden               |
    | WORKER    | the cluster token                    | the cluster token                                   |

    Keys are needed when an API key is set, when `require_key` says so, and once the pool ever made a managed key. As
    long as that is not known, nothing is open.

    Keys come as `Authorization: Bearer` or `x-api-key`; for a WebSocket also as the subprotocol
    `openai-insecure-api-key.` and the key, as OpenAI's clients in browsers send it. `local`: bound to loopback, where
    a web page could reach us under a name of its own (DNS rebinding), so a foreign Host or Origin is refused; but
    for inference, pages of allowed origins (`cors`) are not.
    """

    def __init__(
        self,
        *,
        api_key: str,
        admin_key: str,
        cluster_token: str,
        local: bool,
        keys: KeyRing,
        require_key: bool = False,
        cors: Cors = Cors(),
    ) -> None:
        self._api_key = api_key.encode()
        self._usual = b"Bearer " + self._api_key
        self._admin_key = admin_key.encode()
        self._cluster_token = cluster_token.encode()
        self._local = local
        self._cors = cors
        self._keys = keys
        self._required = require_key or bool(api_key)

    def check(self, request: Request, scope: Scope) -> None:
        """Sets the request's caller where it has a managed key. Raises Unauthorized, Forbidden or ManagerAway."""
        if scope is Scope.OPEN:
            return
        if scope is Scope.WORKER:
            if not _any_equal(_presented(request), self._cluster_token):
                raise Unauthorized("The cluster token (`Authorization: Bearer`) is missing or wrong.")
        elif self._required or self._keys.required:
            if scope is not Scope.INFERENCE or not self._recognized(request):
                self._check_keys(request, scope)
        elif not self._keys.known:
            self._check_unknown(request)
        elif self._local:
            _refuse_foreign(request, self._cors if scope is Scope.INFERENCE else Cors())

    def _recognized(self, request: Request) -> bool:
        """Whether this is one of the usual forms of a valid key. The others take longer to look at."""
        authorization = request.by_name.get(b"authorization", b"")
        if authorization.startswith(_MANAGED):
            request.caller = self._keys.caller(authorization[7:])
            return request.caller is not None
        return bool(self._api_key) and hmac.compare_digest(authorization, self._usual)

    def _check_keys(self, request: Request, scope: Scope) -> None:
        presented = _presented(request)
        if _any_equal(presented, self._admin_key):
            return
        caller = next(filter(None, map(self._keys.caller, presented)), None)
        known = caller is not None or (bool(self._api_key) and _any_equal(presented, self._api_key))
        if known and scope is Scope.INFERENCE:
            request.caller = caller
            return
        if known:
            raise Forbidden("This needs the admin key, which lies in the file `admin-key` in MODELPOOL_HOME.")
        if not self._keys.known and any(key.startswith(SECRET_PREFIX.encode()) for key in presented):
            raise ManagerAway("The gateway has not heard yet which API keys there are.", retry_after=RETRY_S)
        if presented:
            raise Unauthorized("The API key is wrong, or was revoked.")
        raise Unauthorized("An API key is needed: send `Authorization: Bearer` and the key.")

    def _check_unknown(self, request: Request) -> None:
        """Before the manager was heard: this may be a pool with keys."""
        if not _any_equal(_presented(request), self._admin_key):
            raise ManagerAway("The gateway has not heard yet whether an API key is needed.", retry_after=RETRY_S)


def check_exposure(gateway: GatewaySettings) -> None:
    """Raises StartupError when anybody on a network could use the gateway and nobody said that they may."""
    asks = gateway.api_key or gateway.require_key
    if not (asks or gateway.insecure_no_auth or is_loopback(gateway.host)):
        raise StartupError(
            f"{gateway.host or 'every address'} can be reached from elsewhere, and no API key is set.",
            "Set one with --api-key (MODELPOOL_API_KEY), or say --require-key and make keys with `modelpool keys "
            "create`, or --insecure-no-auth if anybody there may use it.",
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
    if request.upgrade:  # a browser cannot set headers of a WebSocket, but for this one
        offered = request.by_name.get(b"sec-websocket-protocol", b"").split(b",")
        keys += [each.strip()[len(_IN_PROTOCOL) :] for each in offered if each.strip().startswith(_IN_PROTOCOL)]
    return keys


def _any_equal(presented: Iterable[bytes], expected: bytes) -> bool:
    return any(hmac.compare_digest(each, expected) for each in presented)


def _refuse_foreign(request: Request, cors: Cors) -> None:
    host = request.by_name.get(b"host")
    if host is not None and not _is_local(f"//{host.decode('latin-1')}"):
        raise Forbidden("This gateway answers to local names only (localhost, 127.0.0.1): the Host is a foreign one.")
    origin = request.by_name.get(b"origin")
    if origin is not None and not _is_local(origin.decode("latin-1")) and not cors.allows(origin):
        raise Forbidden("This gateway answers local pages only: the Origin is a foreign one.")


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
