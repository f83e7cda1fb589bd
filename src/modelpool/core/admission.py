"""Who may go on, who waits, and who is next: requests for models that are not there yet, or too many at once.

A state machine without a clock: every method is an event, and returns what follows from it. A request is *ongoing*
from its grant to `done`. It is granted when its alias is available and fewer than `max_ongoing` are ongoing; so no
ticket that could be granted ever waits, and who comes when there is room need not look at the queues (`enter`).

Order of grants: the highest priority first; within a priority the callers in turn; of one caller the oldest ticket.
A caller's turn comes once between two turns of any other caller of its priority, whatever either has waiting.
"""

from __future__ import annotations

import heapq
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
    """A request that could not enter at once. `size`: bytes that it holds while it waits; `deadline`: `expire`'s."""

    __slots__ = ("alias", "caller", "deadline", "number", "priority", "size", "state")

    def __init__(self, alias: str, *, caller: str, priority: int, size: int, deadline: float) -> None:
        self.alias = alias
        self.caller = caller
        self.priority = priority
        self.size = size
        self.deadline = deadline
        self.number = 0
        """Its place in the order in which all tickets came."""
        self.state = State.WAITING


_Who = tuple[int, str]
"""(priority, caller)"""
_Lane = OrderedDict[Ticket, None]
"""The tickets of one caller and priority for one alias, oldest first. Never empty."""


class _Queue:
    """What waits for one alias."""

    __slots__ = ("bytes", "lanes", "tickets")

    def __init__(self) -> None:
        self.tickets = 0
        self.bytes = 0
        self.lanes: dict[_Who, _Lane] = {}


class Admission:
    """Each event costs O(log n) in what waits, a grant also the number of aliases for which its caller waits."""

    def __init__(self, *, max_ongoing: int, bounds: Bounds) -> None:
        self.max_ongoing = max_ongoing
        self.bounds = bounds
        self.ongoing = 0
        self._available: set[str] = set()
        self._queues: dict[str, _Queue] = {}
        self._numbered = 0
        # What waits for aliases that are available: what `done` chooses from. Lanes by alias, callers in turn.
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
        return alias in self._available

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
        if self.ongoing < self.max_ongoing and alias in self._available:
            self.ongoing += 1
            return True
        return False

    def join(self, ticket: Ticket) -> Refusal | None:
        """Granted at once (see its state), else waiting, else refused."""
        if self.enter(ticket.alias):
            ticket.state = State.GRANTED
            return None
        queue = self._queues.get(ticket.alias) or _Queue()
        if queue.tickets >= self.bounds.tickets:
            return Refusal.TICKETS
        if queue.bytes + ticket.size > self.bounds.bytes:
            return Refusal.BYTES
        self._queues[ticket.alias] = queue
        self._numbered += 1
        ticket.number = self._numbered
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
            return self.done()
        return ()

    def available(self, alias: str) -> Sequence[Ticket]:
        """There is where to send requests for the alias. Returns what is granted."""
        if alias in self._available:
            return ()
        self._available.add(alias)
        queue = self._queues.get(alias)
        if queue is None:
            return ()
        for who, lane in sorted(queue.lanes.items(), key=lambda each: _oldest(each[1]).number):
            self._offer(who, alias, lane)
        return self._grants()

    def unavailable(self, alias: str) -> None:
        """There is nowhere to send them any more. What was granted goes on."""
        if alias in self._available:
            self._available.discard(alias)
            if queue := self._queues.get(alias):
                for who in queue.lanes:
                    self._withdraw(who, alias)

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
        tickets = sorted((each for lane in queue.lanes.values() for each in lane), key=lambda each: each.number)
        for ticket in tickets:
            self._take(ticket, State.ENDED)
        return tickets

    # Inside

    def _put(self, queue: _Queue, ticket: Ticket) -> None:
        who = (ticket.priority, ticket.caller)
        lane = queue.lanes.get(who)
        if lane is None:
            lane = queue.lanes[who] = OrderedDict()
            lane[ticket] = None
            if ticket.alias in self._available:
                self._offer(who, ticket.alias, lane)
        else:
            lane[ticket] = None
        queue.tickets += 1
        queue.bytes += ticket.size
        self._waiting += 1
        heapq.heappush(self._deadlines, (ticket.deadline, ticket.number, ticket))

    def _take(self, ticket: Ticket, state: State) -> None:
        """Out of its lane, and whatever that leaves empty with it."""
        ticket.state = state
        who, queue = (ticket.priority, ticket.caller), self._queues[ticket.alias]
        lane = queue.lanes[who]
        del lane[ticket]
        queue.tickets -= 1
        queue.bytes -= ticket.size
        self._waiting -= 1
        if not lane:
            del queue.lanes[who]
            if ticket.alias in self._available:
                self._withdraw(who, ticket.alias)
            if not queue.lanes:
                del self._queues[ticket.alias]
        if len(self._deadlines) > 2 * self._waiting + 64:
            self._deadlines = [each for each in self._deadlines if each[2].state is State.WAITING]
            heapq.heapify(self._deadlines)

    def _offer(self, who: _Who, alias: str, lane: _Lane) -> None:
        """The lane may be granted from. Its caller, if new, is the last to have its turn."""
        priority, caller = who
        callers = self._eligible.get(priority)
        if callers is None:
            callers = self._eligible[priority] = OrderedDict()
            insort(self._priorities, priority)
        callers.setdefault(caller, {})[alias] = lane

    def _withdraw(self, who: _Who, alias: str) -> None:
        priority, caller = who
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
            ticket = min(map(_oldest, lanes.values()), key=lambda each: each.number)
            self._take(ticket, State.GRANTED)
            self.ongoing += 1
            granted.append(ticket)
        return granted


def _oldest(lane: _Lane) -> Ticket:
    return next(iter(lane))
