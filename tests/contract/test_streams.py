"""Many streams at once, for a moment; tests/soak/test_streams.py has the whole of it."""

from __future__ import annotations

from benchmarks import streams


def test_many_streams_are_whole_take_little_memory_and_delay_nobody() -> None:
    outcome = streams.run(streams=300, seconds=2)
    print(f"\n{outcome.text()}")
    assert (outcome.complete, outcome.wrong) == (300, 0)
    assert outcome.stream_bytes < 40e3
    assert outcome.others.p99_us < 500e3
