"""As many streams at once as 20,000 descriptors allow, for a minute."""

from __future__ import annotations

import resource

import pytest
from benchmarks import streams

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

STREAMS = 9000


def test_nine_thousand_streams_are_whole_take_little_memory_and_delay_nobody() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * STREAMS + 1000:
        pytest.skip("the hard limit of descriptors is too low")
    outcome = streams.run(streams=STREAMS, seconds=60)
    print(f"\n{outcome.text()}")
    assert (outcome.complete, outcome.wrong) == (STREAMS, 0)
    assert outcome.all_open_s >= 60
    assert outcome.stream_bytes < 40e3
    assert outcome.others.p99_us < 500e3
