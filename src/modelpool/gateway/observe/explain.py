"""What is kept of a request, made into an Explanation: a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from modelpool.core.routing.choice import Reason, least_loaded
from modelpool.gateway.observe.journey import Record
from modelpool.messages.explain import Attempt, Considered, Explanation, Outcome, Role

_WHY: dict[str, str] = {
    Reason.ONLY: "the only instance that could take it",
    Reason.LEAST_LOADED: "the least loaded",
    Reason.TURN: "whose turn it was among equally loaded ones",
    Reason.STORED: "which keeps the response that it goes on from",
}

_SHOWN_S = 0.001


class _Candidate(msgspec.Struct, frozen=True):
    name: str
    inflight: int
    capacity: int


def explain(record: Record, *, slot: int, alive: bool, now: float, wall: float) -> Explanation:
    """`now` and `wall` are the same moment, on the monotonic clock and since 1970. `alive`: its process runs still."""
    candidates = [_Candidate(*each) for each in zip(record.names, record.loads, record.capacities, strict=True)]
    runner_up = _runner_up(record, candidates)
    explanation = Explanation(
        request_id=record.id.decode("latin-1"),
        outcome=_outcome(record, alive=alive),
        words=(),
        accepted_at=wall - (now - record.accepted),
        path=record.path.decode("latin-1"),
        model=record.alias,
        caller=record.caller,
        status=record.status or None,
        code=record.code,
        reason=record.reason,
        instance=record.instance,
        runner_up=runner_up,
        considered=tuple(_considered(record, each, runner_up) for each in candidates),
        retries=tuple(Attempt(instance=instance, why=why) for instance, why in record.tries),
        waited_s=record.waited,
        sent_s=_since(record, record.sent),
        first_byte_s=_since(record, record.first_byte),
        ended_s=_since(record, record.ended),
        bytes_in=record.bytes_in,
        bytes_out=record.bytes_out,
        pieces=record.segments,
        streamed=record.streamed,
        gateway=slot,
    )
    return msgspec.structs.replace(explanation, words=tuple(_words(explanation, now - record.accepted)))


def _outcome(record: Record, *, alive: bool) -> Outcome:
    if not record.ended:
        return Outcome.RUNNING if alive else Outcome.LOST
    if record.left:
        return Outcome.CLIENT_LEFT
    return Outcome.FAILED if record.code else Outcome.ANSWERED


def _runner_up(record: Record, candidates: Iterable[_Candidate]) -> str:
    """Who would have been chosen, had there not been the one that was."""
    out = {record.instance, *record.avoided, *(name for name, _ in record.tries)}
    others = [each for each in candidates if each.name not in out]
    return least_loaded(others, 0)[0].name if others else ""


def _considered(record: Record, candidate: _Candidate, runner_up: str) -> Considered:
    role = None
    if candidate.name == record.instance:
        role = Role.CHOSEN
    elif candidate.name == runner_up:
        role = Role.RUNNER_UP
    elif any(candidate.name == name for name, _ in record.tries):
        role = Role.TRIED
    elif candidate.name in record.avoided:
        role = Role.AVOIDED
    return Considered(
        instance=candidate.name,
        inflight=candidate.inflight,
        capacity=candidate.capacity,
        load=round(candidate.inflight / candidate.capacity, 3),
        role=role,
    )


def _since(record: Record, moment: float) -> float | None:
    return round(moment - record.accepted, 6) if moment else None


def _words(of: Explanation, age_s: float) -> Iterator[str]:
    by = f" by the key `{of.caller}`" if of.caller else ""
    model = f"the model `{of.model}`" if of.model else "no model that could be read"
    yield f"A request to {of.path} for {model}{by}, {seconds(age_s)} ago."
    if of.waited_s >= _SHOWN_S:
        yield f"It waited {seconds(of.waited_s)} for an instance."
    for attempt in of.retries:
        yield f"{attempt.instance} did not take it: {attempt.why}."
    if of.instance:
        yield _choice(of)
    avoided = [each.instance for each in of.considered if each.role is Role.AVOIDED]
    if avoided:
        yield f"Left alone, since they kept failing: {', '.join(avoided)}."
    yield _end(of)


def _choice(of: Explanation) -> str:
    by_name = {each.instance: each for each in of.considered}

    def loaded(name: str) -> str:
        each = by_name.get(name)
        return f"{name} ({each.inflight} of {each.capacity} in flight)" if each else name

    text = f"It went to {loaded(of.instance)}, {_WHY.get(of.reason, of.reason)}"
    return f"{text}; runner-up {loaded(of.runner_up)}." if of.runner_up else f"{text}."


def _end(of: Explanation) -> str:
    first = "" if of.first_byte_s is None else f", the first byte after {seconds(of.first_byte_s)}"
    passed = f"{first}, {of.bytes_out} bytes in {of.pieces} piece{'' if of.pieces == 1 else 's'}"
    if of.outcome is Outcome.RUNNING:
        return "It runs still." if of.instance else "It waits still."
    if of.outcome is Outcome.LOST:
        return "The gateway process that served it ended before it did."
    after = seconds(of.ended_s or 0.0)
    if of.outcome is Outcome.CLIENT_LEFT:
        return f"Its client left after {after}{passed if of.pieces else ', before there was an answer'}."
    if of.outcome is Outcome.FAILED:
        begun = f" in the middle of the answer{passed}" if of.first_byte_s is not None else f" with status {of.status}"
        return f"It failed after {after}{begun}: {of.code}."
    return f"It was answered with status {of.status} after {after}{passed}."


def seconds(seconds: float) -> str:
    """`3.2 ms`, `1.25 s`, `2 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
