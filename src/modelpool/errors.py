"""Every error a caller can see, and the one renderer of OpenAI-shaped error bodies.

PoolError
├── CallerError            the request is at fault
│   ├── InvalidRequest     400
│   ├── Unauthorized       401
│   ├── Forbidden          403
│   ├── NotFound           404  ModelNotFound, WorkerNotFound, InstanceNotFound, RouteNotFound, ResponseNotFound,
│   │                           RequestNotKnown
│   ├── MethodNotAllowed   405
│   ├── RequestTimeout     408
│   ├── Conflict           409
│   ├── BodyTooLarge       413
│   ├── UpgradeRequired    426
│   ├── RateLimitExceeded  429
│   ├── HeadersTooLarge    431
│   └── InvalidBody        422  a control-plane body: field, value, what is allowed
├── CapacityError          nothing can take it now; all carry Retry-After
│   ├── ModelNotReady      503
│   ├── NoAvailableWorker  503
│   ├── WaitingRoomFull    429
│   ├── ModelBusy          503
│   ├── TooManyOngoing     503
│   └── Draining           503
├── EngineError            the engine is at fault
│   ├── UpstreamFailed     502
│   └── UpstreamTimeout    504
└── PoolFault              we are at fault
    ├── ManagerAway        503
    └── InternalError      500
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec


class PoolError(Exception):
    """An error with a place in the tree.

    `code` is for programs, `message` for people. `param` names the field at fault, `retry_after` is in seconds.
    """

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None, code: str | None = None
    ) -> None:
        # Often the words of another error, with their own full stop, end this one.
        self.message = f"{message.rstrip('.')}." if message.endswith("..") else message
        super().__init__(self.message)
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class CallerError(PoolError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidRequest(CallerError):
    """The body, a parameter or the HTTP message itself is malformed."""


class Unauthorized(CallerError):
    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class Forbidden(CallerError):
    status = 403
    code = "forbidden"
    type = "permission_error"


class NotFound(CallerError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, alias: str, nearest: Iterable[str] = ()) -> None:
        names = ", ".join(f"`{name}`" for name in nearest)
        hint = f" Did you mean {names}?" if names else " No model of a similar name is registered."
        super().__init__(f"The model `{alias}` is not registered.{hint}", param="model")


class WorkerNotFound(NotFound):
    code = "worker_not_found"


class InstanceNotFound(NotFound):
    code = "instance_not_found"


class RouteNotFound(NotFound):
    code = "route_not_found"


class RequestNotKnown(NotFound):
    """Asked what was decided for a request that is not among the recent ones."""

    code = "request_not_known"


class ResponseNotFound(NotFound):
    code = "response_not_found"


class MethodNotAllowed(CallerError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        self.allowed = tuple(allowed)
        super().__init__(f"{method} is not allowed on {path}; allowed: {', '.join(self.allowed)}.")


class RequestTimeout(CallerError):
    """The client did not send its request in time."""

    status = 408
    code = "request_timeout"


class Conflict(CallerError):
    status = 409
    code = "conflict"


class BodyTooLarge(CallerError):
    status = 413
    code = "body_too_large"


class UpgradeRequired(CallerError):
    """The route is a WebSocket."""

    status = 426
    code = "upgrade_required"


class RateLimitExceeded(CallerError):
    """A limit of the caller's key. `type` says which, as OpenAI has it: "requests" or "tokens"."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, type: str, retry_after: float | None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = type


class HeadersTooLarge(CallerError):
    status = 431
    code = "headers_too_large"


class InvalidBody(CallerError):
    status = 422
    code = "invalid_body"


class CapacityError(PoolError):
    status = 503
    code = "unavailable"
    type = "service_unavailable_error"


class ModelNotReady(CapacityError):
    code = "model_not_ready"


class NoAvailableWorker(CapacityError):
    code = "no_available_worker"


class WaitingRoomFull(CapacityError):
    """It may not even wait."""

    status = 429
    code = "waiting_room_full"


class ModelBusy(CapacityError):
    """All instances have as many requests as they take at once."""

    code = "model_busy"


class TooManyOngoing(CapacityError):
    code = "too_many_ongoing"


class Draining(CapacityError):
    """An instance that takes no new requests; the gateway tries another one."""

    code = "instance_draining"


class EngineError(PoolError):
    """`may_have_run`: False when the request cannot have reached the engine, so that it is safe to send it again."""

    status = 502
    code = "upstream_failed"

    def __init__(self, message: str, *, may_have_run: bool = True) -> None:
        super().__init__(message)
        self.may_have_run = may_have_run


class UpstreamFailed(EngineError):
    """The instance broke the connection, or answered something that is not HTTP."""


class UpstreamTimeout(EngineError):
    status = 504
    code = "upstream_timeout"


class PoolFault(PoolError):
    pass


class ManagerAway(PoolFault):
    status = 503
    code = "manager_away"


class InternalError(PoolFault):
    pass


def error_body(error: PoolError) -> bytes:
    """The OpenAI error envelope, as JSON: `{"error": {"message", "type", "param", "code"}}`."""
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )


def error_headers(error: PoolError) -> list[tuple[str, str]]:
    """The headers that belong to an error besides its content type: `Retry-After`, `Allow`, `WWW-Authenticate`."""
    headers = []
    if error.retry_after is not None:
        headers.append(("Retry-After", str(max(1, math.ceil(error.retry_after)))))
    if isinstance(error, MethodNotAllowed):
        headers.append(("Allow", ", ".join(error.allowed)))
    if isinstance(error, UpgradeRequired):
        headers.append(("Upgrade", "websocket"))
    if isinstance(error, Unauthorized):
        headers.append(("WWW-Authenticate", "Bearer"))
    return headers
