"""Gateway's replica ↔ manager actor: what crosses Ray. All of it as JSON in bytes.

A call names a method of the manager's port and has its arguments in order. A stream is asked for its next item by a
name that its reader made up; asking again says that the item before has arrived.
"""

from __future__ import annotations

import msgspec

from modelpool.settings import Settings, given

POLL_S = 5.0
"""A stream with nothing to say answers after this long, and is asked again."""
ABANDONED_S = 3 * POLL_S
"""A stream that nobody asks for this long is closed; a node that is silent for this long has no gateway."""


class Call(msgspec.Struct, frozen=True):
    method: str
    arguments: tuple[msgspec.Raw, ...] = ()


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """What the method returned, or the next item of a stream."""

    value: msgspec.Raw = msgspec.Raw(b"null")


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """What the method raised: the fields of a PoolError."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Nothing(msgspec.Struct, frozen=True, tag="nothing"):
    """The stream has no item yet: ask again."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """The stream has ended."""


Reply = Answer | Refusal
Item = Answer | Refusal | Nothing | End


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A replica says every POLL_S that its gateway serves, and where workers reach it."""

    node_id: str
    url: str


class Deployment(msgspec.Struct, frozen=True):
    """What `deploy` gives the manager actor and every replica. `code`: a digest of what they are to run."""

    settings: Settings
    admin_key: str
    code: str = ""


class _Run(msgspec.Struct, frozen=True):
    run_id: str = ""


class _Deployed(msgspec.Struct, frozen=True):
    settings: _Run = _Run()


def encode_deployment(deployment: Deployment) -> bytes:
    """Of the settings those that were given: another version refuses only what it does not know and was asked for."""
    return msgspec.json.encode({**msgspec.to_builtins(deployment), "settings": given(deployment.settings)})


def deployed_run_id(deployment: bytes) -> str:
    """The run id in the deployment of any version."""
    return msgspec.json.decode(deployment, type=_Deployed).settings.run_id
