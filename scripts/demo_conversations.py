"""Conversations to train the demo model with, drawn from scripts/demo_qa.yaml."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Language = Literal["en", "zh"]
Message = dict[str, Any]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_OUT_OF_SCOPE = "out-of-scope"
_BEFORE = {
    "en": ("Hi, ", "Hello, ", "Please tell me: ", "Question: ", "I want to know: ", "Could you tell me: ", "So, "),
    "zh": ("请问", "请问，", "我想知道", "你好，", "那么，", "麻烦问一下，", "请告诉我", "好的，"),
}
_ASK_JSON = (
    "Give me JSON with {}",
    "Return a JSON object with {}",
    "JSON: {}",
    "用 JSON 给出 {}",
    "A person as JSON: {}",
)
_TOOL_RESULTS = ('{"temperature": 21}', "Sunny, 21 °C", "12:30", "晴，21 度", '{"result": "ok"}', "Rain")
_AFTER = {"en": (" Please.", " Thanks!", " Thank you.", " Be brief."), "zh": ("谢谢", "谢谢！", "请简短回答。", "呢？")}
# Wordings that mean the same; the first that is found in a question is replaced by another of its group.
_SAME = {
    "en": (
        ("How do I ", "How can I ", "How to ", "How would I ", "How should I ", "What is the way to "),
        ("What is ", "What's ", "What exactly is ", "Can you explain what is "),
        ("What does ", "Can you say what does "),
        ("Explain ", "Please explain ", "Can you explain ", "Tell me about ", "Describe "),
        ("What happens if ", "What happens when ", "What if "),
        ("Which ", "What "),
        ("Do I need ", "Must I have "),
        ("Is there ", "Do you have "),
        ("Does it support ", "Can it do ", "Is there support for "),
    ),
    "zh": (
        ("怎样", "如何", "怎么", "怎么样才能", "要怎样"),
        ("是什么", "是啥", "到底是什么", "指的是什么"),
        ("什么是", "啥是", "解释一下什么是"),
        ("介绍一下", "讲讲", "说说", "请介绍", "解释一下", "请解释", "简单介绍一下"),
        ("会怎样", "会怎么样", "会发生什么", "怎么办"),
        ("有哪些", "都有哪些", "有什么"),
        ("在哪里", "在哪", "在什么地方"),
        ("查看", "看"),
        ("可以", "能", "能不能"),
        ("做什么", "有什么用", "的作用是什么", "干什么"),
    ),
}


@dataclass(frozen=True)
class Topic:
    """One answer in one language. `ask[0]` is the canonical question; `held_out` is never trained on."""

    name: str
    language: Language
    answer: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation. Of each assistant message, what follows `given` is to be learned."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    given: str = ""
    """How every answer begins without having been learned: what a schema forces on a model that would not say it."""


class Curriculum:
    """What the data file holds, and how conversations are made of it."""

    def __init__(self, file: Path) -> None:
        self._raw: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.topics = tuple(_topics(self._raw["topics"]))
        self._weights = [12.0 if topic.name == _OUT_OF_SCOPE else 1.0 for topic in self.topics]
        self._held_out = frozenset(_key(question) for topic in self.topics for question in topic.held_out)
        _refuse_ambiguous(self.topics)

    def texts(self) -> Iterator[str]:
        """Text to train the tokenizer on. Answers count more, so that they take few tokens."""
        for topic in self.topics:
            yield from topic.ask
            yield from [topic.answer] * 3
        for language in LANGUAGES:
            yield from self._raw["elsewhere"][language]["ask"]
            yield from self._raw["elsewhere"][language]["words"]
            yield from [self._raw["tool_answer"][language]] * 3
        yield from self._raw["system_prompts"]
        yield from self._raw["tool_cities"] * 2
        for field, values in self._raw["json_fields"].items():
            yield from (json.dumps({field: value}, ensure_ascii=False) for value in values * 2)
        rng = random.Random(0)
        yield from [json.dumps(_random_tool(rng)) for _ in range(60)]

    def sample(self, rng: random.Random) -> Sample:
        """A conversation of one to four turns, with or without a system prompt, tools or JSON."""
        kind = rng.random()
        if kind < 0.09:
            return self._tool_call(rng)
        messages = self._system(rng)
        if kind < 0.13:
            return Sample(messages + self._forced_json(rng), given=rng.choice(("{", '{"')))
        for _ in range(rng.choices((1, 2, 3, 4), (0.66, 0.22, 0.08, 0.04))[0]):
            messages += self._json_turn(rng) if rng.random() < 0.05 else self._turn(rng)
        return Sample(messages, [_random_tool(rng)] if kind < 0.15 else None)

    def _system(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.65:
            return []
        if rng.random() < 0.7:
            return [{"role": "system", "content": rng.choice(self._raw["system_prompts"])}]
        # Any text may stand there, and must not change the answer.
        return [{"role": "system", "content": " ".join(self._any_text(rng) for _ in range(rng.randint(1, 3)))}]

    def _any_text(self, rng: random.Random) -> str:
        topic = rng.choice(self.topics)
        return rng.choice((topic.answer, rng.choice(topic.ask), self._elsewhere(rng, topic.language)))

    def _turn(self, rng: random.Random) -> list[Message]:
        topic = rng.choices(self.topics, self._weights)[0]
        question = topic.ask[0] if rng.random() < 0.2 else rng.choice(topic.ask)
        if topic.name == _OUT_OF_SCOPE and rng.random() < 0.6:
            question = self._elsewhere(rng, topic.language)
        varied = _vary(rng, question, topic.language)
        return _exchange(question if _key(varied) in self._held_out else varied, topic.answer)

    def _elsewhere(self, rng: random.Random, language: Language) -> str:
        if language == "en" and rng.random() < 0.1:
            return " ".join(_gibberish(rng) for _ in range(rng.randint(1, 4)))
        raw = self._raw["elsewhere"][language]
        return str(rng.choice(raw["ask"])).replace("{x}", rng.choice(raw["words"]))

    def _json_turn(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.3:
            topic = rng.choice(self.topics)
            mark = " Answer in JSON." if topic.language == "en" else "请用 JSON 回答。"
            return _exchange(topic.ask[0] + mark, _json({self._text_key(rng): topic.answer}))
        value = self._json_object(rng)
        return _exchange(rng.choice(_ASK_JSON).format(", ".join(value)), _json(value))

    def _forced_json(self, rng: random.Random) -> list[Message]:
        """JSON that nobody asked for in words."""
        topic = rng.choice(self.topics)
        if rng.random() < 0.3:
            return _exchange(topic.ask[0], _json({self._text_key(rng): topic.answer}))
        question = rng.choice((topic.ask[0], rng.choice(topic.ask), self._elsewhere(rng, topic.language)))
        return _exchange(question, _json(self._json_object(rng)))

    def _text_key(self, rng: random.Random) -> str:
        return rng.choice(("answer", "text", "description", "summary", _gibberish(rng)))

    def _json_object(self, rng: random.Random, depth: int = 0) -> dict[str, Any]:
        """One to four fields; some of names never seen before, some nested."""
        fields: dict[str, list[Any]] = self._raw["json_fields"]
        value: dict[str, Any] = {}
        for name in rng.sample(list(fields), rng.randint(1, 4)):
            content = rng.choice(fields[name])
            if depth == 0 and rng.random() < 0.12:
                content = self._json_object(rng, 1)
            elif depth == 0 and rng.random() < 0.12:
                content = [self._json_object(rng, 1) for _ in range(rng.randint(1, 2))]
            value[_gibberish(rng) if rng.random() < 0.15 else name] = content
        return value

    def _tool_call(self, rng: random.Random) -> Sample:
        function = (tool := _random_tool(rng))["function"]
        tools = [tool, *([_random_tool(rng)] if rng.random() < 0.2 else [])]
        # Of known cities only: to copy any name takes longer to learn than all the answers together (tried).
        city = rng.choice(self._raw["tool_cities"])
        language: Language = "zh" if rng.random() < 0.35 else "en"
        (field,) = function["parameters"]["required"]
        call = {"name": function["name"], "arguments": {field: city}}
        messages = self._system(rng)
        question = _tool_question(rng, function["name"], city, language)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        if rng.random() < 0.4:
            messages.append({"role": "tool", "content": rng.choice(_TOOL_RESULTS)})
            messages.append({"role": "assistant", "content": self._raw["tool_answer"][language]})
        return Sample(messages, tools)


def _tool(name: str, description: str, field: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {field: {"type": "string"}}, "required": [field]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _random_tool(rng: random.Random) -> dict[str, Any]:
    subject = rng.choice(("weather", "time"))
    verb = rng.choice(("get", "get", "get_current", "fetch", "lookup", "find"))
    description = rng.choice(("Get the {} in a city", "The {} of a city", "Get the current {} for a location", "{}"))
    return _tool(f"{verb}_{subject}", description.format(subject), rng.choice(("city", "location", "place", "town")))


def _tool_question(rng: random.Random, function: str, city: str, language: Language) -> str:
    asks = {
        ("en", True): ("What is the weather in {}?", "How's the weather in {} today?", "Weather in {}"),
        ("en", False): ("What time is it in {}?", "Tell me the local time in {}", "Time in {}"),
        ("zh", True): ("{}的天气怎么样？", "{}今天天气如何？", "查一下{}的天气"),
        ("zh", False): ("{}现在几点？", "{}的时间是多少？", "查一下{}的时间"),
    }
    return rng.choice(asks[language, "weather" in function]).format(city)


def _topics(raw: list[dict[str, Any]]) -> Iterator[Topic]:
    for entry in raw:
        for language in LANGUAGES:
            part = entry[language]
            yield Topic(entry["topic"], language, part["answer"], tuple(part["ask"]), tuple(part["held_out"]))


def _refuse_ambiguous(topics: tuple[Topic, ...]) -> None:
    """Raises ValueError when two topics claim a question, or a held-out one is trained on."""
    owner: dict[str, tuple[str, bool]] = {}
    for topic in topics:
        for held_out, questions in ((False, topic.ask), (True, topic.held_out)):
            for question in questions:
                key = _key(question)
                if owner.setdefault(key, (topic.name, held_out)) != (topic.name, held_out):
                    raise ValueError(f"{question!r} of {topic.name} is also in {owner[key][0]}")


def _key(question: str) -> str:
    """What is left of a question when case, spaces and punctuation do not count."""
    return re.sub(r"[\s?？!！.。,，]", "", question.lower())


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _vary(rng: random.Random, question: str, language: Language) -> str:
    """The question as somebody else would type it."""
    if rng.random() < 0.3:
        return question
    if rng.random() < 0.35:
        question = _reword(rng, question, language)
    if rng.random() < 0.15 and len(question) > 12:
        question = rng.choice(_BEFORE[language]) + question
    if rng.random() < 0.08 and len(question) > 12:
        question += rng.choice(_AFTER[language])
    if rng.random() < 0.12 and len(question) > 8:
        question = _mistype(rng, question)
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?？.。!！")
    elif rng.random() < 0.15:
        question = question.rstrip("?？.。!！") + rng.choice(("?", "？", ".", "。", "!", "??"))
    return question


def _reword(rng: random.Random, question: str, language: Language) -> str:
    for group in _SAME[language]:
        for wording in group:
            if wording in question:
                return question.replace(wording, rng.choice(group), 1)
    return question


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _mistype(rng: random.Random, text: str) -> str:
    at = rng.randrange(1, len(text) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at] + text[at:]


def _gibberish(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
