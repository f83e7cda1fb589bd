"""The fake engine answers like vLLM and keeps time exactly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.engines.engine import ASGIApp
from modelpool.engines.fake.engine import FakeEngine
from modelpool.engines.fake.text import detokenized, generation, token_id, tokens
from modelpool.messages.models import ModelSpec
from modelpool.testing.asgi import Call, post
from modelpool.testing.virtual_time import run_virtual

CHAT = "/v1/chat/completions"


class Crashed(Exception):
    """Stands for the SIGKILL of the process."""


def crash() -> None:
    raise Crashed


def engine(**settings: Any) -> FakeEngine:
    return FakeEngine(ModelSpec(alias="echo", fake=True, **settings), crash)


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def call(made: FakeEngine, request: Call) -> Call:
    async def main() -> Call:
        return await request.run(await made.start())

    return run_virtual(main())


async def left_behind(made: FakeEngine) -> tuple[int, int]:
    stats = made.stats()
    return stats.running, stats.waiting


# ---------------------------------------------------------------- text


@given(st.text())
def test_tokens_joined_are_the_text(text: str) -> None:
    assert "".join(tokens(text)) == text


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_token_ids_can_be_turned_back_into_text(text: str) -> None:
    ids = [token_id(token) for token in tokens(text)]
    assert detokenized(ids) == text
    assert all(number < 2**53 for number in ids)


@given(st.text(min_size=1), st.integers(1, 20), st.integers(1, 20))
def test_a_generation_has_as_many_tokens_as_asked(text: str, limit: int, exactly: int) -> None:
    assert len(generation(text, max_tokens=limit).tokens) <= limit
    assert len(generation(text, max_tokens=limit, exactly=exactly).tokens) == min(limit, exactly)
    assert len(generation(text, max_tokens=limit, ignore_eos=True).tokens) == limit


def test_a_stop_string_ends_the_text_before_it() -> None:
    made = generation("one two three four", max_tokens=100, stop=["four", "three"])
    assert (made.text, made.finish_reason, made.stop_reason) == ("one two ", "stop", "three")


# ---------------------------------------------------------------- answers


def test_chat_answers_with_what_it_was_told() -> None:
    answer = call(engine(), post(CHAT, chat("good morning"))).json
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "You said: good morning",
        "refusal": None,
        "tool_calls": [],
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_answer_can_be_registered() -> None:
    answer = call(engine(fake_response="forty-two"), post(CHAT, chat())).json
    assert answer["choices"][0]["message"]["content"] == "forty-two"


def test_max_tokens_cuts_the_answer() -> None:
    answer = call(engine(), post(CHAT, chat("a b c d e", max_tokens=3))).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_holds_the_same_text_as_the_answer_at_once(path: str) -> None:
    body = chat("a b c", n=2) if path == CHAT else {"model": "echo", "prompt": "a b c", "n": 2}
    whole = call(engine(), post(path, body)).json
    events = call(engine(), post(path, {**body, "stream": True, "stream_options": {"include_usage": True}})).events
    assert events[-1] == "[DONE]"
    assert (events[-2]["choices"], events[-2]["usage"]) == ([], whole["usage"])
    for index in range(2):
        choices = [event["choices"][0] for event in events[:-2] if event["choices"][0]["index"] == index]
        streamed = "".join(choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices)
        choice = whole["choices"][index]
        assert streamed == (choice["message"]["content"] if path == CHAT else choice["text"])
        assert choices[-1]["finish_reason"] == choice["finish_reason"]


def test_a_chat_stream_says_its_role_once() -> None:
    events = call(engine(), post(CHAT, chat(stream=True))).events
    assert [event["choices"][0]["delta"].get("role") for event in events[:-1]].count("assistant") == 1


def test_responses_stream_ends_with_the_whole_answer() -> None:
    body = {"model": "echo", "input": "hi"}
    whole = call(engine(), post("/v1/responses", body)).json
    events = call(engine(), post("/v1/responses", {**body, "stream": True})).events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert deltas == whole["output"][0]["content"][0]["text"] == "You said: hi"
    assert events[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]


def test_responses_are_kept_unless_told_otherwise() -> None:
    async def main() -> None:
        app = await engine().start()
        made = (await post("/v1/responses", {"input": "hi"}).run(app)).json
        assert (await Call("GET", f"/v1/responses/{made['id']}").run(app)).json == made
        follow = {"input": "and", "previous_response_id": made["id"]}
        more = (await post("/v1/responses", follow).run(app)).json
        assert more["usage"]["input_tokens"] > made["usage"]["input_tokens"]
        streamed = (await post("/v1/responses", {"input": "hi", "stream": True}).run(app)).events[-1]["response"]
        assert (await Call("GET", f"/v1/responses/{streamed['id']}").run(app)).json == streamed
        kept_not = (await post("/v1/responses", {"input": "hi", "store": False}).run(app)).json
        for call in (
            Call("GET", f"/v1/responses/{kept_not['id']}"),
            Call("POST", "/v1/responses/resp_0/cancel"),
            post("/v1/responses", {"input": "hi", "previous_response_id": "resp_0"}),
        ):
            assert ((await call.run(app)).status, call.json["error"]["param"]) == (404, "response_id")
        cancel = Call("POST", f"/v1/responses/{made['id']}/cancel")
        assert ((await cancel.run(app)).status, cancel.json["error"]["code"]) == (400, 400)

    run_virtual(main())


def test_a_response_is_made_in_the_background_until_it_is_cancelled() -> None:
    async def main() -> None:
        made = engine(fake_token_ms=1000)
        app = await made.start()
        asked = [post("/v1/responses", {"input": text, "background": True}) for text in ("hi", "ho")]
        first, second = [(await call.run(app)).json["id"] for call in asked]
        assert (await Call("GET", f"/v1/responses/{first}").run(app)).json["status"] == "queued"
        assert (await Call("POST", f"/v1/responses/{first}/cancel").run(app)).json["status"] == "cancelled"
        await asyncio.sleep(10)
        assert made.stats().running == 0
        assert (await Call("GET", f"/v1/responses/{first}").run(app)).json["status"] == "cancelled"
        done = (await Call("GET", f"/v1/responses/{second}").run(app)).json
        assert (done["status"], done["output"][0]["content"][0]["text"]) == ("completed", "You said: ho")

    run_virtual(main())


def test_messages_are_anthropics_whole_and_streamed() -> None:
    body = {"model": "echo", "max_tokens": 50, "system": "Be brief.", "messages": [{"role": "user", "content": "a b"}]}
    whole = call(engine(), post("/v1/messages", body)).json
    assert whole["content"] == [{"type": "text", "text": "You said: a b"}]
    assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("end_turn", 4)
    events = call(engine(), post("/v1/messages", {**body, "stream": True})).events
    types = [event["type"] for event in events]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == (
        "You said: a b"
    )
    cut = call(engine(), post("/v1/messages", {**body, "max_tokens": 2})).json
    assert cut["stop_reason"] == "max_tokens"
    stopped = call(engine(), post("/v1/messages", {**body, "stop_sequences": ["a"]})).json
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "a")
    counted = call(engine(), post("/v1/messages/count_tokens", body)).json["input_tokens"]
    assert 0 < counted < whole["usage"]["input_tokens"]
    refused = call(engine(), post("/v1/messages", {**body, "model": "other"}))
    assert (refused.status, refused.json["type"], refused.json["error"]["type"]) == (404, "error", "not_found_error")


def test_documents_are_scored_and_ranked_by_the_words_they_share() -> None:
    query, documents = "red cars", ["blue cars", "red cars", "green trees"]
    for names in (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items")):
        body = dict(zip(names, (query, documents), strict=True))
        for path in ("/score", "/v1/score"):
            scores = [each["score"] for each in call(engine(), post(path, body)).json["data"]]
            assert scores == [pytest.approx(1 / 3), 1, 0]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        ranked = call(engine(), post(path, {"query": query, "documents": documents, "top_n": 2})).json["results"]
        assert [(each["index"], each["document"]["text"]) for each in ranked] == [(1, "red cars"), (0, "blue cars")]
    assert call(engine(), post("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})).status == 400
    assert call(engine(), post("/score", {"text_1": "a"})).status == 400


def test_classes_and_vectors_depend_on_the_text_alone() -> None:
    classes = [call(engine(), post("/classify", {"input": ["a", "a", "b"]})).json["data"] for _ in range(2)]
    assert classes[0] == classes[1]
    assert classes[0][0]["probs"] == classes[0][1]["probs"] != classes[0][2]["probs"]
    assert sum(classes[0][0]["probs"]) == pytest.approx(1)
    [pooled] = call(engine(), post("/pooling", {"input": "one two three"})).json["data"]
    assert len(pooled["data"]) == 3


def test_embeddings_depend_on_the_text_alone() -> None:
    def vector(text: Any, **fields: Any) -> Any:
        return call(engine(), post("/v1/embeddings", {"input": text, **fields})).json["data"]

    [one], [same], [other] = vector("a"), vector("a"), vector("b")
    assert one["embedding"] == same["embedding"] != other["embedding"]
    assert sum(value * value for value in one["embedding"]) == pytest.approx(1)
    assert len(vector("a", dimensions=3)[0]["embedding"]) == 3
    assert [each["index"] for each in vector(["a", "b"])] == [0, 1]


def test_tokenize_and_detokenize_are_each_others_opposite() -> None:
    tokenized = call(engine(), post("/tokenize", {"prompt": "hello there 世界"})).json
    assert tokenized["count"] == len(tokenized["tokens"])
    assert call(engine(), post("/detokenize", {"tokens": tokenized["tokens"]})).json == {"prompt": "hello there 世界"}


def test_the_model_is_listed_under_its_alias() -> None:
    card = call(engine(max_model_len=99), Call("GET", "/v1/models")).json["data"][0]
    assert (card["id"], card["max_model_len"]) == ("echo", 99)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, {**chat(), "model": "other"}, 404, "The model `other` does not exist."),
        (CHAT, {"model": "echo"}, 400, "messages"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (CHAT, chat(temperature=-1), 400, "temperature"),
        (CHAT, chat(max_tokens=10**6), 400, "maximum context length is 32768"),
        (CHAT, {"messages": []}, 400, "messages"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
    ],
)
def test_errors_have_vllms_envelope(path: str, body: Any, status: int, says: str) -> None:
    answer = call(engine(), post(path, body))
    error = answer.json["error"]
    assert (answer.status, error["code"]) == (status, status)
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_what_is_not_json_is_a_bad_request() -> None:
    answer = call(engine(), Call("POST", CHAT, b"{nope"))
    assert (answer.status, answer.json["error"]["type"]) == (400, "BadRequestError")


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Fake-Delay-Ms", "soon"), ("X-Fake-Tokens", "-1"), ("X-Fake-Tokens", "1.5"), ("X-Fake-Token-Ms", "nan")],
)
def test_an_invalid_header_is_named(header: str, value: str) -> None:
    answer = call(engine(), post(CHAT, chat(), **{header: value}))
    assert answer.status == 400
    assert header in answer.json["error"]["message"]
    assert repr(value) in answer.json["error"]["message"]


# ---------------------------------------------------------------- time


async def timed(app: ASGIApp, body: Any, **headers: str) -> float:
    await post(CHAT, body, **headers).run(app)
    return asyncio.get_running_loop().time()


def test_with_one_slot_three_requests_take_three_six_and_nine_seconds() -> None:
    async def main() -> None:
        made = engine(fake_delay_ms=3000, fake_capacity=1)
        app = await made.start()
        tasks = [asyncio.ensure_future(timed(app, chat())) for _ in range(3)]
        await asyncio.sleep(1)
        assert (made.stats().running, made.stats().waiting) == (1, 2)
        assert await asyncio.gather(*tasks) == [3.0, 6.0, 9.0]
        assert await left_behind(made) == (0, 0)

    run_virtual(main())


def test_with_two_slots_two_run_side_by_side() -> None:
    async def main() -> None:
        app = await engine(fake_delay_ms=1000, fake_capacity=2).start()
        assert await asyncio.gather(*[timed(app, chat()) for _ in range(3)]) == [1.0, 1.0, 2.0]

    run_virtual(main())


def test_tokens_come_when_they_are_made() -> None:
    async def main() -> None:
        app = await engine(fake_delay_ms=1000, fake_token_ms=100).start()
        answer = await post(CHAT, chat("a b", stream=True)).run(app)
        made = [
            at
            for at, message in zip(answer.times, answer.sent, strict=True)
            if b'"content":"' in message.get("body", b"")
        ]
        # The role comes with the first token.
        assert made == pytest.approx([1.0, 1.0, 1.1, 1.2, 1.3])

    run_virtual(main())


def test_headers_say_it_for_one_request() -> None:
    async def main() -> None:
        app = await engine(fake_delay_ms=1000).start()
        headers = {"X-Fake-Delay-Ms": "10", "X-Fake-Token-Ms": "1000", "X-Fake-Tokens": "5"}
        answer = await post(CHAT, chat(), **headers).run(app)
        assert answer.json["usage"]["completion_tokens"] == 5
        assert answer.times[-1] == pytest.approx(4.01)

    run_virtual(main())


# ---------------------------------------------------------------- trouble


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_at_once(stream: bool) -> None:
    async def main() -> None:
        made = engine(fake_delay_ms=1000, fake_token_ms=1000, fake_capacity=1)
        app = await made.start()
        leaving, staying = post(CHAT, chat(stream=stream)), post(CHAT, chat())
        tasks = [asyncio.ensure_future(each.run(app)) for each in (leaving, staying)]
        await asyncio.sleep(1.5)
        leaving.disconnect()
        await asyncio.sleep(0)
        await tasks[0]
        assert asyncio.get_running_loop().time() == 1.5
        await asyncio.gather(*tasks)
        assert staying.times[0] == pytest.approx(1.5 + 1 + 2)
        assert await left_behind(made) == (0, 0)

    run_virtual(main())


def test_a_client_that_leaves_the_queue_is_not_waited_for() -> None:
    async def main() -> None:
        made = engine(fake_delay_ms=1000, fake_capacity=1)
        app = await made.start()
        first, leaving, last = (post(CHAT, chat()) for _ in range(3))
        tasks = [asyncio.ensure_future(each.run(app)) for each in (first, leaving, last)]
        await asyncio.sleep(0.5)
        leaving.disconnect()
        await asyncio.gather(*tasks)
        assert (leaving.sent, last.times[-1]) == ([], 2.0)

    run_virtual(main())


@pytest.mark.parametrize("after", [0, 2])
def test_it_crashes_after_as_many_tokens_as_asked(after: int) -> None:
    async def main() -> None:
        app = await engine().start()
        request = post(CHAT, chat("a b c", stream=True), X_Fake_Crash_After_Tokens=str(after))
        with pytest.raises(Crashed):
            await request.run(app)
        assert sum(b'"delta":{"content"' in each.get("body", b"") for each in request.sent) == after

    run_virtual(main())


def test_a_stalled_request_holds_its_slot_until_its_client_leaves() -> None:
    async def main() -> None:
        made = engine(fake_stall_after_tokens=1, fake_capacity=1)
        app = await made.start()
        request = post(CHAT, chat(stream=True))
        task = asyncio.ensure_future(request.run(app))
        await asyncio.sleep(3600)
        assert (made.stats().running, task.done()) == (1, False)
        request.disconnect()
        await task
        assert await left_behind(made) == (0, 0)

    run_virtual(main())
