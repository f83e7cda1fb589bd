"""The shipped demo model, as far as it can be judged without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from scripts.demo_conversations import Curriculum
from tokenizers import Tokenizer

from modelpool import demo
from modelpool.messages.models import ModelSpec

FOLDER = demo.model_path()
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
CURRICULUM = Curriculum(Path(__file__).parents[2] / "scripts" / "demo_qa.yaml")
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def load_template() -> Template:
    """The chat template in an environment like that of `transformers`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((FOLDER / "chat_template.jinja").read_text(encoding="utf-8"))


TEMPLATE = load_template()


def render(messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, prompt: bool = True) -> str:
    return TEMPLATE.render(messages=messages, tools=tools, add_generation_prompt=prompt)


def test_the_folder_is_a_complete_model_of_a_few_megabytes() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000


def test_config_tokenizer_and_registration_agree() -> None:
    config = read("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] >= TOKENIZER.get_vocab_size()
    assert config["max_position_embeddings"] == demo.MAX_MODEL_LEN
    assert config["eos_token_id"] == TOKENIZER.token_to_id("<|im_end|>")
    assert config["pad_token_id"] == TOKENIZER.token_to_id("<|endoftext|>")
    assert read("tokenizer_config.json")["model_max_length"] == demo.MAX_MODEL_LEN


def test_the_defaults_for_sampling_leave_a_request_as_it_is() -> None:
    # vLLM takes these over as defaults of every request that does not set them.
    assert not {"temperature", "top_p", "top_k", "repetition_penalty"} & set(read("generation_config.json"))


def test_the_demo_can_be_registered() -> None:
    spec = ModelSpec(
        alias=demo.ALIAS,
        model_name=str(FOLDER),
        max_model_len=demo.MAX_MODEL_LEN,
        engine_args=demo.engine_args(),
    )
    assert spec.alias == "demo"


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"])
def test_marks_are_one_token_each(mark: str) -> None:
    assert TOKENIZER.encode(f"a{mark}b", add_special_tokens=False).tokens[1:-1] == [mark]


def test_the_tool_marks_stay_in_the_text_for_the_tool_parser() -> None:
    ids = TOKENIZER.encode("<tool_call>{}</tool_call><|im_end|>", add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


def test_a_conversation_is_rendered_as_chatml() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    assert render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tool_calls_and_their_results_are_rendered_in_the_hermes_form() -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rain"},
    ]
    text = render(messages, tools=[WEATHER], prompt=False)
    system, rest = text.split("<|im_end|>\n", 1)
    assert json.dumps(WEATHER) in system
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
    )


def test_arguments_of_a_tool_call_may_be_text_already() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
    ]
    assert 'Well.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in render(messages, prompt=False)


def test_a_rendered_conversation_only_ever_grows() -> None:
    # Prefix caching, and the continuation of a stream elsewhere, rest on it.
    messages: list[dict[str, Any]] = []
    previous = ""
    for role, content in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")):
        messages.append({"role": role, "content": content})
        text = render(messages, prompt=False)
        assert text.startswith(previous)
        previous = text


def test_each_topic_has_an_answer_in_both_languages() -> None:
    answers = demo.answers()
    english = {row.topic for row in answers if row.language == "en"}
    assert len(answers) >= 120
    assert english == {row.topic for row in answers if row.language == "zh"}
    assert len({row.question for row in answers}) == len(answers)


def test_the_first_questions_of_a_newcomer_have_answers() -> None:
    assert demo.answer_to("What is Model Pool?").startswith("Model Pool is one OpenAI-compatible address")
    assert demo.answer_to("Model Pool 是什么？").startswith("Model Pool 是一个兼容 OpenAI 的统一入口")
    with pytest.raises(KeyError):
        demo.answer_to("never taught")


def test_every_answer_fits_the_context_many_times() -> None:
    lengths = [len(TOKENIZER.encode(row.answer, add_special_tokens=False).ids) for row in demo.answers()]
    assert max(lengths) <= 100


def test_the_shipped_answers_are_those_of_the_curriculum() -> None:
    taught = {(topic.name, topic.language, topic.ask[0], topic.answer) for topic in CURRICULUM.topics}
    assert {tuple(row) for row in demo.answers()} == taught


def test_the_model_is_trained_on_whole_conversations_and_never_on_a_held_out_wording() -> None:
    random = Random(1)
    held_out = {question for topic in CURRICULUM.topics for question in topic.held_out}
    for _ in range(300):
        sample = CURRICULUM.sample(random)
        asked = {message["content"] for message in sample.messages if message["role"] == "user"}
        text = render(sample.messages, tools=sample.tools, prompt=False)
        assert sample.messages[-1]["role"] == "assistant"
        assert not asked & held_out
        assert text.endswith("<|im_end|>\n")
        assert text.startswith(render(sample.messages[:-1], tools=sample.tools) + sample.given)
