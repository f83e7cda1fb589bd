"""The gateway's HTTP surface as a table: what a method and a path are for, who may, and which path serves it."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import NamedTuple

from modelpool.errors import MethodNotAllowed, RouteNotFound
from modelpool.relay.inference import FORM_PATHS, JSON_PATHS, WEBSOCKET_PATHS


class Kind(Enum):
    INFERENCE = auto()
    """Goes to an instance of the model that the JSON body names."""
    FORM = auto()
    """The same for a body that is a form."""
    RESPONSES = auto()
    """The same, and the answer may be kept by the instance that made it."""
    RESPONSE = auto()
    """Goes to the instance that made the response in the path."""
    REALTIME = auto()
    """A WebSocket to an instance of the model that the query or the first events name."""
    CONTROL = auto()
    """Goes to the control socket."""
    MODELS = auto()
    MODEL = auto()
    HEALTH = auto()
    METRICS = auto()
    EXPLAIN = auto()
    FINISHED = auto()
    """What became of the latest requests."""
    INDEX = auto()
    PREFLIGHT = auto()
    """A browser asks whether a page may send a request."""


class Scope(Enum):
    """Who may use a route: `auth.Access` knows what each asks for."""

    OPEN = auto()
    INFERENCE = auto()
    ADMIN = auto()
    WORKER = auto()


class Route(NamedTuple):
    """`path` is the one that serves it: the engine's, the manager's, or (MODEL, EXPLAIN) the id as it stands in it."""

    kind: Kind
    scope: Scope
    path: bytes


_POST = ("POST",)
_GET = ("GET", "HEAD")
_ANY = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def _inference_routes() -> dict[bytes, Route]:
    """Each engine path, and the same with `/v1` taken off or put before it: base URLs come either way."""
    kinds = dict.fromkeys(JSON_PATHS, Kind.INFERENCE) | dict.fromkeys(FORM_PATHS, Kind.FORM)
    kinds["/v1/responses"] = Kind.RESPONSES
    served = {path.encode(): Route(kind, Scope.INFERENCE, path.encode()) for path, kind in kinds.items()}
    for path, route in sorted(served.items()):
        if path.startswith(b"/v1/"):
            served.setdefault(path[3:], route)
        elif path.count(b"/") == 1:
            served.setdefault(b"/v1" + path, route)
    return served


INFERENCE = _inference_routes()
_LOCAL = {
    b"/": Route(Kind.INDEX, Scope.OPEN, b"/"),
    b"/health": Route(Kind.HEALTH, Scope.OPEN, b"/health"),
    b"/admin/requests": Route(Kind.FINISHED, Scope.ADMIN, b"/admin/requests"),
    b"/metrics": Route(Kind.METRICS, Scope.ADMIN, b"/metrics"),
    b"/openapi.json": Route(Kind.CONTROL, Scope.INFERENCE, b"/openapi.json"),
    b"/v1/models": Route(Kind.MODELS, Scope.INFERENCE, b"/v1/models"),
    b"/models": Route(Kind.MODELS, Scope.INFERENCE, b"/v1/models"),
}
_WEBSOCKETS = {
    name: Route(Kind.REALTIME, Scope.INFERENCE, path.encode())
    for path in WEBSOCKET_PATHS
    for name in (path.encode(), path.encode().removeprefix(b"/v1"))
}
RESPONSE_ID = rb"[A-Za-z0-9_-]{1,256}"
_STORED_RESPONSE = re.compile(rb"(?:/v1)?(/responses/%b(/cancel)?)" % RESPONSE_ID)
_EXPLAIN = b"/admin/explain/"
PREFLIGHT = Route(Kind.PREFLIGHT, Scope.OPEN, b"")
_REGISTER = Route(Kind.CONTROL, Scope.ADMIN, b"/admin/models/register")


def match(method: bytes, path: bytes) -> Route:
    """Raises RouteNotFound, or MethodNotAllowed with the methods that are."""
    route, allowed = _find(method, path)
    if route is None:
        raise RouteNotFound(f"There is no route {_shown(path)}.")
    name = method.decode("latin-1")
    if name not in allowed:
        raise MethodNotAllowed(name, _shown(path), allowed)
    return route


def is_websocket(method: bytes, path: bytes) -> bool:
    return method == b"GET" and path in _WEBSOCKETS


def _find(method: bytes, path: bytes) -> tuple[Route | None, tuple[str, ...]]:
    """The route of a path, and its methods."""
    if route := INFERENCE.get(path):
        return route, _POST
    if route := _LOCAL.get(path):
        return route, _GET
    if route := _WEBSOCKETS.get(path):
        return route, ("GET",)
    if path in (b"/v1/models/register", b"/models/register") and method not in (b"GET", b"HEAD"):
        return _REGISTER, _POST  # a GET asks for a model of that name
    if match := _STORED_RESPONSE.fullmatch(path):
        return Route(Kind.RESPONSE, Scope.INFERENCE, b"/v1" + match[1]), _POST if match[2] else ("GET",)
    for prefix in (b"/v1/models/", b"/models/"):
        if path.startswith(prefix) and len(path) > len(prefix):
            return Route(Kind.MODEL, Scope.INFERENCE, path[len(prefix) :]), _GET
    if path == b"/workers" or path.startswith(b"/workers/"):
        reading = method in (b"GET", b"HEAD")
        return Route(Kind.CONTROL, Scope.ADMIN if reading else Scope.WORKER, path), _ANY
    if path.startswith(_EXPLAIN) and len(path) > len(_EXPLAIN):
        return Route(Kind.EXPLAIN, Scope.ADMIN, path[len(_EXPLAIN) :]), _GET
    if path.startswith(b"/admin/"):
        return Route(Kind.CONTROL, Scope.ADMIN, path), _ANY
    return None, ()


def _shown(path: bytes) -> str:
    text = path.decode("utf-8", "replace")
    return text if len(text) <= 200 else text[:199] + "…"
