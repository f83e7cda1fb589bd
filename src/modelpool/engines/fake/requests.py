"""The bodies that the fake engine understands. Fields it has no use for are let through, as vLLM does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Prompt = str | list[Any]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = 1
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content if isinstance(part.get("text"), str))
        return self.content or ""


class ChatRequest(Sampling, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    prompt: Prompt


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    input: Prompt
    model: str | None = None
    dimensions: Annotated[int, Meta(ge=1, le=4096)] | None = None
    encoding_format: str = "float"


class InputRequest(msgspec.Struct, frozen=True, kw_only=True):
    input: Prompt
    model: str | None = None


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The texts have three pairs of names."""

    model: str | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True):
    query: str
    documents: str | list[str]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0)] = 0


class MessagesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Anthropic's."""

    model: str
    messages: list[ChatMessage]
    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    system: str | list[dict[str, Any]] | None = None

    @property
    def all_messages(self) -> list[ChatMessage]:
        head = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*head, *self.messages]


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    messages: list[ChatMessage]


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    store: bool | None = True
    background: bool | None = False
    previous_response_id: str | None = None

    @property
    def messages(self) -> list[ChatMessage]:
        head = [ChatMessage(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, ChatMessage(role="user", content=self.input)]
        return [*head, *msgspec.convert([item for item in self.input if "role" in item], list[ChatMessage])]


class AudioRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a form, but for `file`."""

    model: str | None = None
    language: str | None = None
    response_format: Literal["json", "text"] = "json"
    stream: bool = False
    stream_include_usage: bool = False


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[Annotated[int, Meta(ge=0)]]
    model: str | None = None
