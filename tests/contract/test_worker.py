"""A worker with the fake engine: orders, reports, status, logs, proxy."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.contract.test_openapi import lead_somewhere
from tests.contract.worker_process import WorkerProcess, complete, eventually, running_worker
from tests.promised import promised

PORTS = (29800, 29899)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    limits = {"MODELPOOL_STALL_TIMEOUT": "2", "MODELPOOL_DRAIN_TIMEOUT": "3"}
    home = tmp_path_factory.mktemp("worker")
    with running_worker(home, WORKER_PORT_RANGE=f"{PORTS[0]}-{PORTS[1]}", **limits) as worker:
        yield worker


@pytest.fixture(autouse=True)
def nothing_runs_afterwards(worker: WorkerProcess) -> Iterator[None]:
    yield
    for instance in worker.instances():
        worker.stop(instance)


def code(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


# ------------------------------------------------------------ who may ask, and what for


def test_all_but_health_wants_the_cluster_token(worker: WorkerProcess) -> None:
    assert httpx.get(f"{worker.url}/health").json() == {"status": "ok"}
    for path in ("/info", "/instances", "/watch", "/instances/x/status", "/proxy/x/v1/models", "/nothing", "/docs"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert code(httpx.get(worker.url + path, headers=headers)) == (401, "invalid_api_key")
    assert code(httpx.post(f"{worker.url}/instances/start", json={})) == (401, "invalid_api_key")


def test_it_describes_itself(worker: WorkerProcess) -> None:
    info = worker.http.get("/info").json()
    assert info["info"]["worker_id"] == "w"
    assert info["info"]["url"] == worker.url
    assert info["info"]["direct"] is True
    assert [(each["index"], each["kind"], each["total_bytes"]) for each in info["devices"]] == [
        (index, "cuda", 80 * 10**9) for index in range(4)
    ]
    assert info["engines"]["fake"]["state"] == "ready"
    assert info["engines"]["vllm"]["state"] == "missing"
    assert "pip install" in info["engines"]["vllm"]["reason"]


def test_its_openapi_document_is_whole(worker: WorkerProcess) -> None:
    document = worker.http.get("/openapi.json").json()
    assert {"/instances/start", "/instances/{instance}/sleep", "/info"} <= set(document["paths"])
    assert "#/components/schemas/ModelSpec" in lead_somewhere(document)


def test_every_refusal_has_our_envelope(worker: WorkerProcess) -> None:
    http = worker.http
    assert code(http.get("/nothing")) == (404, "route_not_found")
    assert code(http.post("/info")) == (405, "method_not_allowed")
    assert code(http.get("/instances/none/logs?tail=x")) == (422, "invalid_body")
    assert code(http.post("/instances/start", content=b"{")) == (400, "invalid_json")
    assert code(http.post("/instances/start", json={"model": {"alias": "m", "fake": True}, "nix": 1}))[0] == 422
    assert code(worker.order("m", fake_capacity=0)) == (422, "invalid_body")
    assert code(http.post("/instances/start", content=b" " * (5 << 20))) == (413, "body_too_large")
    for method, path in (
        ("GET", "/instances/none"),
        ("GET", "/instances/none/status"),
        ("GET", "/instances/none/logs"),
        ("POST", "/instances/none/stop"),
        ("POST", "/proxy/none/v1/completions"),
    ):
        assert code(http.request(method, path)) == (404, "instance_not_found"), path


# ------------------------------------------------------------ orders


def test_a_start_is_idempotent_and_a_stop_gives_everything_back(worker: WorkerProcess) -> None:
    first = worker.order("m")
    assert (first.status_code, first.json()["state"]) == (200, "STARTING")
    running = worker.wait("m", "ACTIVE")
    assert PORTS[0] <= running["address"]["port"] <= PORTS[1]
    again = worker.order("m")
    assert (again.status_code, again.json()) == (200, running)
    assert worker.order("m", pinned=True, idle_sleep_1_s=3).json() == running  # the controller's matter, not its own
    assert code(worker.order("m", fake_capacity=3)) == (409, "instance_taken")
    assert worker.stop("m")["state"] == "DRAINING"
    assert not Path(f"/proc/{running['pid']}").exists()
    assert worker.start("m", fake_capacity=3)["capacity"] == 3


def test_a_stop_waits_for_requests_in_flight_and_takes_no_new_ones(worker: WorkerProcess) -> None:
    worker.start("m")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(complete, worker.http, "/proxy/m/v1/completions", "m", max_tokens=1, stream=False)
        slow.result()
        held = pool.submit(
            worker.http.post,
            "/proxy/m/v1/completions",
            json={"model": "m", "prompt": "x"},
            headers={"X-Fake-Delay-Ms": "800"},
        )
        eventually(lambda: worker.status("m")["inflight_requests"] == 1)
        assert worker.http.post("/instances/m/stop").json()["state"] == "DRAINING"
        assert worker.http.post("/instances/m/stop").json()["state"] == "DRAINING"
        assert code(worker.order("m")) == (409, "instance_stopping")
        eventually(lambda: code(complete(worker.http, "/proxy/m/v1/completions", "m"))[0] == 503)
        assert held.result().status_code == 200
    eventually(lambda: worker.http.get("/instances/m").status_code == 404)


def test_a_drain_has_a_deadline(worker: WorkerProcess) -> None:
    worker.start("m", fake_stall_after_tokens=1)
    with worker.http.stream("POST", "/proxy/m/v1/completions", json={"model": "m", "prompt": "x", "stream": True}):
        began = time.monotonic()
        worker.stop("m")
        assert 2.5 < time.monotonic() - began < 8


def test_a_start_can_be_stopped_before_it_is_ready(worker: WorkerProcess) -> None:
    worker.order("m", fake_load_ms=60_000)
    pid = eventually(lambda: worker.report("m")["pid"])
    assert worker.stop("m")["state"] == "STARTING"
    assert not Path(f"/proc/{pid}").exists()


def test_replicas_and_names_with_slashes_are_instances_like_others(worker: WorkerProcess) -> None:
    worker.start("org/m")
    worker.start("org/m", instance="org/m-r2")
    worker.start("org/status")
    worker.start("org")
    assert worker.instances() == {"org", "org/m", "org/m-r2", "org/status"}
    assert worker.status("org/m-r2")["alias"] == "org/m"
    assert worker.status("org")["instance"] == "org"
    assert worker.status("org/status")["instance"] == "org/status"
    for instance, model in (("org", "org"), ("org/m", "org/m"), ("org/m-r2", "org/m"), ("org/status", "org/status")):
        answer = complete(worker.http, f"/proxy/{instance}/v1/completions", model)
        assert answer.status_code == 200, instance
        assert answer.json()["model"] == model


def test_memory_is_promised_for_as_long_as_an_instance_is_there(worker: WorkerProcess) -> None:
    def free() -> list[int]:
        return [each["free_bytes"] // 10**9 for each in worker.http.get("/info").json()["devices"]]

    order = {"model": {"alias": "m", "fake": True, "gpu_memory_gb": 30}, "devices": [1, 2]}
    worker.http.post("/instances/start", json=order)
    worker.wait("m", "ACTIVE")
    assert free() == [80, 50, 50, 80]
    gpu = worker.status("m")["gpu_info"]
    assert (gpu["available_memory_gb"], gpu["total_memory_gb"], gpu["devices"]) == (100, 160, [1, 2])
    worker.stop("m")
    assert free() == [80, 80, 80, 80]
    for refused in ({"devices": [4]}, {"model": {"alias": "m", "fake": True, "tensor_parallel_size": 5}}):
        assert code(worker.http.post("/instances/start", json={**order, "devices": [], **refused})) == (
            422,
            "invalid_body",
        )


# ------------------------------------------------------------ what goes wrong with a start


def test_a_load_error_is_told_as_it_is(worker: WorkerProcess) -> None:
    worker.order("m", fake_load_error="The weights are made of cheese.")
    assert worker.wait("m", "FAILED")["reason"] == "The weights are made of cheese."
    assert worker.status("m")["sleep_level_value"] == 3
    assert code(complete(worker.http, "/proxy/m/v1/completions", "m")) == (503, "instance_not_ready")
    assert worker.start("m")["state"] == "ACTIVE"


def test_a_start_that_met_a_taken_port_is_tried_once_more(worker: WorkerProcess) -> None:
    worker.order("m", fake_load_error="[Errno 98] Address already in use")
    assert worker.wait("m", "FAILED")["reason"] == "[Errno 98] Address already in use"
    log = worker.http.get("/instances/m/logs").text
    assert log.count("not loaded: [Errno 98]") == 2


def test_a_start_has_a_deadline(tmp_path: Path) -> None:
    with running_worker(tmp_path, MODELPOOL_START_TIMEOUT="1") as worker:
        worker.order("m", fake_load_ms=60_000)
        assert worker.wait("m", "FAILED", within=30)["reason"].startswith("not ready after 1 s (in phase ")
        assert worker.below("modelpool: host") == []


def test_a_failed_instance_is_removed_at_once(worker: WorkerProcess) -> None:
    worker.order("m", fake_load_error="no")
    worker.wait("m", "FAILED")
    assert worker.stop("m")["state"] == "ABSENT"


def test_a_model_that_is_not_there_is_said_to_be_missing_before_the_engine_is(worker: WorkerProcess) -> None:
    worker.order("m", fake=False, model_name="/no/such/model")
    assert worker.wait("m", "FAILED")["reason"] == "model_name: /no/such/model does not exist"
    worker.order("n", fake=False, model_name="/tmp")
    assert "vLLM is not installed" in worker.wait("n", "FAILED")["reason"]


# ------------------------------------------------------------ hosts that die


def test_a_killed_host_is_seen_and_others_go_on(worker: WorkerProcess) -> None:
    pid = worker.start("m")["pid"]
    other = worker.start("other")
    os.kill(pid, signal.SIGKILL)
    assert worker.wait("m", "FAILED", within=5)["reason"] == "killed by signal 9 (SIGKILL)"
    assert worker.report("other") == other
    assert complete(worker.http, "/proxy/other/v1/completions", "other").status_code == 200
    assert worker.start("m")["pid"] != pid


def test_a_host_stopped_and_then_killed_is_seen_too(worker: WorkerProcess) -> None:
    pid = worker.start("m")["pid"]
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert worker.wait("m", "FAILED", within=5)["reason"] == "killed by signal 9 (SIGKILL)"


def test_a_host_that_stands_still_is_ended(worker: WorkerProcess) -> None:
    pid = worker.start("m")["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert worker.status("m")["state"] == "ACTIVE"
    assert worker.wait("m", "FAILED")["reason"].startswith("stalled: it has not answered a probe for ")
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_a_crash_in_the_middle_of_an_answer_breaks_the_stream(worker: WorkerProcess) -> None:
    worker.start("m", fake_crash_after_tokens=2)
    body = {"model": "m", "prompt": "one two three four five", "stream": True}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        worker.http.stream("POST", "/proxy/m/v1/completions", json=body) as answer,
    ):
        answer.read()
    assert worker.wait("m", "FAILED", within=5)["reason"] == "killed by signal 9 (SIGKILL)"


# ------------------------------------------------------------ figures


def test_the_status_counts_and_times_real_requests(worker: WorkerProcess) -> None:
    worker.start("m", fake_delay_ms=500, fake_capacity=1)
    before = worker.status("m")
    assert (before["inflight_requests"], before["capacity"], before["ttft_last"]) == (0, 1, None)
    began = time.monotonic()

    def one() -> float:
        assert complete(worker.http, "/proxy/m/v1/completions", "m").status_code == 200
        return time.monotonic() - began

    with ThreadPoolExecutor(3) as pool:
        requests = [pool.submit(one) for _ in range(3)]
        busy = eventually(lambda: (now := worker.status("m"))["inflight_requests"] == 3 and now)
        assert (busy["running"], busy["waiting"]) == (1, 2)
        took = sorted(each.result() for each in requests)
    # One after the other: never sooner, and later only as far as a busy machine makes it.
    assert all(0.49 * turn < seconds < 0.5 * turn + 5 for turn, seconds in enumerate(took, start=1)), took
    # The client may have the last byte before the host has counted it.
    after = eventually(lambda: (now := worker.status("m"))["inflight_requests"] == 0 and now)
    assert after["requests_total"] == 3
    assert after["e2e_last"] == pytest.approx(took[-1], abs=3)
    assert after["e2e_avg"] == pytest.approx(sum(took) / 3, abs=3)
    assert after["ttft_last"] <= after["e2e_last"]
    assert after["memory_bytes"] > 1_000_000


# ------------------------------------------------------------ logs


def test_the_log_is_there_after_the_host_is_dead_and_can_be_followed(worker: WorkerProcess) -> None:
    worker.start("org/logged")
    assert "serving on port" in worker.http.get("/instances/org/logged/logs").text
    assert worker.http.get("/instances/org/logged/logs?tail=1").text.count("\n") == 1
    assert worker.http.get("/instances/org/logged/logs?tail=0").text == ""
    worker.stop("org/logged")
    assert "serving on port" in worker.http.get("/instances/org/logged/logs").text
    with worker.http.stream("GET", "/instances/org/logged/logs?tail=0&follow=1") as log:
        pieces = log.iter_text()
        worker.start("org/logged")
        seen = ""
        while "serving on port" not in seen:
            seen += next(pieces)


# ------------------------------------------------------------ the proxy


def test_the_proxy_hands_on_chunk_by_chunk(worker: WorkerProcess) -> None:
    worker.start("m")
    body = {"model": "m", "prompt": "x", "stream": True}
    headers = {"X-Fake-Token-Ms": "100", "X-Fake-Tokens": "5"}
    with worker.http.stream("POST", "/proxy/m/v1/completions?a=b", json=body, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        arrived = [(time.monotonic(), chunk) for chunk in answer.iter_raw()]
    moments = [moment for moment, chunk in arrived if b'"text"' in chunk]
    assert len(moments) >= 5
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert min(gaps[:4]) > 0.05
    assert arrived[-1][1].endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves_is_noticed_by_the_engine_within_a_second(worker: WorkerProcess) -> None:
    worker.start("m", fake_stall_after_tokens=1)
    with worker.http.stream("POST", "/proxy/m/v1/completions", json={"model": "m", "prompt": "x", "stream": True}):
        eventually(lambda: worker.status("m")["inflight_requests"] == 1)
    eventually(lambda: worker.status("m")["inflight_requests"] == 0, within=1)


def test_the_proxy_is_for_inference_only(worker: WorkerProcess) -> None:
    worker.start("m")
    assert code(worker.http.post("/proxy/m/sleep")) == (404, "route_not_found")
    assert code(worker.http.post("/proxy/m/v1/load_lora_adapter", json={})) == (404, "route_not_found")
    assert code(worker.http.get("/proxy/m/v1/completions")) == (405, "method_not_allowed")
    assert worker.http.get("/proxy/m/v1/models").json()["data"][0]["id"] == "m"
    tokens = worker.http.post("/proxy/m/tokenize", json={"model": "m", "prompt": "one two"}).json()
    assert tokens["count"] == len(tokens["tokens"])


def test_the_proxy_passes_websockets_both_ways_and_their_ends(worker: WorkerProcess) -> None:
    worker.start("m")
    headers = {"Authorization": worker.http.headers["authorization"]}
    url = worker.url.replace("http", "ws") + "/proxy/m/v1/realtime?a=b"
    with connect(url, additional_headers=headers) as client:
        assert json.loads(client.recv())["type"] == "session.created"
        client.send(json.dumps({"type": "session.update", "model": "m"}))
        client.send(json.dumps({"type": "input_audio_buffer.commit"}))
        client.send(json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"}))
        client.send(json.dumps({"type": "input_audio_buffer.commit", "final": True}))
        while (event := json.loads(client.recv()))["type"] == "transcription.delta":
            pass
        assert event["text"] == "You sent 3 bytes of sound."
        assert worker.status("m")["inflight_requests"] == 1
    eventually(lambda: worker.status("m")["inflight_requests"] == 0, within=1)
    client = connect(url, additional_headers=headers)
    client.socket.close()  # without a word
    eventually(lambda: worker.status("m")["inflight_requests"] == 0, within=1)
    with connect(url, additional_headers=headers) as client:
        os.kill(worker.report("m")["pid"], signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            list(iter(client.recv, None))
        assert client.close_code == 1011


def test_the_proxys_websockets_are_for_those_who_may(worker: WorkerProcess) -> None:
    worker.start("m")
    headers = {"Authorization": worker.http.headers["authorization"]}
    for path, sent, status in [
        ("/proxy/m/v1/realtime", {}, 401),
        ("/proxy/none/v1/realtime", headers, 404),
        ("/proxy/m/v1/other", headers, 404),
        ("/instances", headers, 403),
    ]:
        with pytest.raises(InvalidStatus) as refused:
            connect(worker.url.replace("http", "ws") + path, additional_headers=sent)
        assert refused.value.response.status_code == status


# ------------------------------------------------------------ being there


def test_the_watch_stays_open(worker: WorkerProcess) -> None:
    with worker.http.stream("GET", "/watch") as watch:
        assert next(watch.iter_raw()) == b"\n"


def test_health_answers_while_engines_start_and_end(worker: WorkerProcess) -> None:
    ending = threading.Event()

    def churn() -> None:
        while not ending.is_set():
            worker.start("m", fake_load_ms=100)
            worker.stop("m")

    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=5) as probe:
        churning = pool.submit(churn)
        took = []
        for _ in range(100):
            began = time.monotonic()
            assert probe.get(f"{worker.url}/health").status_code == 200
            took.append(time.monotonic() - began)
        ending.set()
        churning.result()
    took.sort()
    assert took[50] < promised(0.05)
    assert took[-1] < promised(0.5)
