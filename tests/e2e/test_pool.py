"""What a user of a pool does, on fake engines: register, ask, look, remove; and what they are told when it is wrong."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from tests.e2e.pool import PoolProcess, another_worker, end, eventually, running_pool, start_up

ASK = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("sent", [1, 3], ids=["wait in the gateway", "wait in the engine"])
def test_three_requests_to_a_capacity_of_one_take_one_two_and_three_times_as_long(
    fake_pool: PoolProcess, sent: int
) -> None:
    """By its `capacity` an engine may be sent more than it runs at once."""
    alias = f"slow-{sent}"
    fake_pool.register(alias, fake=True, fake_delay_ms=1000, fake_capacity=1, capacity=sent, max_replicas=1)
    fake_pool.wait_active(alias)

    def ask(_: int) -> float:
        begin = time.monotonic()
        assert fake_pool.http.post("/v1/chat/completions", json={"model": alias, **ASK}).status_code == 200
        return time.monotonic() - begin

    with ThreadPoolExecutor(3) as threads, fake_pool.worker_http() as worker:
        asked = threads.map(ask, range(3))

        def load() -> tuple[int, ...]:
            status = worker.get(f"/instances/{alias}/status").json()
            return tuple(status[what] for what in ("inflight_requests", "capacity", "running", "waiting"))

        eventually(lambda: load() == (sent, 1, 1, sent - 1), 1, lambda: str(load()))
        took = sorted(asked)
        # One after the other: never sooner, and later only as far as a busy machine makes it.
        assert all(0.99 * turn < seconds < turn + 5 for turn, seconds in enumerate(took, start=1)), took
        # The client has its last byte a moment before the host has counted it.
        after = eventually(
            lambda: (status := worker.get(f"/instances/{alias}/status").json())["inflight_requests"] == 0 and status,
            1,
            lambda: "none in flight",
        )
    assert after["e2e_last"] == pytest.approx(took[-1] if sent > 1 else 1, abs=2)
    assert after["e2e_avg"] <= sum(took) / 3
    assert after["sleep_level_value"] == 0
    assert after["gpu_info"]["available_memory_gb"] > 0


def test_sound_is_transcribed_over_a_websocket(fake_pool: PoolProcess) -> None:
    fake_pool.register("ears", fake=True)
    fake_pool.wait_active("ears")
    url = fake_pool.url.replace("http", "ws") + "/v1/realtime"
    with connect(url, additional_headers={"Authorization": fake_pool.http.headers["authorization"]}) as client:
        assert json.loads(client.recv())["type"] == "session.created"
        for event in (
            {"type": "session.update", "model": "ears"},
            {"type": "input_audio_buffer.commit"},
            {"type": "input_audio_buffer.append", "audio": "AAAA"},
            {"type": "input_audio_buffer.commit", "final": True},
        ):
            client.send(json.dumps(event))
        said = [json.loads(client.recv()) for _ in range(2)]
        assert said[0]["type"] == "transcription.delta"


def test_a_client_that_leaves_frees_its_slot_within_a_second(fake_pool: PoolProcess) -> None:
    fake_pool.register("left", fake=True, fake_delay_ms=30_000, fake_capacity=1)
    fake_pool.wait_active("left")
    with fake_pool.worker_http() as worker:

        def inflight() -> int:
            count: int = worker.get("/instances/left/status").json()["inflight_requests"]
            return count

        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                fake_pool.http.post(
                    "/v1/chat/completions", json={"model": "left", "stream": stream, **ASK}, timeout=0.5
                )
            eventually(lambda: inflight() == 0, 1, lambda: f"{inflight()} in flight")


def test_both_register_paths_do_the_same(fake_pool: PoolProcess) -> None:
    body = {"alias": "twice", "fake": True}
    for path in ("/admin/models/register", "/v1/models/register", "/models/register"):
        answer = fake_pool.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "success"
    other = fake_pool.http.post("/v1/models/register", json={**body, "fake_capacity": 2})
    assert other.status_code == 409
    assert "fake_capacity" in other.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1", ""])
def test_the_sdk_works_with_and_without_v1(fake_pool: PoolProcess, path: str) -> None:
    fake_pool.register("sdk", fake=True, fake_response="one two three")
    fake_pool.wait_active("sdk")
    client = fake_pool.sdk(path)
    answer = client.chat.completions.create(model="sdk", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "one two three"
    stream = client.chat.completions.create(model="sdk", messages=[{"role": "user", "content": "hi"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "one two three"
    assert client.models.retrieve("sdk").id == "sdk"
    assert "sdk" in [model.id for model in client.models.list()]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("POST", "/v1/chat/completions", b'{"model": "echx"}', 404, "model_not_found", "model"),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400, None, "model"),
        ("POST", "/v1/chat/completions", b'{"model": 3}', 400, None, "model"),
        ("POST", "/v1/chat/completions", b'{"model": ', 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[]", 400, None, None),
        ("POST", "/v1/chat/completions", b"", 400, None, None),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", None),
        ("POST", "/v1/nothing", b"{}", 404, "route_not_found", None),
        ("POST", "/v1/load_lora_adapter", b"{}", 404, "route_not_found", None),
        ("GET", "/v1/models/echx", None, 404, "model_not_found", "model"),
        ("POST", "/admin/models/register", b'{"alias": "a", "fake": true, "fak": 1}', 422, "unknown_field", "fak"),
        ("POST", "/admin/models/register", b'{"alias": "a"}', 422, "invalid_body", "model_name"),
        ("POST", "/admin/models/register", b"{", 400, "invalid_json", None),
        ("PUT", "/admin/models/register", b"{}", 405, "method_not_allowed", None),
        ("DELETE", "/admin/models/echx", None, 404, "model_not_found", "model"),
        ("GET", "/admin/models/echx/logs?tail=x", None, 422, None, "tail"),
        ("GET", "/admin/nothing", None, 404, "route_not_found", None),
    ],
)
def test_what_is_wrong_is_said_in_the_openai_envelope(
    fake_pool: PoolProcess,
    method: str,
    path: str,
    body: bytes | None,
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    fake_pool.register("echo", fake=True)
    eventually(lambda: fake_pool.http.get("/v1/models/echo").is_success, 5, lambda: "the gateway knows it")
    answer = fake_pool.http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert code is None or error["code"] == code
    if "echx" in (path + str(body)) and "logs" not in path:
        assert "`echo`" in error["message"]


def test_a_model_that_is_starting_says_so_with_retry_after(fake_pool: PoolProcess) -> None:
    fake_pool.register("late", fake=True, fake_load_ms=5000)
    eventually(lambda: fake_pool.model("late")["state"] == "STARTING", 5, lambda: "starting")
    eventually(lambda: fake_pool.http.get("/v1/models/late").is_success, 2, lambda: "the gateway knows it")
    answer = fake_pool.http.post(
        "/v1/completions", json={"model": "late", "prompt": "x"}, headers={"X-ModelPool-Max-Wait": "0"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    answer = fake_pool.http.post("/v1/completions", json={"model": "late", "prompt": "x"})
    assert answer.status_code == 200
    assert "late" in [each["id"] for each in fake_pool.http.get("/v1/models").json()["data"]]
    fake_pool.wait_active("late", within=20)


def test_no_worker_and_no_room_are_said_with_the_numbers(fake_pool: PoolProcess) -> None:
    fake_pool.register("huge", fake=True, gpu_memory_gb=100_000)

    def refused() -> httpx.Response | None:
        answer = fake_pool.http.post("/v1/completions", json={"model": "huge", "prompt": "x"})
        return answer if answer.status_code == 503 else None

    answer = eventually(refused, 5, lambda: "503")
    error = answer.json()["error"]
    assert error["code"] == "no_available_worker"
    assert "needs 100000.0 GB on device 0" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1


def test_a_model_runs_on_two_workers_and_both_get_requests(mending_pool: PoolProcess, tmp_path: Path) -> None:
    pool = mending_pool
    with another_worker(pool, tmp_path / "home2", "w2") as second:
        pool.register("both", fake=True, min_replicas=2)
        view = pool.wait_active("both", replicas=2)
        assert {each["worker_id"] for each in view["instances"]} == {"w1", "w2"}
        for _ in range(20):
            assert pool.http.post("/v1/completions", json={"model": "both", "prompt": "x"}).status_code == 200
        served = {}
        for instance in view["instances"]:
            with pool.worker_http(instance["worker_id"]) as worker:
                status = worker.get(f"/instances/{instance['instance']}/status").json()
                served[instance["worker_id"]] = status["requests_total"]
        assert min(served.values()) >= 5, served
        second.terminate()
        assert second.wait(20) == 0
        eventually(
            lambda: not [w for w in pool.status()["workers"] if w["worker_id"] == "w2" and w["alive"]],
            5,
            lambda: "w2 has left",
        )
        pool.wait_active("both", replicas=2)


def test_a_request_that_kills_its_engine_is_not_sent_to_the_next_one(mending_pool: PoolProcess) -> None:
    mending_pool.register("m", fake=True, min_replicas=3)
    mending_pool.wait_active("m", replicas=3)
    with ThreadPoolExecutor(12) as threads:  # so that connections to each of them are kept
        list(
            threads.map(
                lambda _: mending_pool.http.post("/v1/completions", json={"model": "m", "prompt": "x"}), range(48)
            )
        )
    deadly = mending_pool.http.post(
        "/v1/completions", json={"model": "m", "prompt": "x"}, headers={"X-Fake-Crash-After-Tokens": "0"}
    )
    assert (deadly.status_code, deadly.json()["error"]["code"]) == (502, "upstream_failed")
    eventually(lambda: any(each["failures"] for each in mending_pool.model("m")["instances"]), 5, lambda: "seen")
    assert sum(each["failures"] for each in mending_pool.model("m")["instances"]) == 1


def test_a_second_worker_of_the_same_name_is_turned_away(fake_pool: PoolProcess, tmp_path: Path) -> None:
    body = {
        "info": {"worker_id": "w1", "incarnation": "other", "url": "http://127.0.0.1:9"},
        "devices": [],
        "engines": {},
    }
    answer = fake_pool.http.post("/workers/register", json=body, headers={"Authorization": f"Bearer {fake_pool.token}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "worker_id_taken")
    assert "--worker-id" in answer.json()["error"]["message"]


def test_models_are_there_again_after_a_restart_of_everything(tmp_path: Path) -> None:
    flags = {"MODELPOOL_ENGINES": "fake"}
    with running_pool(tmp_path, "--no-demo", **flags) as pool:
        pool.register("kept", fake=True)
        pool.register("gone", fake=True)
        pool.wait_active("kept")
        pool.remove("gone")
    with running_pool(tmp_path, "--no-demo", **flags) as pool:
        pool.wait_active("kept")
        assert [model["alias"] for model in pool.status()["models"]] == ["kept"]


def test_a_second_up_in_the_same_home_and_a_taken_port_say_what_to_do(fake_pool: PoolProcess, tmp_path: Path) -> None:
    second = start_up(fake_pool.home, "--no-demo", run_id="second")
    _, said = second.communicate(timeout=30)
    assert second.returncode == 1
    assert "up is already running" in said
    port = fake_pool.url.rsplit(":", 1)[1]
    third = start_up(tmp_path, "--no-demo", "--port", port, run_id="third", MODELPOOL_ENGINES="fake")
    _, said = third.communicate(timeout=60)
    assert third.returncode == 1
    assert f"127.0.0.1:{port} is taken" in said
    assert "--port" in said


def test_an_address_beyond_loopback_needs_a_key(tmp_path: Path) -> None:
    refused = start_up(tmp_path, "--no-demo", "--host", "0.0.0.0", run_id="open")
    try:
        _, said = refused.communicate(timeout=60)
    finally:
        end(refused)
    assert refused.returncode == 1
    assert "--api-key" in said
    assert "--insecure-no-auth" in said


def test_with_a_key_set_nothing_is_open_but_health(tmp_path: Path) -> None:
    with running_pool(tmp_path, "--no-demo", "--api-key", "secret", MODELPOOL_ENGINES="fake") as pool:
        pool.register("m", fake=True)
        pool.wait_active("m")
        client = httpx.Client(base_url=pool.url, trust_env=False)
        ask = {"model": "m", "prompt": "x"}
        key, token = {"Authorization": "Bearer secret"}, {"Authorization": f"Bearer {pool.token}"}
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=ask).status_code == 401
        assert client.post("/v1/completions", json=ask, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.post("/v1/completions", json=ask, headers=key).status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/admin/models").status_code == 401
        assert client.get("/admin/models", headers=key).status_code == 403
        assert client.post("/workers/register", content=b"{}").status_code == 401
        assert client.post("/workers/register", content=b"{}", headers=key).status_code in (401, 403)
        assert client.post("/workers/register", content=b"{}", headers=token).status_code == 422
        with pool.worker_http() as worker:
            url = str(worker.base_url)
            bare = httpx.Client(base_url=url, trust_env=False)
            assert bare.get("/health").status_code == 200
            assert [bare.request(method, path).status_code for method, path in WORKER_ROUTES] == [401] * len(
                WORKER_ROUTES
            )
            address = worker.get("/instances/m").json()["address"]
        host = httpx.Client(base_url=f"http://{address['host']}:{address['port']}", trust_env=False)
        assert host.post("/v1/completions", json=ask).status_code == 401
        assert host.post("/v1/completions", json=ask, headers=token).status_code == 200
        logs = "".join(path.read_text(errors="replace") for path in pool.home.rglob("*.log"))
        assert "secret" not in logs
        assert pool.token not in logs


WORKER_ROUTES = [
    ("GET", "/info"),
    ("GET", "/instances"),
    ("GET", "/instances/m/status"),
    ("POST", "/instances/start"),
    ("POST", "/instances/m/stop"),
    ("POST", "/proxy/m/v1/completions"),
    ("GET", "/watch"),
]
