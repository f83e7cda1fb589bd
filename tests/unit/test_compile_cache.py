"""What engines compiled is kept below the home, within a bound."""

from __future__ import annotations

import os
from pathlib import Path

from modelpool.worker.compile_cache import cache_environment, prune


def compiled(cache: Path, entry: str, *, size: int, used_at: float) -> Path:
    """A folder with a file in it."""
    folder = cache / entry
    folder.mkdir(parents=True)
    (folder / "artifact").write_bytes(bytes(size))
    os.utime(folder / "artifact", (used_at, used_at))
    return folder


def test_what_was_not_used_for_longest_goes_first_and_whole(tmp_path: Path) -> None:
    old = compiled(tmp_path, "inductor/ab", size=1 << 20, used_at=1)
    ahead = compiled(tmp_path, "vllm/torch_compile_cache/torch_aot_compile/1f", size=1 << 20, used_at=2)
    newer = compiled(tmp_path, "vllm/torch_compile_cache/2e", size=1 << 20, used_at=3)
    newest = compiled(tmp_path, "triton/3d", size=1 << 20, used_at=4)
    small = compiled(tmp_path, "vllm/modelinfos", size=1 << 20, used_at=0)
    assert prune(tmp_path, 5 << 20) == 0
    assert prune(tmp_path, (2 << 20) + 50_000) == 2 << 20
    assert [each.exists() for each in (old, ahead, newer, newest, small)] == [False, False, True, True, True]
    assert prune(tmp_path, 0) == 2 << 20
    assert not newest.exists()


def test_nothing_is_removed_where_nothing_is(tmp_path: Path) -> None:
    assert prune(tmp_path / "cache", 0) == 0


def test_a_place_that_a_user_chose_stays(tmp_path: Path) -> None:
    environment = cache_environment(tmp_path, {"TRITON_CACHE_DIR": "/fast/triton", "VLLM_CACHE_ROOT": ""})
    assert environment["TRITON_CACHE_DIR"] == "/fast/triton"
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
