"""Parts of a start are timed in processes that are forked meanwhile, and only there."""

from __future__ import annotations

import os

from modelpool.engines.vllm.start_parts import StartParts, slowest
from modelpool.messages.engine import StartPhase


class Worker:
    def load_model(self) -> str:
        return "loaded"

    def determine_available_memory(self) -> int:
        return 1

    def initialize_from_config(self) -> None:
        pass


class Rank(Worker):
    def compile_or_warm_up_model(self) -> None:
        pass


def test_of_workers_side_by_side_the_slowest_counts_and_parts_of_one_name_add_up() -> None:
    lines = b"kv_cache 1 0.5\nkv_cache 2 0.25\nkv_cache 1 1.0\nkv_cache 2 2.0\nweights 2 3.0\n"
    assert slowest(lines) == (StartPhase("weights", 3.0), StartPhase("kv_cache", 2.25))
    assert slowest(b"") == ()


def test_forked_workers_are_timed_and_the_class_is_as_before_afterwards() -> None:
    before = dict(vars(Rank))
    parts = StartParts()
    with parts.timed(Rank):
        pid = os.fork()
        if pid == 0:
            rank = Rank()
            right = rank.load_model() == "loaded" and rank.determine_available_memory() == 1
            rank.compile_or_warm_up_model()
            os._exit(0 if right else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert dict(vars(Rank)) == before
    found = parts.parts()
    assert [part.name for part in found] == ["weights", "kv_cache", "warm_up"]
    assert all(0 <= part.seconds < 1 for part in found)
