"""The residency ladder on real engines in a whole pool: memory, answers, times, and what clients see meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelpool.testing.tiny_models import make_mixture_model, make_text_model
from tests.e2e.ladder import Ladder, ladder, settled
from tests.e2e.pool import Json, PoolProcess, eventually
from tests.promised import promised

MB = 10**6
KV_CACHE = 128 << 20
PLACES = 4
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}


@pytest.fixture
def demo(demo_pool: PoolProcess) -> Iterator[Ladder]:
    with ladder(demo_pool, "demo") as demo:
        yield demo
        demo.wake()
    demo_pool.wait_active("demo")


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("models") / "wide", shape=WIDE)


@pytest.fixture(scope="module")
def wide(demo_pool: PoolProcess, wide_path: Path) -> Iterator[Ladder]:
    """A model whose weights and KV cache are large beside what an engine's processes need anyway.

    Its engine is sent more than it runs at once.
    """
    small = {"enforce_eager": True, "max_num_seqs": PLACES, "kv_cache_memory_bytes": KV_CACHE}
    demo_pool.register("wide", model_name=str(wide_path), engine_args=small, capacity=100, max_replicas=1)
    demo_pool.wait_active("wide")
    with ladder(demo_pool, "wide") as wide:
        yield wide
    demo_pool.remove("wide")


def test_each_level_gives_its_memory_back_and_answers_stay_the_same(
    demo_pool: PoolProcess, wide: Ladder, wide_path: Path
) -> None:
    weights = (wide_path / "model.safetensors").stat().st_size
    rows = []
    said, full = wide.says(), wide.pss()
    for levels in ((1,), (2,), (1, 2)):
        settled(demo_pool, "wide")
        for level in levels:
            change = wide.sleep(level)
            rows.append((f"to level {level}", change))
            promised = KV_CACHE + (weights if level == 2 else 0)
            assert full - change["bytes_after"] > 0.9 * promised
            assert abs(wide.pss() - change["bytes_after"]) < 20 * MB
        wide.wake()
        assert wide.says() == said
        change = eventually(lambda: _measured(wide), 5, lambda: f"measured: {wide.report()}")
        rows.append((f"awake from {levels[-1]}", change))
        # The weights are back; the KV cache's pages come as they are written.
        assert change["bytes_after"] > full - KV_CACHE - 40 * MB
    print(f"\nweights {weights / MB:.0f} MB, KV cache {KV_CACHE / MB:.0f} MB, awake and used {full / MB:.0f} MB")
    for what, change in rows:
        before, after = (change[f"bytes_{when}"] / MB for when in ("before", "after"))
        print(f"{what:13} {before:5.0f} → {after:5.0f} MB in {change['seconds']:.3f} s")


def test_a_mixture_of_experts_is_after_each_level_what_it_was(demo_pool: PoolProcess, tmp_path: Path) -> None:
    small = {"enforce_eager": True, "max_num_seqs": PLACES, "kv_cache_memory_bytes": KV_CACHE}
    demo_pool.register("experts", model_name=str(make_mixture_model(tmp_path)), engine_args=small, max_replicas=1)
    demo_pool.wait_active("experts")
    with ladder(demo_pool, "experts") as experts:
        said, process = experts.says(), experts.report()["pid"]
        for level in (1, 2):
            settled(demo_pool, "experts")
            experts.sleep(level)
            experts.wake()
            assert experts.says() == said
        assert experts.report()["pid"] == process, "and not started again"
    demo_pool.remove("experts")


def _measured(ladder_: Ladder) -> Json | None:
    """Its last wake, once its memory was measured after it."""
    change: Json = ladder_.report()["last_wake"]
    return change if change["bytes_after"] else None


def test_a_sleeper_refuses_and_the_gateway_has_it_woken(demo_pool: PoolProcess, demo: Ladder) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 1}
    address = demo.report()["address"]
    host = f"http://{address['host']}:{address['port']}/v1/completions"
    served = demo.status()["requests_total"]
    for level in (1, 2):
        settled(demo_pool, "demo")
        demo.sleep(level)
        began = time.monotonic()
        through_worker = demo.worker.post("/proxy/demo/v1/completions", json=body)
        direct = demo.worker.post(host, json=body)
        assert time.monotonic() - began < promised(1)
        assert (through_worker.status_code, direct.status_code) == (503, 503)
        codes = [answer.json()["error"]["code"] for answer in (through_worker, direct)]
        assert codes == ["instance_not_ready", "instance_draining"]
        assert _shown(demo_pool, f"SLEEP_{level}")["instances"][0]["sleep_level_value"] == level
        assert "demo" in [model["id"] for model in demo_pool.http.get("/v1/models").json()["data"]]
        assert demo_pool.http.post("/v1/completions", json=body).status_code == 200
        assert demo.report()["last_wake"]["level"] == level
    assert demo.status()["requests_total"] == served + 2


def _shown(pool: PoolProcess, state: str) -> Json:
    """The demo as the manager shows it, once that has heard of its state."""

    def shown() -> Json | None:
        view = pool.model("demo")
        return view if view["state"] == state else None

    return eventually(shown, 5, lambda: f"{state}: {pool.model('demo')}")


def test_a_hundred_requests_in_flight_when_sleep_is_asked_for_all_complete(
    demo_pool: PoolProcess, wide: Ladder
) -> None:
    """Streams that hold all its places, and what queues behind them."""

    def ask(number: int) -> str:
        """Why it ended."""
        body = {"model": "wide", "prompt": "Model"}
        stream = number < PLACES
        sizes = {"max_tokens": 150 if stream else 2, "ignore_eos": True, "stream": stream}
        answer = demo_pool.http.post("/v1/completions", json=body | sizes, timeout=200)
        assert answer.status_code == 200, answer.text
        last = answer.text.removesuffix("data: [DONE]\n\n").rpartition("data: ")[2] if stream else answer.text
        reason: str = json.loads(last)["choices"][0]["finish_reason"]
        return reason

    before = wide.report()["last_sleep"]
    with ThreadPoolExecutor(100) as clients:
        asked = [clients.submit(ask, number) for number in range(PLACES)]
        eventually(lambda: wide.status()["running"] == PLACES, 30, lambda: f"all places taken: {wide.status()}")
        asked += [clients.submit(ask, number) for number in range(PLACES, 100)]
        eventually(lambda: wide.status()["inflight_requests"] == 100, 30, lambda: f"100 in flight: {wide.status()}")
        order = wide.worker.post("/instances/wide/sleep", json={"level": 2, "drain_s": 200})
        assert order.json()["state"] == "DRAINING"
        assert wide.status()["inflight_requests"] == 100
        assert [each.result() for each in asked] == ["length"] * 100
    slept = eventually(lambda: _changed(wide, before), 10, lambda: f"asleep: {wide.report()}")
    assert (slept["level"], slept["reason"]) == (2, "")


def _changed(ladder_: Ladder, before: Json | None) -> Json | None:
    """Its last sleep, once that is another one."""
    last: Json = ladder_.report()["last_sleep"]
    return last if last != before else None


def test_a_sleeper_whose_files_vanish_says_so_and_gives_its_memory_back(demo_pool: PoolProcess, tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "there", seed=5)
    small = {"enforce_eager": True, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20}
    demo_pool.register("vanishing", model_name=str(folder), engine_args=small)
    demo_pool.wait_active("vanishing")
    body = {"model": "vanishing", "prompt": "x", "max_tokens": 1}
    with ladder(demo_pool, "vanishing") as vanishing:
        settled(demo_pool, "vanishing")
        vanishing.sleep(2)
        folder.rename(tmp_path / "gone")
        answer = demo_pool.http.post("/v1/completions", json=body, headers={"X-ModelPool-Max-Wait": "30"})
    assert answer.status_code == 503
    assert f"model_name: {folder} does not exist" in answer.text
    # The wake failed, then the start, for a reason that the next one would have too: that waits for a minute.
    instance = demo_pool.model("vanishing")["instances"][0]
    assert (instance["state"], instance["failures"], instance["permanent"]) == ("FAILED", 2, True)
    assert instance["retry_in_s"] > 30
    assert demo_pool.processes("modelpool: host vanishing") == []
    assert demo_pool.http.post("/v1/completions", json={**body, "model": "demo"}).status_code == 200
    demo_pool.remove("vanishing")


def test_it_is_back_soon(demo_pool: PoolProcess, demo: Ladder) -> None:
    """Bounds as the project promises them, on a machine that others use too; `make soak` prints the real figures."""
    demo.first_token_s()
    awake = min(demo.first_token_s() for _ in range(5))
    for level, most in ((1, 0.5), (2, 1.5)):
        times = []
        for _ in range(3):
            settled(demo_pool, "demo")
            demo.sleep(level)
            times.append(demo.first_token_s())
        print(f"\nfrom level {level} to the first token: {[round(each, 3) for each in times]} s, awake {awake:.3f} s")
        assert min(times) - awake < most
