"""How many tokens a request is taken to need, and to have used."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.gateway.meter import Estimate, Meter, estimate
from modelpool.gateway.routes import match
from modelpool.relay import ResponseHead
from tests.wire import chunk

CHAT = match(b"POST", b"/v1/chat/completions")


class Nowhere:
    """A sink that takes everything."""

    def head(self, head: ResponseHead, rest: bytes) -> None: ...
    def data(self, data: bytes) -> None: ...


def head(status: int = 200, kind: str = "application/json") -> ResponseHead:
    return ResponseHead(status, f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n\r\n".encode())


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def used(
    *pieces: bytes, status: int = 200, stream: bool = False, guess: Estimate = Estimate(100, 50), left: bool = False
) -> int:
    meter = Meter()
    sink = meter.watching(Nowhere())
    sink.head(head(status, "text/event-stream" if stream else "application/json"), pieces[0] if pieces else b"")
    for piece in pieces[1:]:
        sink.data(piece)
    return meter.used(guess, abandoned=left)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 3, "total_tokens": 10, "completion_tokens": 7}, 10),
        ({"prompt_tokens": 3, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}, 3),
        ({"input_tokens": 4, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 2}}, 13),
        ({"output_tokens": 9}, 109),
        ({"billed_units": {"input_tokens": 1}, "tokens": {"input_tokens": 2, "output_tokens": 5}}, 7),
        ({"type": "duration", "seconds": 5}, 150),
        ({"total_tokens": -4}, 150),
        ({"total_tokens": True}, 150),
        (None, 150),
        ([], 150),
    ],
)
@pytest.mark.parametrize("after", [{}, {"prompt_logprobs": None, "user": "u"}])
def test_the_engines_own_count_is_believed_where_it_makes_sense(
    usage: object, tokens: int, after: dict[str, object]
) -> None:
    answer = json.dumps({"id": "x", "choices": [{"text": '"usage": {"total_tokens": 1}'}], "usage": usage, **after})
    assert used(answer.encode()) == tokens
    assert used(*(bytes([each]) for each in answer.encode())) == tokens


def test_what_a_model_writes_about_usage_is_not_believed() -> None:
    text = '"usage": {"total_tokens": 0}, \\"usage\\": {"total_tokens": 0}'
    assert used(json.dumps({"usage": {"total_tokens": 30}, "choices": [{"text": text}]}).encode()) == 30


TEXT = [event({"choices": [{"delta": {"content": text}}]}) for text in ("data: a", "\ndata: b", "c")]
USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}})


@given(st.lists(st.integers(0, 400), max_size=8), st.booleans(), st.booleans())
def test_of_a_stream_the_last_usage_counts_or_else_its_events_however_it_is_cut(
    cuts: list[int], chunked: bool, with_usage: bool
) -> None:
    events = [*TEXT, *([USAGE] if with_usage else []), event(b"[DONE]")]
    raw = b"".join(map(chunk, events)) + b"0\r\n\r\n" if chunked else b"".join(events)
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[begin:end] for begin, end in pairwise(edges)]
    assert used(*pieces, stream=True) == (8 if with_usage else 103)


def test_a_long_stream_is_counted_whole_and_its_usage_found_at_its_end() -> None:
    filler = event({"choices": [{"delta": {"content": "x" * 300}}], "usage": None})
    assert used(*[filler] * 1000, stream=True) == 1100
    assert used(*[filler] * 1000, USAGE, event(b"[DONE]"), stream=True) == 8
    anthropic = b'event: message_delta\ndata: {"usage": {"input_tokens": 6, "output_tokens": 5}}\n\n'
    assert used(*[filler] * 9, anthropic, b'event: message_stop\ndata: {"type": "message_stop"}\n\n', stream=True) == 11


def test_what_was_not_answered_well_costs_nothing_but_what_was_left_while_it_ran_costs_all_of_its_estimate() -> None:
    guess = Estimate(100, 50)
    assert used(b'{"error": {}}', status=400) == used(b'{"error": {}}', status=503) == 0
    assert used(b'{"choices": [', left=True) == 150
    assert used(*TEXT[:2], stream=True, left=True) == 102
    meter = Meter()
    assert meter.used(guess, abandoned=True) == 0  # it waited, and never reached an engine
    meter.watching(Nowhere())
    assert (meter.used(guess, abandoned=False), meter.used(guess, abandoned=True)) == (0, 150)


def test_another_attempt_is_counted_anew() -> None:
    meter = Meter()
    first, second = meter.watching(Nowhere()), meter.watching(Nowhere())
    first.head(head(), b'{"usage": {"total_tokens": 1000}}')
    second = meter.watching(Nowhere())
    assert meter.used(Estimate(1, 1), abandoned=False) == 0
    second.head(head(), b'{"usage": {"total_tokens": 4}}')
    assert meter.used(Estimate(1, 1), abandoned=False) == 4


def body(**fields: object) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "completion"),
    [
        ({}, 0),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9, "max_tokens": None}, 9),
        ({"max_output_tokens": 11, "n": None}, 11),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"max_tokens": -1}, 0),
        ({"max_tokens": 7, "n": 0}, 7),
        ({"max_tokens": "7"}, 0),
        ({"max_tokens": 10**30}, 10**30),
        ({"sampling_params": {"max_tokens": 5}}, 5),
    ],
)
def test_the_longest_answer_that_was_asked_for_is_reserved(fields: dict[str, object], completion: int) -> None:
    raw = body(**fields)
    assert estimate(CHAT, raw) == Estimate(-(-len(raw) // 4), completion)


def test_a_longest_answer_beyond_all_measure_stays_a_number_that_fits() -> None:
    assert estimate(CHAT, body(max_tokens=2**62, n=2**62)).total == 10**12


def test_pictures_are_not_taken_for_text_and_chinese_is() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 10_000}}
    assert estimate(CHAT, body(messages=[{"role": "user", "content": [picture]}])).prompt < 100
    for ascii_only in (True, False):
        text = json.dumps({"model": "m", "prompt": "模型" * 10_000}, ensure_ascii=ascii_only).encode()
        assert estimate(CHAT, text).prompt == -(-len(text) // 4)


@pytest.mark.parametrize(
    "path", [b"/tokenize", b"/v1/detokenize", b"/v1/messages/count_tokens", b"/v1/chat/completions/render"]
)
def test_what_an_engine_writes_no_token_for_needs_none(path: bytes) -> None:
    assert estimate(match(b"POST", path), body(max_tokens=5)).total == 0


def test_what_is_no_json_is_the_engines_to_refuse() -> None:
    assert estimate(CHAT, b"[ " * 50_000).total == 25_000
