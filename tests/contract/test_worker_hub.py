"""Fetching models, from a small hub on loopback, by the process that really does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpool.testing.hub import GOOD_TOKEN, Hub, Repository, serving_hub
from modelpool.worker import hub as worker_hub

MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": b"w" * 25_000_000,
    "pytorch_model.bin": b"x" * 300_000,
    "tokenizer.json": b"{}",
    "README.md": b"# A model",
}
# The library reads in pieces of this size; what a cut connection leaves of one is lost.
PIECE = 10 << 20
NEEDED = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub(
        {
            "org/model": Repository(MODEL),
            "org/gated": Repository(MODEL, gated=True),
            "org/cut": Repository(MODEL, cut_after=PIECE + 100_000),
            "org/held": Repository(MODEL, hold_after=PIECE + 100_000),
        }
    ) as hub:
        yield hub


class Fetcher:
    """The worker's Hub with a cache of its own, and what it told."""

    def __init__(self, hub_url: str, folder: Path, timeout_s: float = 60, **environ: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.cache = folder / "hf"
        environment = {**kept, "HF_ENDPOINT": hub_url, "HF_HOME": str(self.cache), **environ}
        self.hub = worker_hub.Hub(environ=environment, timeout_s=timeout_s, log_path=folder / "fetch.log")
        self.told: list[tuple[int, int]] = []

    def fetch(self, name: str, revision: str | None = None) -> Coroutine[Any, Any, str]:
        return self.hub.local_path(name, revision=revision, on_progress=lambda *bytes_: self.told.append(bytes_))

    def refusal(self, name: str, revision: str | None = None) -> str:
        with pytest.raises(worker_hub.FetchFailed) as failed:
            asyncio.run(self.fetch(name, revision))
        assert "\n" not in str(failed.value)
        return str(failed.value)


@pytest.fixture
def fetcher(hub: Hub, tmp_path: Path) -> Fetcher:
    return Fetcher(hub.url, tmp_path)


def test_the_needed_files_arrive_and_are_counted(hub: Hub, fetcher: Fetcher) -> None:
    path = Path(asyncio.run(fetcher.fetch("org/model")))
    assert {each.name for each in path.iterdir()} == NEEDED
    assert (path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    total = sum(len(MODEL[name]) for name in NEEDED)
    assert fetcher.told[-1] == (total, total)


def test_what_is_here_is_not_fetched_again_even_when_the_hub_is_away(hub: Hub, fetcher: Fetcher) -> None:
    path = asyncio.run(fetcher.fetch("org/model"))
    count = len(hub.downloads)
    assert asyncio.run(fetcher.fetch("org/model")) == path
    hub.status = 503
    assert asyncio.run(fetcher.fetch("org/model")) == path
    assert len(hub.downloads) == count


def test_a_connection_cut_in_the_middle_is_resumed_where_it_broke(hub: Hub, fetcher: Fetcher) -> None:
    path = Path(asyncio.run(fetcher.fetch("org/cut")))
    assert (path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert [range_ for name, range_ in hub.downloads if name == "model.safetensors"] == ["", f"bytes={PIECE}-"]


def test_two_who_want_the_same_model_share_one_fetch(hub: Hub, fetcher: Fetcher) -> None:
    async def both() -> tuple[str, str]:
        return await asyncio.gather(fetcher.fetch("org/model"), fetcher.fetch("org/model"))

    first, second = asyncio.run(both())
    assert first == second
    assert sorted(name for name, _ in hub.downloads) == sorted(NEEDED)


def test_a_fetch_tells_how_far_it_is_and_ends_with_those_who_wait_for_it(hub: Hub, fetcher: Fetcher) -> None:
    async def leave_in_the_middle() -> None:
        halfway = asyncio.Event()

        def on_progress(done: int, total: int) -> None:
            if PIECE <= done < total:
                halfway.set()

        waiting = asyncio.create_task(fetcher.hub.local_path("org/held", revision=None, on_progress=on_progress))
        await asyncio.wait({waiting, asyncio.create_task(halfway.wait())}, return_when=asyncio.FIRST_COMPLETED)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait({waiting})

    asyncio.run(leave_in_the_middle())
    assert list(fetcher.cache.rglob("*.incomplete")) == []
    hub.repositories["org/held"].released.set()
    path = Path(asyncio.run(fetcher.fetch("org/held")))
    assert (path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_a_fetch_has_a_deadline(hub: Hub, tmp_path: Path) -> None:
    refusal = Fetcher(hub.url, tmp_path, timeout_s=2).refusal("org/held")
    assert refusal.startswith("org/held was not fetched within 2 s (")


def test_a_gated_model_names_the_token_and_the_page(hub: Hub, fetcher: Fetcher, tmp_path: Path) -> None:
    refusal = fetcher.refusal("org/gated")
    assert refusal == (
        f"org/gated is gated: accept its conditions at {hub.url}/org/gated and set HF_TOKEN to a token of that account"
    )
    allowed = Fetcher(hub.url, tmp_path / "other", HF_TOKEN=GOOD_TOKEN)
    (tmp_path / "other").mkdir()
    assert Path(asyncio.run(allowed.fetch("org/gated"))).is_dir()


def test_a_wrong_token_is_said_to_be_wrong(hub: Hub, tmp_path: Path) -> None:
    refusal = Fetcher(hub.url, tmp_path, HF_TOKEN="hf_bad").refusal("org/model")
    assert refusal == f"{hub.url} refuses the HF_TOKEN that is set (401): it is wrong or has expired"


def test_a_model_that_is_not_there(hub: Hub, fetcher: Fetcher) -> None:
    assert fetcher.refusal("org/nothing") == (
        f"org/nothing was not found at {hub.url}; check the name (set HF_TOKEN if it is private)"
    )
    assert fetcher.refusal("org/model", "v9") == f"org/model has no revision 'v9' at {hub.url}"


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    refusal = Fetcher("http://127.0.0.1:1", tmp_path).refusal("org/model")
    assert refusal.startswith("http://127.0.0.1:1 cannot be reached (")
    assert "HF_ENDPOINT" in refusal


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("/no/such/folder", "model_name: /no/such/folder does not exist"),
        ("./nothing", "model_name: ./nothing does not exist"),
        ("a/b/c", "model_name: a/b/c is neither a folder on this machine nor a name on a hub"),
        ("/etc/hostname", "model_name: /etc/hostname is a file, not the folder of a model"),
    ],
)
def test_a_path_is_never_looked_for_on_a_hub(fetcher: Fetcher, name: str, refusal: str) -> None:
    assert fetcher.refusal(name) == refusal
    assert fetcher.told == []


def test_a_folder_here_is_taken_as_it_is(fetcher: Fetcher, tmp_path: Path) -> None:
    assert asyncio.run(fetcher.fetch(str(tmp_path))) == str(tmp_path)
