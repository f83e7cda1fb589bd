"""What is kept of recent requests, and what is told of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpool.gateway.observe.explain import explain, seconds
from modelpool.gateway.observe.journey import Journey, Journeys, Record
from modelpool.gateway.observe.recent import RECORDS, Recent
from modelpool.gateway.shared import joined
from modelpool.messages.explain import Explanation, Outcome, Role

NAMES = ("m", "m-r2", "m-r3", "m-r4")
CHOSEN = Record(
    b"id",
    b"/v1/completions",
    100.0,
    10,
    alias="m",
    reason="least_loaded",
    instance="m-r2",
    names=NAMES,
    capacities=(4, 4, 4, 4),
    loads=[3, 1, 2, 0],
    avoided=("m-r4",),
)


def told(record: Record, *, alive: bool = True) -> Explanation:
    return explain(record, slot=0, alive=alive, now=110.0, wall=1000.0)


def changed(**fields: object) -> Record:
    record = Record(**{name: getattr(CHOSEN, name) for name in Record.__struct_fields__})
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def test_the_runner_up_is_who_would_have_been_chosen_otherwise() -> None:
    explanation = told(CHOSEN)
    roles = {each.instance: each.role for each in explanation.considered}
    assert roles == {"m": None, "m-r2": Role.CHOSEN, "m-r3": Role.RUNNER_UP, "m-r4": Role.AVOIDED}
    assert (explanation.runner_up, explanation.accepted_at) == ("m-r3", 990.0)
    assert "It went to m-r2 (1 of 4 in flight), the least loaded; runner-up m-r3 (2 of 4 in flight)." in (
        explanation.words
    )
    assert "Left alone, since they kept failing: m-r4." in explanation.words


def test_who_did_not_take_it_is_no_runner_up() -> None:
    explanation = told(changed(tries=(("m-r3", "instance_draining"),)))
    assert explanation.runner_up == "m"
    assert "m-r3 did not take it: instance_draining." in explanation.words


@pytest.mark.parametrize(
    ("record", "alive", "outcome", "says"),
    [
        (CHOSEN, True, Outcome.RUNNING, "runs still"),
        (CHOSEN, False, Outcome.LOST, "process that served it ended"),
        (changed(ended=101.0, status=200, first_byte=100.5, segments=2, bytes_out=9), True, Outcome.ANSWERED, "200"),
        (changed(ended=101.0, status=502, code="upstream_failed"), True, Outcome.FAILED, "status 502: upstream_failed"),
        (changed(ended=101.0, status=499, left=True), True, Outcome.CLIENT_LEFT, "before there was an answer"),
        (
            changed(ended=101.0, status=200, code="upstream_failed", first_byte=100.5, segments=1),
            True,
            Outcome.FAILED,
            "in the middle of the answer",
        ),
    ],
)
def test_the_end_is_told(record: Record, alive: bool, outcome: Outcome, says: str) -> None:
    explanation = told(record, alive=alive)
    assert explanation.outcome is outcome
    assert says in explanation.words[-1]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0021, "2.1 ms"), (3.456, "3.46 s"), (125, "2 min 5 s"), (7300, "2 h 1 min")]
)
def test_times_are_told_for_people(value: float, text: str) -> None:
    assert seconds(value) == text


def journey(record: Record) -> Journey:
    return Journey(Journeys(), record)


def test_the_oldest_make_room_and_how_far_it_goes_back_is_known(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        recent = Recent(node)
        assert (recent.find(b"request-0"), recent.since()) == (None, None)
        for number in range(RECORDS + 10):
            recent.ended(journey(Record(b"request-%d" % number, b"/", 50.0 + number, 0)))
        assert recent.find(b"request-9") is None
        for number in (10, 11, RECORDS, RECORDS + 9):
            found = recent.find(b"request-%d" % number)
            assert found is not None
            assert found.record.accepted == 50.0 + number
        assert recent.since() == 60.0


def test_a_running_request_is_found_and_its_end_replaces_it_or_is_kept_anew(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        recent = Recent(node)
        one = journey(changed())
        recent.chosen(one)
        found = recent.find(b"id")
        assert found is not None
        assert (found.record.instance, found.record.ended) == ("m-r2", 0)
        for number in range(RECORDS):
            recent.ended(journey(Record(b"other-%d" % number, b"/", 200.0, 0)))
        assert recent.find(b"id") is None
        one.record.ended = 300.0
        recent.ended(one)
        found = recent.find(b"id")
        assert found is not None
        assert found.record.ended == 300.0


@pytest.mark.parametrize("count", [1, 40, 400])
@pytest.mark.parametrize("length", [1, 128])
def test_a_record_that_is_too_long_keeps_what_matters(tmp_path: Path, count: int, length: int) -> None:
    names = tuple(f"{'m' * length}-r{number}" for number in range(count))
    record = changed(
        id=b"i" * 128,
        alias="ü" * length,
        path=b"/" * length,
        caller="c" * length,
        names=names,
        capacities=(8,) * count,
        loads=list(range(count)),
        instance=names[-1],
    )
    with joined(tmp_path) as node:
        recent = Recent(node)
        recent.ended(journey(record))
        found = recent.find(b"i" * 128)
        assert found is not None
        kept = found.record
        assert record.instance.startswith(kept.instance)
        assert len(kept.names) == len(kept.loads) == len(kept.capacities)
        if length == 1:
            assert kept.instance == record.instance in kept.names
            assert kept.names[1:] == names[: min(5, count - 1)] or count == 1


def test_an_id_that_stands_in_another_request_is_not_that_request(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        recent = Recent(node)
        recent.ended(journey(Record(b"one", b"/two", 1.0, 0)))
        recent.ended(journey(Record(b"two-2", b"/", 2.0, 0)))
        assert recent.find(b"two") is None
        recent.ended(journey(Record(b"two", b"/", 3.0, 0)))
        recent.ended(journey(Record(b"two", b"/", 4.0, 0)))
        found = recent.find(b"two")
        assert found is not None
        assert found.record.accepted == 4.0


def test_a_half_written_record_is_passed_over(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        recent = Recent(node)
        recent.ended(journey(Record(b"whole", b"/", 1.0, 0)))
        recent.ended(journey(Record(b"half", b"/", 2.0, 0)))
        file = next(tmp_path.glob("recent-4*"))
        raw = file.read_bytes()[:1024]
        with file.open("r+b") as memory:
            memory.seek(512)
            memory.write(raw[512:560].replace(b"\xcb", b"\xc1"))
        assert recent.find(b"half") is None
        assert recent.find(b"whole") is not None
