"""The routing table: the last snapshot with the deltas since, as this gateway routes by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from modelpool.core.routing.choice import Reason, least_loaded
from modelpool.core.routing.nearest import nearest
from modelpool.errors import CapacityError, ManagerAway, ModelBusy, ModelNotFound, ModelNotReady, NoAvailableWorker
from modelpool.gateway.instances import Instance, Instances
from modelpool.messages.routing import Delta, ModelEntry, RoutingUpdate, Snapshot, Unavailable

RETRY_S = 1.0
_NAME_SHOWN_MAX = 128


class Gap(Exception):
    """An update does not follow the one before: something was missed."""


class Model:
    """A registered model and its instances."""

    __slots__ = ("_all", "_turn", "entry", "instances")

    def __init__(self, entry: ModelEntry, instances: Instances) -> None:
        self.entry = entry
        self.instances = tuple(map(instances.of, entry.routes))
        self._all = instances
        self._turn = -1

    def awake(self) -> tuple[Instance, ...]:
        """All instances. Raises CapacityError when there is none."""
        if not self.instances:
            raise self.unavailable()
        return self.instances

    def choose(self, tried: Collection[Instance] = ()) -> tuple[Instance, Reason]:
        """The instance for a request that was at `tried` already.

        Raises ModelBusy when all have as many as they take at once, another CapacityError when there is none.
        """
        candidates = self.instances or self.awake()
        if tried:
            candidates = tuple(each for each in candidates if each not in tried)
            if not candidates:
                raise self._none_takes_it()
        if self._all.shared:
            for each in candidates:
                each.count_all()
        if self._all.suspects and len(candidates) > 1:
            candidates = _trusted(candidates)
        self._turn += 1
        best, reason = least_loaded(candidates, self._turn)
        if best.inflight < best.full_at:
            return best, reason
        candidates = tuple(each for each in candidates if each.inflight < each.full_at)
        if candidates:
            return least_loaded(candidates, self._turn)
        raise self._none_takes_it() if tried else self.busy()

    @property
    def places(self) -> int:
        """So many more this process may send to its instances now."""
        return sum(each.places for each in _trusted(self.instances))

    def busy(self, retry_after: float = RETRY_S) -> ModelBusy:
        """What to say where none of the instances may be sent any more."""
        most = sum(each.capacity for each in self.instances)
        count = f"{len(self.instances)} instances" if len(self.instances) > 1 else "one instance"
        return ModelBusy(
            f"The model `{self.entry.alias}` runs as many requests as it can, {most} at once on {count}.",
            retry_after=retry_after,
        )

    def _none_takes_it(self) -> ModelNotReady:
        return ModelNotReady(
            f"No instance of the model `{self.entry.alias}` takes requests right now.", retry_after=RETRY_S
        )

    def unavailable(self, more: str = "") -> CapacityError:
        """Why there is no instance, and what `more` there is to say."""
        why = self.entry.unavailable or Unavailable(
            code=ModelNotReady.code, message=f"The model `{self.entry.alias}` is not ready.", retry_after=RETRY_S
        )
        kind = NoAvailableWorker if why.code == NoAvailableWorker.code else ModelNotReady
        return kind(why.message + more, retry_after=why.retry_after, code=why.code)


def _trusted(instances: tuple[Instance, ...]) -> tuple[Instance, ...]:
    """Those whose breaker lets a request pass. With all of them under suspicion, trying is better than refusing."""
    now = time.monotonic()
    return tuple(each for each in instances if each.breaker.admits(now)) or instances


class Table:
    """Models by alias. Empty and not `known` before the first snapshot."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self.shared = instances.shared
        """Whether other processes on this node send to the same instances."""
        self._models: dict[str, Model] = {}
        self._watchers: list[Callable[[], None]] = []
        self.epoch = ""
        self.sequence = 0
        self.current = False
        """The manager is being followed: there is no model but these."""

    @property
    def known(self) -> bool:
        return bool(self.epoch)

    def model(self, alias: str) -> Model:
        """Raises ModelNotFound, or ManagerAway while a manager may know of it by now."""
        model = self._models.get(alias)
        if model is None:
            self._must_be_known()
            shown = alias if len(alias) <= _NAME_SHOWN_MAX else alias[: _NAME_SHOWN_MAX - 1] + "…"
            if not self.current:
                was = f"Before that there was no model `{shown}`."
                raise ManagerAway(f"The manager is being started again. {was}", retry_after=RETRY_S)
            raise ModelNotFound(shown, nearest(alias, self._models))
        return model

    def has(self, alias: str) -> bool:
        return alias in self._models

    def find(self, alias: str) -> Model | None:
        return self._models.get(alias)

    def models(self) -> Collection[Model]:
        return self._models.values()

    def routed(self) -> frozenset[str]:
        """The models that have an instance."""
        return frozenset(alias for alias, model in self._models.items() if model.instances)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` whenever the table has changed."""
        self._watchers.append(watcher)

    def entries(self) -> list[ModelEntry]:
        """All registered models. Raises ManagerAway while nothing is known."""
        self._must_be_known()
        return [model.entry for model in self._models.values()]

    def instances(self, aliases: Collection[str] = ()) -> list[Instance]:
        """All instances of these models, or of all models. Raises ManagerAway while nothing is known."""
        self._must_be_known()
        models = [model for alias, model in self._models.items() if not aliases or alias in aliases]
        return [instance for model in models for instance in model.instances]

    def apply(self, update: RoutingUpdate) -> None:
        """Raises Gap, having changed nothing."""
        if isinstance(update, Snapshot):
            self._models = {alias: self._adopt(entry) for alias, entry in update.models.items()}
        else:
            self._check(update)
            changed = {alias: self._adopt(entry) for alias, entry in update.changed.items()}
            kept = {alias: model for alias, model in self._models.items() if alias not in update.removed}
            self._models = {**kept, **changed}
        self.epoch, self.sequence, self.current = update.epoch, update.sequence, True
        self._instances.keep_only({each for model in self._models.values() for each in model.instances})
        for watcher in self._watchers:
            watcher()

    def _check(self, delta: Delta) -> None:
        if (delta.epoch, delta.sequence) != (self.epoch, self.sequence + 1):
            raise Gap(f"{delta.epoch}/{delta.sequence} does not follow {self.epoch}/{self.sequence}")

    def _adopt(self, entry: ModelEntry) -> Model:
        before = self._models.get(entry.alias)
        if before is not None and before.entry == entry:
            return before
        return Model(entry, self._instances)

    def _must_be_known(self) -> None:
        if not self.known:
            raise ManagerAway("The gateway has not heard yet which models there are.", retry_after=RETRY_S)
