"""Who may go on, who waits, and who is next: requests for models that are not there yet, or too many at once.

A state machine without a clock: every method is an event, and returns what follows from it. A request is *ongoing*
from its grant to `done`. It is granted when its alias is available and fewer than `max_ongoing` are ongoing; so no
ticket that could be granted ever waits, and who comes when there is room need not look at the queues (`enter`).

An alias of which nothing else is said takes whatever comes. Once one that was let in found it `full`, its tickets are
granted as places are `freed`, until none of them waits any more.

Order of grants: the highest priority first; within a priority the callers in turn; of one caller the oldest ticket.
A caller's turn comes once between two turns of any other caller of its priority, whatever either has waiting.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum, StrEnum, auto

import msgspec


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What may wait for one alias: so many tickets, which hold so many bytes in all."""

    tickets: int
    bytes: int


class Refusal(StrEnum):
    TICKETS = "too many requests wait"
    BYTES = "the requests that wait hold too many bytes"


class State(Enum):
    WAITING = auto()
    GRANTED = auto()
    ENDED = auto()


class Ticket:
    """A request that could not enter at once, and joins again where it was granted in vain.

    `size`: bytes that it holds while it waits; `deadline`: `expire`'s.
    """

    __slots__ = ("alias", "caller", "deadline", "number", "priority", "size", "state")

    def __init__(self, alias: str, *, caller: str, priority: int, size: int, deadline: float) -> None:
        self.alias = alias
        self.caller = caller
        self.priority = priority
        self.size = size
        self.deadline = deadline
        self.number = 0
        """Its place in the order in which all tickets came; 0 for one that never waited."""
        self.state = State.WAITING


_Lane = OrderedDict[Ticket, None]
"""The tickets of one caller and priority for one alias, oldest first. Never empty."""


class _Queue:
    """What waits for one alias."""

    __slots__ = ("bytes", "lanes", "offered", "tickets")

    def __init__(self, *, offered: bool) -> None:
        self.tickets = 0
        self.bytes = 0
        self.lanes: dict[int, OrderedDict[str, _Lane]] = {}
        """By priority, by caller, callers in turn."""
        self.offered = offered
        """`done` may choose from it."""


