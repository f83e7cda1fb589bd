"""What a start owes to what is kept and read ahead: compiled code on the disk, weights in the page cache.

    python -m benchmarks.caches compiled|weights [--rounds 3]

`compiled`: a tiny model that vLLM compiles, by turns with what was compiled before and without. `weights`: a model of
0.9 GB, of which nothing is in the page cache, by turns without and with reading ahead; and with all of it there.
Each figure is from a request for a model that is UNLOADED to its first token, through the gateway.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.cold_start import Pool, by_name, pool, say
from benchmarks.machine import Watch, commit
from benchmarks.report import table
from benchmarks.routers import end_on_sigterm
from modelpool.messages.engine import StartPhase
from modelpool.testing.tiny_models import make_text_model

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_NOT_AHEAD = "import modelpool.worker.read_ahead as one\none.page_cache_room = lambda: 0\n"
"""Where there is no room for it, nothing is read ahead."""

Start = tuple[float, tuple[StartPhase, ...]]


def compiled(folder: Path, rounds: int) -> dict[str, list[Start]]:
    """By turns with what was compiled and without."""
    model = make_text_model(folder / "model", max_model_len=256)
    found: dict[str, list[Start]] = {"nothing kept": [], "compiled code kept": []}
    with pool(folder) as running:
        register(running, model, enforce_eager=False)
        for _ in range(rounds):
            for name, starts in found.items():
                running.sleep(3)
                if name == "nothing kept":
                    shutil.rmtree(folder / "home" / "cache")
                starts.append(start(running, name))
    return found


def weights(folder: Path, rounds: int) -> dict[str, list[Start]]:
    """By turns from the disk without and with reading ahead, and from memory."""
    model = make_text_model(folder / "model", max_model_len=256, shape=LARGE)
    os.sync()
    (folder / "sitecustomize.py").write_text(_NOT_AHEAD)
    not_ahead = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    found: dict[str, list[Start]] = {"on the disk, not read ahead": [], "on the disk, read ahead": [], "in memory": []}
    with pool(_made(folder / "not"), PYTHONPATH=not_ahead) as without, pool(_made(folder / "ahead")) as usual:
        for running in (without, usual):
            register(running, model, enforce_eager=True)
            running.sleep(3)
        for _ in range(rounds):
            for name, running in zip(found, (without, usual, usual), strict=True):
                if name != "in memory":
                    evict(model / "model.safetensors")
                found[name].append(start(running, name))
                running.sleep(3)
    return found


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def register(running: Pool, model: Path, **engine_args: Any) -> None:
    """And bring it up once."""
    running.alias = "m"
    body = {
        "alias": "m",
        "model_name": str(model),
        "gpu_memory_gb": 6,
        "engine_args": {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20, **engine_args},
    }
    running.gateway.post("/admin/models/register", json=body).raise_for_status()
    running.first_token()


def start(running: Pool, what: str) -> Start:
    seconds = running.first_token()
    say(f"{what}: {seconds:.1f} s")
    return seconds, running.phases()


def evict(path: Path) -> None:
    """From the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(found: dict[str, list[Start]], about: str) -> str:
    def row(name: str, starts: Iterable[Start]) -> list[str]:
        seconds = [each for each, _ in starts]
        phases = by_name([phases for _, phases in starts])
        slowest = sorted(phases.items(), key=lambda item: -statistics.median(item[1]))[:3]
        spent = ", ".join(f"{phase} {statistics.median(each):.2f}" for phase, each in slowest)
        return [name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}", spent]

    head = ["what", "median", "all", "most of it"]
    return "\n".join([about, "", table(head, [row(*each) for each in found.items()])])


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compiled", "weights"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; by default the temporary one")
    given = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-", dir=given.folder) as name:
        found = {"compiled": compiled, "weights": weights}[given.what](Path(name), given.rounds)
    machine = watch.machine()
    about = (
        f"{datetime.now():%Y-%m-%d %H:%M}, commit {commit()}, Python {machine.python}, {machine.cores} cores of "
        f"{machine.processor}, of which others took {machine.others:.0%} meanwhile. Seconds."
    )
    print(report(found, about))


if __name__ == "__main__":
    main()
