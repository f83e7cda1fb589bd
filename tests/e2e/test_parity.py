"""The same requests to vLLM's own server and through gateway and pool give the same status and body."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelpool import demo
from tests.e2e.pool import PoolProcess, eventually

ASK = [{"role": "user", "content": "What is Model Pool?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAT, COMPLETE, RESPOND, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


def chat(**options: Any) -> tuple[str, Any]:
    return CHAT, {"messages": ASK, "temperature": 0, "max_tokens": 12, **options}


def complete(**options: Any) -> tuple[str, Any]:
    return COMPLETE, {"prompt": "Model Pool is", "temperature": 0, "max_tokens": 12, **options}


def respond(**options: Any) -> tuple[str, Any]:
    return RESPOND, {"input": "What is Model Pool?", "temperature": 0, "max_output_tokens": 12, **options}


def message(**options: Any) -> tuple[str, Any]:
    return MESSAGE, {"messages": ASK, "temperature": 0, "max_tokens": 12, **options}


REQUESTS: dict[str, tuple[str, Any]] = {
    "chat": chat(),
    "chat to its end": chat(max_tokens=200),
    "chat with a system prompt": chat(messages=[{"role": "system", "content": "Be brief."}, *ASK]),
    "chat in several turns": chat(messages=[*ASK, {"role": "assistant", "content": "A pool."}, *ASK]),
    "chat in Chinese": chat(messages=[{"role": "user", "content": "Model Pool 是什么？"}], max_tokens=60),
    "chat stream": chat(stream=True),
    "chat stream with usage": chat(stream=True, stream_options={"include_usage": True}),
    "chat stream with continuous usage": chat(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
    "chat n": chat(n=2),
    "chat n stream": chat(n=2, stream=True),
    "chat stop": chat(max_tokens=100, stop=["a"]),
    "chat stop token": chat(stop_token_ids=[300]),
    "chat logprobs": chat(logprobs=True, top_logprobs=3),
    "chat logprobs stream": chat(logprobs=True, top_logprobs=1, stream=True),
    "chat seed": chat(temperature=1, seed=7),
    "chat top_k and penalties": chat(temperature=0.7, seed=3, top_k=5, presence_penalty=0.5, frequency_penalty=0.2),
    "chat logit bias": chat(logit_bias={"300": 50}),
    "chat tools auto": chat(tools=[WEATHER], tool_choice="auto"),
    "chat tools named": chat(
        tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}}, max_tokens=24
    ),
    "chat tools named stream": chat(
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=24,
        stream=True,
    ),
    "chat tools required": chat(tools=[WEATHER], tool_choice="required", max_tokens=24),
    "chat json schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, max_tokens=40
    ),
    "chat json object": chat(response_format={"type": "json_object"}, max_tokens=24),
    "chat regex": chat(structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}),
    "chat choice": chat(structured_outputs={"choice": ["yes", "no"]}),
    "chat echo of the prompt": chat(echo=True, add_generation_prompt=True),
    "chat prompt logprobs": chat(prompt_logprobs=1, max_tokens=2),
    "chat return token ids": chat(return_token_ids=True),
    "chat without messages": (CHAT, {"max_tokens": 3}),
    "chat with a bad temperature": chat(temperature=-1),
    "chat with a bad role": chat(messages=[{"role": "nobody", "content": 3}]),
    "chat too long": chat(max_tokens=1_000_000),
    "chat n zero": chat(n=0),
    "chat with text for max_tokens": chat(max_tokens="many"),
    "chat with a bad schema": chat(response_format={"type": "json_schema"}),
    "chat stream options without stream": chat(stream_options={"include_usage": True}),
    "chat with top_logprobs alone": chat(top_logprobs=2),
    "completion": complete(),
    "completion stream": complete(stream=True),
    "completion of several prompts": complete(prompt=["Model", "Pool"]),
    "completion of tokens": complete(prompt=[300, 301, 302]),
    "completion echo and logprobs": complete(echo=True, logprobs=2),
    "completion n best_of": complete(n=2, temperature=0.8, seed=1),
    "completion stop and suffix": complete(stop=["."], suffix="end"),
    "completion with a bad prompt": complete(prompt=None),
    "completion of an empty prompt": complete(prompt=""),
    "completion zero tokens": complete(max_tokens=0),
    "responses": respond(),
    "responses stream": respond(stream=True),
    "responses with instructions": respond(instructions="Be brief."),
    "responses with messages": respond(input=[{"role": "user", "content": "What is a worker?"}]),
    "responses with a bad input": respond(input=3),
    "messages": message(),
    "messages stream": message(stream=True),
    "messages with system": message(system="Be brief."),
    "messages without max_tokens": (MESSAGE, {"messages": ASK}),
    "messages count_tokens": ("/v1/messages/count_tokens", {"messages": ASK}),
    "tokenize": ("/tokenize", {"prompt": "Model Pool 模型池"}),
    "tokenize chat": ("/tokenize", {"messages": ASK, "return_token_strs": True}),
    "tokenize nothing": ("/tokenize", {}),
    "detokenize": ("/detokenize", {"tokens": [300, 301, 302]}),
    "detokenize text": ("/detokenize", {"tokens": "x"}),
    "embeddings of a chat model": ("/v1/embeddings", {"input": "x"}),
    "score of a chat model": ("/v1/score", {"text_1": "a", "text_2": "b"}),
}


@pytest.fixture(scope="module")
def vllm_server(demo_pool: PoolProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM's own server with the demo model and the arguments that the pool gives it."""
    port = 18000 + os.getpid() % 10000
    arguments = ["--model", str(demo.model_path()), "--served-model-name", "demo", "--port", str(port)]
    arguments += ["--max-model-len", str(demo.MAX_MODEL_LEN), "--host", "127.0.0.1"]
    for name, value in demo.engine_args().items():
        flag = "--" + name.replace("_", "-")
        arguments += [flag] if value is True else [flag, value if isinstance(value, str) else json.dumps(value)]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "VLLM_NO_USAGE_STATS": "1",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TORCH_COMPILE_DISABLE": "1",
            },
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

            def up() -> bool:
                assert server.poll() is None, log.read_text()[-3000:]
                return client.get("/health").status_code == 200

            eventually(up, 240, lambda: log.read_text()[-3000:])
            yield client
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_pool_answers_as_vllm_itself_does(vllm_server: httpx.Client, demo_pool: PoolProcess, name: str) -> None:
    path, body = REQUESTS[name]
    body = {"model": "demo", **body}
    theirs = vllm_server.post(path, json=body)
    ours = demo_pool.http.post(path, json=body)
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert comparable(ours.text) == comparable(theirs.text)