class Admission:
    """Each event costs O(log n) in what waits, a grant also the number of aliases for which its caller waits."""

    def __init__(self, *, max_ongoing: int, bounds: Bounds) -> None:
        self.max_ongoing = max_ongoing
        self.bounds = bounds
        self.ongoing = 0
        self._places: dict[str, float] = {}
        """Of each alias that is available: so many more may be granted; any number where nothing waits."""
        self._queues: dict[str, _Queue] = {}
        self._numbered = 0
        # What `done` chooses from: what waits for aliases that can be sent more. Lanes by alias, callers in turn.
        self._eligible: dict[int, OrderedDict[str, dict[str, _Lane]]] = {}
        self._priorities: list[int] = []
        # Tickets by deadline; those that do not wait any more are swept out when they are more than half.
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._waiting = 0

    # What is

    @property
    def waiting(self) -> int:
        return self._waiting

    def waiting_for(self, alias: str) -> int:
        queue = self._queues.get(alias)
        return queue.tickets if queue else 0

    def bytes_for(self, alias: str) -> int:
        queue = self._queues.get(alias)
        return queue.bytes if queue else 0

    @property
    def wanted(self) -> Sequence[str]:
        """The aliases for which tickets wait."""
        return tuple(self._queues)

    def is_available(self, alias: str) -> bool:
        return alias in self._places

    def is_full(self, alias: str) -> bool:
        return self._places.get(alias) == 0

    @property
    def next_deadline(self) -> float | None:
        """When `expire` is due. None when nothing waits."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][2].state is not State.WAITING:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    # Events

    def enter(self, alias: str) -> bool:
        """Go on at once, if there is room; `done` follows. Nobody is overtaken: see above."""
        if self.ongoing < self.max_ongoing and self._places.get(alias):
            self.ongoing += 1
            return True
        return False

    def enter_full(self, alias: str) -> bool:
        """The same for one that need not find a place."""
        if self.ongoing < self.max_ongoing and alias in self._places:
            self.ongoing += 1
            return True
        return False

    def join(self, ticket: Ticket) -> Refusal | None:
        """Granted at once (see its state), else waiting, else refused. One that has waited has its place back."""
        if self.enter(ticket.alias):
            ticket.state = State.GRANTED
            return None
        queue = self._queues.get(ticket.alias) or _Queue(offered=bool(self._places.get(ticket.alias)))
        if not ticket.number:
            if queue.tickets >= self.bounds.tickets:
                return Refusal.TICKETS
            if queue.bytes + ticket.size > self.bounds.bytes:
                return Refusal.BYTES
            self._numbered += 1
            ticket.number = self._numbered
        self._queues[ticket.alias] = queue
        self._put(queue, ticket)
        return None

    def done(self) -> Sequence[Ticket]:
        """One that was ongoing has ended. Returns what is granted in its place."""
        assert self.ongoing > 0
        self.ongoing -= 1
        return self._grants() if self._priorities else ()

    def leave(self, ticket: Ticket) -> Sequence[Ticket]:
        """Its request is gone. A waiting one goes; the grant of one that never used it goes on to whom it returns."""
        if ticket.state is State.WAITING:
            self._take(ticket, State.ENDED)
        elif ticket.state is State.GRANTED:
            ticket.state = State.ENDED
            return [*self.freed(ticket.alias), *self.done()]
        return ()

    def available(self, alias: str, places: float = math.inf) -> Sequence[Ticket]:
        """There is where to send requests for the alias, so many at first. Returns what is granted."""
        if alias in self._places:
            return ()
        queue = self._queues.get(alias)
        self._places[alias] = places if queue else math.inf
        if queue is None or not places:
            return ()
        self._offer_all(alias, queue)
        return self._grants()

    def unavailable(self, alias: str) -> None:
        """There is nowhere to send them any more. What was granted goes on."""
        self.full(alias)
        self._places.pop(alias, None)

    def full(self, alias: str) -> None:
        """No more can be sent, until a place is `freed`. Nothing where it is not available."""
        if self._places.get(alias):
            self._places[alias] = 0
            if (queue := self._queues.get(alias)) and queue.offered:
                self._withdraw_all(alias, queue)

    def freed(self, alias: str, places: int = 1) -> Sequence[Ticket]:
        """So many more can be sent. Returns what is granted. Nothing where it takes whatever comes."""
        before = self._places.get(alias, math.inf)
        if before == math.inf or not places:
            return ()
        queue = self._queues.get(alias)
        self._places[alias] = before + places if queue else math.inf
        granted: list[Ticket] = []
        if queue and not before:
            # As long as there is room for more that are ongoing, nothing else could be granted.
            while queue.tickets and self._places[alias] and self.ongoing < self.max_ongoing:
                granted.append(self._grant(_next_of(queue)))
            if queue.tickets and self._places[alias]:
                self._offer_all(alias, queue)
        return granted

    def expire(self, now: float) -> Sequence[Ticket]:
        """Take out what has waited until its deadline."""
        expired: list[Ticket] = []
        while (due := self.next_deadline) is not None and due <= now:
            ticket = heapq.heappop(self._deadlines)[2]
            self._take(ticket, State.ENDED)
            expired.append(ticket)
        return expired

    def evict(self, alias: str) -> Sequence[Ticket]:
        """Take out all that wait for an alias, oldest first."""
        queue = self._queues.get(alias)
        if queue is None:
            return ()
        lanes = (lane for callers in queue.lanes.values() for lane in callers.values())
        tickets = sorted((each for lane in lanes for each in lane), key=_number)
        for ticket in tickets:
            self._take(ticket, State.ENDED)
        return tickets

    # Inside

    def _put(self, queue: _Queue, ticket: Ticket) -> None:
        ticket.state = State.WAITING
        callers = queue.lanes.setdefault(ticket.priority, OrderedDict())
        lane = callers.get(ticket.caller)
        if lane is None:
            lane = callers[ticket.caller] = OrderedDict()
            lane[ticket] = None
            if queue.offered:
                self._offer(ticket.priority, ticket.caller, ticket.alias, lane)
        else:
            last = next(reversed(lane))
            lane[ticket] = None
            if last.number > ticket.number:
                for each in sorted(lane, key=_number):
                    lane.move_to_end(each)
        queue.tickets += 1
        queue.bytes += ticket.size
        self._waiting += 1
        heapq.heappush(self._deadlines, (ticket.deadline, ticket.number, ticket))

    def _take(self, ticket: Ticket, state: State) -> None:
        """Out of its lane, and whatever that leaves empty with it."""
        ticket.state = state
        alias, priority, caller = ticket.alias, ticket.priority, ticket.caller
        queue = self._queues[alias]
        callers = queue.lanes[priority]
        lane = callers[caller]
        del lane[ticket]
        queue.tickets -= 1
        queue.bytes -= ticket.size
        self._waiting -= 1
        if not lane:
            del callers[caller]
            if not callers:
                del queue.lanes[priority]
            if queue.offered:
                self._withdraw(priority, caller, alias)
        if not queue.tickets:
            del self._queues[alias]
            if alias in self._places:
                self._places[alias] = math.inf
        if len(self._deadlines) > 2 * self._waiting + 64:
            self._deadlines = [each for each in self._deadlines if each[2].state is State.WAITING]
            heapq.heapify(self._deadlines)

    def _offer_all(self, alias: str, queue: _Queue) -> None:
        """All that waits for the alias may be granted. Callers that are new have their turns by who waits longest."""
        queue.offered = True
        for priority, callers in queue.lanes.items():
            for caller, lane in sorted(callers.items(), key=lambda each: _number(_oldest(each[1]))):
                self._offer(priority, caller, alias, lane)

    def _withdraw_all(self, alias: str, queue: _Queue) -> None:
        queue.offered = False
        for priority, callers in queue.lanes.items():
            for caller in callers:
                self._withdraw(priority, caller, alias)

    def _offer(self, priority: int, caller: str, alias: str, lane: _Lane) -> None:
        """The lane may be granted from. Its caller, if new, is the last to have its turn."""
        callers = self._eligible.get(priority)
        if callers is None:
            callers = self._eligible[priority] = OrderedDict()
            insort(self._priorities, priority)
        callers.setdefault(caller, {})[alias] = lane

    def _withdraw(self, priority: int, caller: str, alias: str) -> None:
        callers = self._eligible[priority]
        lanes = callers[caller]
        del lanes[alias]
        if not lanes:
            del callers[caller]
        if not callers:
            del self._eligible[priority]
            self._priorities.remove(priority)

    def _grants(self) -> Sequence[Ticket]:
        granted: list[Ticket] = []
        while self._priorities and self.ongoing < self.max_ongoing:
            callers = self._eligible[self._priorities[-1]]
            caller, lanes = next(iter(callers.items()))
            callers.move_to_end(caller)
            granted.append(self._grant(min(map(_oldest, lanes.values()), key=_number)))
        return granted

    def _grant(self, ticket: Ticket) -> Ticket:
        alias = ticket.alias
        self._queues[alias].lanes[ticket.priority].move_to_end(ticket.caller)
        self._take(ticket, State.GRANTED)
        self.ongoing += 1
        if alias in self._queues:
            if self._places[alias] > 1:
                self._places[alias] -= 1
            else:
                self.full(alias)
        return ticket


def _next_of(queue: _Queue) -> Ticket:
    return _oldest(next(iter(queue.lanes[max(queue.lanes)].values())))


def _oldest(lane: _Lane) -> Ticket:
    return next(iter(lane))


def _number(ticket: Ticket) -> int:
    return ticket.number
