"""The shapes of vLLM's generative answers: one body, or a stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from modelpool.engines.fake.text import Generation

Event = tuple[str | None, Any]
"""The event's name, where it has one, and what is sent as its data: text as it is, all else as JSON."""

_DONE: Event = (None, "[DONE]")


class Answer(Protocol):
    choices: Sequence[Generation]

    def body(self) -> dict[str, Any]:
        """The whole answer."""

    def events(self, step: int) -> Iterator[Event]:
        """What is sent when token `step` of every choice is made."""

    def last_events(self, usage: bool) -> Iterator[Event]:
        """What is sent after the last token."""


class _Answer:
    object_ = ""

    def __init__(self, id_: str, model: str, choices: Sequence[Generation], prompt_tokens: int) -> None:
        self.choices = choices
        self._id = id_
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._created = int(time.time())

    def _usage(self) -> dict[str, Any]:
        made = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + made,
            "completion_tokens": made,
            "prompt_tokens_details": None,
        }

    def _head(self, object_: str) -> dict[str, Any]:
        return {"id": self._id, "object": object_, "created": self._created, "model": self._model}

    def _chunk(self, object_: str, choices: list[Any]) -> Event:
        return None, {**self._head(object_), "choices": choices}

    def _usage_events(self, object_: str, usage: bool) -> Iterator[Event]:
        if usage:
            yield None, {**self._head(object_), "choices": [], "usage": self._usage()}
        yield _DONE


def _finish(choice: Generation, step: int) -> dict[str, Any]:
    """`finish_reason` and `stop_reason` of the chunk that carries token `step`."""
    last = step == len(choice.tokens) - 1
    return {
        "finish_reason": choice.finish_reason if last else None,
        **({"stop_reason": choice.stop_reason} if last else {}),
    }


class Chat(_Answer):
    """/v1/chat/completions"""

    def body(self) -> dict[str, Any]:
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": []},
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
                for index, choice in enumerate(self.choices)
            ],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._usage(),
        }

    def events(self, step: int) -> Iterator[Event]:
        object_ = "chat.completion.chunk"
        for index in range(len(self.choices) if step == 0 else 0):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(object_, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        for index, choice in enumerate(self.choices):
            if step < len(choice.tokens):
                delta = {"content": choice.tokens[step]}
                yield self._chunk(
                    object_, [{"index": index, "delta": delta, "logprobs": None, **_finish(choice, step)}]
                )

    def last_events(self, usage: bool) -> Iterator[Event]:
        yield from self._usage_events("chat.completion.chunk", usage)


class Completion(_Answer):
    """/v1/completions"""

    def body(self) -> dict[str, Any]:
        return {
            **self._head("text_completion"),
            "choices": [
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    "prompt_logprobs": None,
                }
                for index, choice in enumerate(self.choices)
            ],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self._usage(),
        }

    def events(self, step: int) -> Iterator[Event]:
        for index, choice in enumerate(self.choices):
            if step < len(choice.tokens):
                text = {"index": index, "text": choice.tokens[step], "logprobs": None, **_finish(choice, step)}
                yield self._chunk("text_completion", [text])

    def last_events(self, usage: bool) -> Iterator[Event]:
        yield from self._usage_events("text_completion", usage)


class Message(_Answer):
    """/v1/messages"""

    def body(self) -> dict[str, Any]:
        choice = self.choices[0]
        return self._message([{"type": "text", "text": choice.text}], *self._stop(), len(choice.tokens))

    def events(self, step: int) -> Iterator[Event]:
        if step == 0:
            yield self._event("message_start", message=self._message([], None, None, 0))
            yield self._event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        delta = {"type": "text_delta", "text": self.choices[0].tokens[step]}
        yield self._event("content_block_delta", index=0, delta=delta)

    def last_events(self, usage: bool) -> Iterator[Event]:
        reason, sequence = self._stop()
        used = {"input_tokens": self._prompt_tokens, "output_tokens": len(self.choices[0].tokens)}
        yield self._event("content_block_stop", index=0)
        yield self._event("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=used)
        yield self._event("message_stop")

    def _event(self, type_: str, **fields: Any) -> Event:
        return type_, {"type": type_, **fields}

    def _stop(self) -> tuple[str, str | None]:
        choice = self.choices[0]
        if choice.stop_reason is not None:
            return "stop_sequence", choice.stop_reason
        return ("max_tokens" if choice.finish_reason == "length" else "end_turn"), None

    def _message(self, content: list[Any], reason: str | None, sequence: str | None, made: int) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": {"input_tokens": self._prompt_tokens, "output_tokens": made},
        }


class Response(_Answer):
    """/v1/responses"""

    _number = -1

    def queued(self) -> dict[str, Any]:
        """What is there before it is begun."""
        return self._response("queued", [])

    def body(self) -> dict[str, Any]:
        return self._response("completed", [self._item("completed", self.choices[0].text)], self._used())

    def events(self, step: int) -> Iterator[Event]:
        if step == 0:
            yield self._event("response.created", response=self._response("in_progress", []))
            yield self._event("response.in_progress", response=self._response("in_progress", []))
            yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
            yield self._event("response.content_part.added", **self._place(), part=_part(""))
        token = self.choices[0].tokens[step]
        yield self._event("response.output_text.delta", **self._place(), delta=token, logprobs=[])

    def last_events(self, usage: bool) -> Iterator[Event]:
        text = self.choices[0].text
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._item("completed", text))
        yield self._event("response.completed", response=self.body())

    def _event(self, type_: str, **fields: Any) -> Event:
        self._number += 1
        return type_, {"type": type_, "sequence_number": self._number, **fields}

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": f"msg_{self._id}", "type": "message", "role": "assistant", "status": status, "content": content}

    def _used(self) -> dict[str, Any]:
        usage = self._usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        cut = status == "completed" and self.choices[0].finish_reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": "incomplete" if cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage,
        }


class Transcription(_Answer):
    """/v1/audio/transcriptions, and with another `task` /v1/audio/translations"""

    def __init__(self, id_: str, model: str, choice: Generation, *, task: str, seconds: int) -> None:
        super().__init__(id_, model, [choice], 0)
        self._object = f"{task}.chunk"
        self._used = {"usage": {"type": "duration", "seconds": seconds}} if task == "transcription" else {}

    def body(self) -> dict[str, Any]:
        return {"text": self.choices[0].text, **self._used}

    def events(self, step: int) -> Iterator[Event]:
        choice = self.choices[0]
        yield self._chunk(self._object, [{"delta": {"content": choice.tokens[step]}, **_finish(choice, step)}])

    def last_events(self, usage: bool) -> Iterator[Event]:
        yield from self._usage_events(self._object, usage)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
