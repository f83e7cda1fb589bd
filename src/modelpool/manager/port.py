"""What the control API needs of a manager, wherever it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from modelpool.messages.admin import ModelView, PoolStatus, WorkerView
from modelpool.messages.demand import DemandReport
from modelpool.messages.dump import Dump, Loaded
from modelpool.messages.keys import KeyMade, KeySpec, KeyView
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Update
from modelpool.messages.workers import Heartbeat, HeartbeatAnswer, RegisterWorker


class ManagerPort(Protocol):
    """The manager as its callers see it. Everything raises errors of modelpool.errors."""

    async def register_model(self, spec: ModelSpec, replace: bool = False) -> ModelView:
        """Register a model. The same spec again changes nothing; another one under the same alias is a Conflict.

        `replace`: another one takes its place: instances of the one before serve until one of the new one does.
        """

    async def change_model(self, alias: str, change: dict[str, Any]) -> ModelView:
        """Change settings of a model, by a JSON merge patch; what runs runs on.

        Changes come one after the other, each to what the one before left. Raises ModelNotFound, and InvalidBody for
        a field that there is not, that cannot have this value, or that an engine is started with.
        """

    async def remove_model(self, alias: str) -> None:
        """Forget a model and end its instances, after those in flight. Raises ModelNotFound."""

    async def model(self, alias: str) -> ModelView:
        """One model. Raises ModelNotFound."""

    async def models(self) -> list[ModelView]:
        """All registered models, whatever runs."""

    async def workers(self) -> list[WorkerView]:
        """All workers that were heard of, lost ones too."""

    async def status(self) -> PoolStatus:
        """Everything at once."""

    async def register_worker(self, message: RegisterWorker) -> HeartbeatAnswer:
        """A worker starts, or comes back; what it runs is adopted. Raises InvalidBody for a URL of no use."""

    async def heartbeat(self, worker_id: str, message: Heartbeat) -> HeartbeatAnswer:
        """What a worker runs now. Raises WorkerNotFound: then it registers again."""

    async def unregister_worker(self, worker_id: str, incarnation: str = "") -> None:
        """A worker ends, and its instances with it.

        Raises WorkerNotFound, also where that `incarnation` is over and the next one is there.
        """

    async def drain_worker(self, worker_id: str) -> WorkerView:
        """Let a worker go: nothing new comes to it, what it runs is started elsewhere first, then it ends.

        Raises WorkerNotFound.
        """

    async def keep_worker(self, worker_id: str) -> WorkerView:
        """Have a worker that is being drained stay after all. Raises WorkerNotFound."""

    async def dump(self) -> Dump:
        """All models and keys; of a key the digest only."""

    async def load(self, dump: Dump, *, restore: bool) -> Loaded:
        """Have what was dumped, all of it or nothing; what is there already stays. Raises Conflict for what differs.

        `restore`: this pool, which must be empty, becomes the dumped one, so that its workers come to it.
        """

    async def make_key(self, spec: KeySpec) -> KeyMade:
        """Make an API key, which works when this returns. Raises Conflict where a live one has its name."""

    async def keys(self) -> list[KeyView]:
        """All keys that were ever made."""

    async def revoke_key(self, id: str) -> KeyView:
        """The key opens nothing any more when this returns. Raises KeyNotFound."""

    async def demand(self, report: DemandReport) -> None:
        """What a gateway has waiting and in flight."""

    def snapshots(self, gateway: str = "", epoch: str = "") -> AsyncIterator[Update | None]:
        """Keys and routing table, first whole, then changes; None where there was nothing for KEEPALIVE_S.

        With its end the demand that `gateway` reported ends too. `epoch`: the one that it knows. Raises Conflict
        where that is of another cluster.
        """

    def logs(self, alias: str, *, tail: int, follow: bool) -> AsyncIterator[bytes]:
        """The log of a model's instance (of the first one, or of one named `alias-rN`). Raises ModelNotFound."""