def test_an_unknown_model_has_the_envelope_that_vllm_gives_it(
    vllm_server: httpx.Client, demo_pool: PoolProcess
) -> None:
    theirs = vllm_server.post(CHAT, json={"model": "x", "messages": ASK})
    ours = demo_pool.http.post(CHAT, json={"model": "x", "messages": ASK})
    assert ours.status_code == theirs.status_code == 404
    assert set(ours.json()) == set(theirs.json())
    assert set(ours.json()["error"]) == set(theirs.json()["error"])


_ID = re.compile(r'"(id|item_id|call_id|request_id)": ?"[^"]*"')
_TIME = re.compile(r'"(created|created_at|completed_at)": ?[0-9.]+')
# A float's last digits differ with the batch that a request happens to share a step with.
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]+(?:e-?[0-9]+)?")
# How many tokens share a chunk depends on who of engine and server was faster. These grow with every chunk.
_GROWING = {"content", "text", "delta", "arguments", "reasoning_content", "partial_json", "token_ids", "tokens"}
_GROWING |= {"token_logprobs", "top_logprobs", "text_offset"}
_COUNTING = {"sequence_number", "completion_tokens", "total_tokens"}


def comparable(text: str) -> Any:
    """A body without ids and times, floats rounded; a stream as its kinds of events, and what they add up to."""
    text = _TIME.sub(r'"\1":0', _ID.sub(r'"\1":"*"', text))
    text = _FLOAT.sub(lambda match: f"{float(match[0]):.2f}", text)
    if not text.startswith(("data: ", "event: ")):
        return text
    kinds: list[str] = []
    said: set[str] = set()
    grown: dict[str, Any] = {}
    for line in text.splitlines():
        kind = "" if line.startswith("event: ") else line  # the event's name stands in its data again, as its type
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            kind = event.get("type") or event.get("object")
            _add_up(event, kind, said, grown)
        if kind and kind not in kinds[-1:]:
            kinds.append(kind)
    if any(each.endswith("finish_reason='length'") for each in said):
        # vLLM fills in what a call that was cut off lacks, or not, as its tokens happen to come in one piece or two.
        grown = {place: each for place, each in grown.items() if not place.endswith(".function.arguments")}
    return kinds, sorted(said), grown


def _add_up(value: Any, path: str, said: set[str], grown: dict[str, Any]) -> None:
    """Put what an event says beside what the events before it said: text that grows is joined, the rest collected."""
    if isinstance(value, dict):
        for name, each in value.items():
            place = f"{path}.{name}"
            if name in _GROWING and isinstance(each, str | list) and not _is_message(each):
                grown[place] = grown.get(place, type(each)()) + each
            elif name in _COUNTING:
                grown[place] = each if name != "sequence_number" else "*"
            else:
                _add_up(each, place, said, grown)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _add_up(each, f"{path}[{index}]", said, grown)
    elif value is not None:
        said.add(f"{path}={value!r}")


def _is_message(value: Any) -> bool:
    """Whether a `content` is the parts of a whole message, as the last events of a response repeat them."""
    return isinstance(value, list) and any(isinstance(each, dict) and "type" in each for each in value)


def test_the_pool_has_the_comparison_it_claims() -> None:
    assert len(REQUESTS) >= 40
    assert Path(demo.model_path()).is_dir()
