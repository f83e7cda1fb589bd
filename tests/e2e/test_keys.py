"""API keys in a whole pool: the command line, the documentation's example, the manager's death."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.pool import PoolProcess, eventually
from tests.e2e.test_cli import environment

EXAMPLE = re.search(
    r"```bash\n(ADMIN=.*?/admin/keys.*?)\n```", (Path(__file__).parents[2] / "docs" / "api.md").read_text(), re.DOTALL
)


def keys(pool: PoolProcess, *arguments: str) -> Any:
    """What `modelpool keys …` prints."""
    command = [sys.executable, "-m", "modelpool.cli", "keys", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment(pool.home))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def status(pool: PoolProcess, secret: str, model: str = "m") -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return httpx.post(f"{pool.url}/v1/chat/completions", json=body, headers=headers, trust_env=False).status_code


def test_keys_are_made_used_and_revoked_by_command_and_outlive_the_manager(own_pool: PoolProcess) -> None:
    pool = own_pool
    for alias in ("m", "other"):
        pool.register(alias, fake=True)
        pool.wait_active(alias, within=30)
    assert status(pool, "") == 200
    assert keys(pool, "ls") == []
    alice = keys(pool, "create", "alice", "--model", "m")
    command = [sys.executable, "-m", "modelpool.cli", "keys", "create", "bob"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment(pool.home))
    bob = {"secret": shown.stdout.removesuffix("\n")}
    assert "shown only now" in shown.stderr
    assert [status(pool, secret) for secret in ("", "mp-x", alice["secret"], bob["secret"])] == [401, 401, 200, 200]
    client = openai.OpenAI(base_url=f"{pool.url}/v1", api_key=alice["secret"], max_retries=0)
    assert [model.id for model in client.models.list()] == ["m"]
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "model_not_allowed"
    assert httpx.get(f"{pool.url}/admin/keys", trust_env=False).status_code == 401

    pool.one("modelpool: manager").kill()
    assert [status(pool, secret) for secret in ("", alice["secret"], bob["secret"])] == [401, 200, 200]
    revoked = keys(pool, "revoke", "alice")  # waits for the manager, which then waits for its worker
    eventually(lambda: status(pool, alice["secret"]) == 401, 1, lambda: "alice refused")
    assert revoked["id"] == alice["key"]["id"]
    assert [each["name"] for each in keys(pool, "ls")] == ["bob"]
    assert [each["name"] for each in keys(pool, "ls", "--all")] == ["alice", "bob"]

    pool.one("modelpool: gateway").kill()
    eventually(lambda: status(pool, bob["secret"]) == 200, 15, lambda: "bob served by a new gateway")
    assert [status(pool, secret) for secret in ("", alice["secret"])] == [401, 401]


def test_the_example_of_the_documentation_makes_a_key_that_works(own_pool: PoolProcess) -> None:
    pool = own_pool
    pool.register("echo", fake=True)
    pool.wait_active("echo", within=30)
    assert EXAMPLE is not None
    script = EXAMPLE[1].replace("http://127.0.0.1:8000", pool.url).replace("~/.modelpool", str(pool.home))
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=60, check=True)
    made, listed = (json.loads(text) for text in re.findall(r"\{.*?\}(?:\]\}|,\"secret\":\"[^\"]*\"\})", done.stdout))
    assert listed["keys"] == [made["key"]]
    assert (status(pool, made["secret"], "echo"), status(pool, made["secret"])) == (200, 403)


def test_a_limit_made_by_command_holds_and_its_tokens_are_the_engines_own(own_pool: PoolProcess) -> None:
    pool = own_pool
    pool.register("m", fake=True, fake_response="one two three")
    pool.wait_active("m", within=30)
    secret = keys(pool, "create", "alice", "--rpm", "3", "--tpm", "10000", "--concurrency", "2")["secret"]
    client = openai.OpenAI(base_url=f"{pool.url}/v1", api_key=secret, max_retries=0)
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
    left = 10_000
    for number in range(3):
        answer = client.chat.completions.with_raw_response.create(model="m", messages=messages, max_tokens=200)
        assert answer.headers["x-ratelimit-remaining-requests"] == str(2 - number)
        assert left - 300 < int(answer.headers["x-ratelimit-remaining-tokens"]) < left - 200
        usage = answer.parse().usage
        assert usage is not None
        left -= usage.total_tokens
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="m", messages=messages)
    assert 55 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.response.headers["x-ratelimit-remaining-tokens"] == str(left)
