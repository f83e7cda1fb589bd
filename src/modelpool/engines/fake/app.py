"""The fake engine's HTTP surface: vLLM's routes, its answers, and its errors."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from modelpool.engines.engine import Receive, Scope, Send
from modelpool.engines.fake import answers, pooling
from modelpool.engines.fake.behaviour import Behaviour, InvalidHeader, behaviour
from modelpool.engines.fake.exchange import (
    ClientLeft,
    Exchange,
    Refused,
    bad_request,
    read_body,
    unless_client_leaves,
)
from modelpool.engines.fake.realtime import Realtime
from modelpool.engines.fake.requests import (
    AudioRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    InputRequest,
    MessagesRequest,
    RerankRequest,
    ResponsesRequest,
    ScoreRequest,
    TokenizeRequest,
)
from modelpool.engines.fake.stored import Stored
from modelpool.engines.fake.text import Generation, detokenized, generation, token_id, tokens
from modelpool.errors import InvalidBody, InvalidRequest

if TYPE_CHECKING:
    from modelpool.engines.fake.engine import FakeEngine

Handler = Callable[[Exchange], Awaitable[None]]
P = TypeVar("P", EmbeddingRequest, InputRequest, ScoreRequest, RerankRequest)

# vLLM's default for plain completions.
_COMPLETION_TOKENS = 16
_STORED_RESPONSE = re.compile(r"^/v1/responses/[^/]+(/cancel)?$")
# As if all sound were PCM of 16 bits and 16 kHz.
_SOUND_BYTES_PER_S = 32_000


class FakeApp:
    """An ASGI app over a FakeEngine."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._model = engine.model
        self._created = int(time.time())
        self._stored = Stored()
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/responses": {"POST": self._response},
            "/v1/responses/{id}": {"GET": self._retrieve},
            "/v1/responses/{id}/cancel": {"POST": self._cancel},
            "/v1/messages": {"POST": self._message},
            "/v1/messages/count_tokens": {"POST": self._count_tokens},
            "/v1/embeddings": {"POST": self._pooling(EmbeddingRequest, pooling.embeddings)},
            "/pooling": {"POST": self._pooling(InputRequest, pooling.pooled)},
            "/classify": {"POST": self._pooling(InputRequest, pooling.classified)},
            "/v1/audio/transcriptions": {"POST": partial(self._audio, "transcription")},
            "/v1/audio/translations": {"POST": partial(self._audio, "translation")},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
        }
        for path in ("/score", "/v1/score"):
            self._routes[path] = {"POST": self._pooling(ScoreRequest, pooling.scored)}
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            self._routes[path] = {"POST": self._pooling(RerankRequest, pooling.reranked)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            await self._stored.close()
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            try:
                exchange = Exchange(scope, await read_body(receive), send)
            except ClientLeft:
                return
            await unless_client_leaves(self._serve(exchange), receive)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/v1/realtime":
            await send({"type": "websocket.close", "code": 1000})
            return
        how = behaviour(self._model, scope["headers"])

        def say(heard: int) -> tuple[Generation, AsyncGenerator[int, None]]:
            said = self._heard(heard, how)
            return said, self._engine.generate(len(said.tokens), how)

        await Realtime(receive, send, alias=self._model.alias, say=say).serve()

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)(exchange)
        except Refused as error:
            await exchange.refuse(error)
        except (InvalidRequest, InvalidBody) as error:
            await exchange.refuse(bad_request(error.message, error.param))
        except InvalidHeader as error:
            await exchange.refuse(bad_request(str(error)))

    def _route(self, exchange: Exchange) -> Handler:
        path = exchange.scope["path"]
        methods = self._routes.get(_STORED_RESPONSE.sub(r"/v1/responses/{id}\1", path))
        if methods is None:
            raise Refused(404, "Not Found", "Not Found")
        if (handler := methods.get(exchange.scope["method"])) is None:
            raise Refused(405, "Method Not Allowed", "Method Not Allowed")
        return handler

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.alias:
            raise Refused(404, "NotFoundError", f"The model `{name}` does not exist.", "model")

    def _behaviour(self, exchange: Exchange) -> Behaviour:
        return behaviour(self._model, exchange.scope["headers"])

    def _budget(self, prompt_tokens: int, asked: int | None) -> int:
        """How many tokens may be generated. Raises Refused where prompt and answer exceed the context."""
        limit = self._engine.facts.max_model_len or 0
        if prompt_tokens + (asked or 1) > limit:
            raise bad_request(
                f"This model's maximum context length is {limit} tokens. However, you requested {asked or 1} output "
                f"tokens and your prompt contains {prompt_tokens} input tokens.",
                "input_tokens",
            )
        return asked or limit - prompt_tokens

    def _said(self, prompt: str) -> str:
        return f"You said: {prompt}" if self._model.fake_response is None else self._model.fake_response

    async def _chat(self, exchange: Exchange) -> None:
        request = exchange.decoded(ChatRequest)
        self._check_model(request.model)
        if not request.messages:
            raise bad_request("`messages` must not be empty.", "messages")
        how = self._behaviour(exchange)
        prompt_tokens = _chat_tokens(request.messages)
        made = generation(
            self._said(request.messages[-1].text),
            max_tokens=self._budget(prompt_tokens, request.max_completion_tokens or request.max_tokens),
            exactly=how.tokens,
            ignore_eos=request.ignore_eos,
            stop=request.stops,
        )
        answer = answers.Chat(
            f"chatcmpl-{uuid.uuid4().hex}", self._model.alias, [made] * (request.n or 1), prompt_tokens
        )
        await self._answer(exchange, answer, how, bool(request.stream), _wants_usage(request))

    async def _completion(self, exchange: Exchange) -> None:
        request = exchange.decoded(CompletionRequest)
        self._check_model(request.model)
        how = self._behaviour(exchange)
        prompts = pooling.prompts(request.prompt, "prompt")
        made, prompt_tokens = [], 0
        for prompt in prompts:
            prompt_tokens += (count := len(tokens(prompt)))
            made += [
                generation(
                    self._said(prompt),
                    max_tokens=self._budget(count, request.max_tokens or _COMPLETION_TOKENS),
                    exactly=how.tokens,
                    ignore_eos=request.ignore_eos,
                    stop=request.stops,
                )
            ] * (request.n or 1)
        answer = answers.Completion(f"cmpl-{uuid.uuid4().hex}", self._model.alias, made, prompt_tokens)
        await self._answer(exchange, answer, how, bool(request.stream), _wants_usage(request))

    async def _response(self, exchange: Exchange) -> None:
        request = exchange.decoded(ResponsesRequest)
        self._check_model(request.model)
        messages = request.messages
        if not messages:
            raise bad_request("`input` must hold a message.", "input")
        if request.previous_response_id is not None:
            said = self._stored.body(request.previous_response_id)["output"]
            messages = [*(ChatMessage(role="assistant", content=each["content"]) for each in said), *messages]
        how = self._behaviour(exchange)
        prompt_tokens = _chat_tokens(messages)
        budget = self._budget(prompt_tokens, request.max_output_tokens)
        made = generation(self._said(messages[-1].text), max_tokens=budget, exactly=how.tokens)
        answer = answers.Response(f"resp_{uuid.uuid4().hex}", self._model.alias, [made], prompt_tokens)
        if request.background:
            await self._respond_later(exchange, request, answer, how)
            return

        def keep() -> None:
            if request.store:
                self._stored.keep(answer.body())

        await self._answer(exchange, answer, how, bool(request.stream), usage=True, made=keep)

    async def _respond_later(
        self, exchange: Exchange, request: ResponsesRequest, answer: answers.Response, how: Behaviour
    ) -> None:
        if not request.store:
            raise bad_request("background can only be used when `store` is true", "background")
        if request.stream:
            raise bad_request("This engine does not stream what it makes in the background.", "stream")

        async def make() -> dict[str, Any]:
            async with aclosing(self._engine.generate(len(answer.choices[0].tokens), how)) as steps:
                async for _ in steps:
                    pass
            return answer.body()

        queued = answer.queued()
        self._stored.begin(queued, make())
        await exchange.json(queued)

    async def _retrieve(self, exchange: Exchange) -> None:
        await exchange.json(self._stored.body(exchange.scope["path"].split("/")[3]))

    async def _cancel(self, exchange: Exchange) -> None:
        await exchange.json(self._stored.cancel(exchange.scope["path"].split("/")[3]))

    async def _answer(
        self,
        exchange: Exchange,
        answer: answers.Answer,
        how: Behaviour,
        stream: bool,
        usage: bool,
        made: Callable[[], None] = lambda: None,
    ) -> None:
        """Generate all choices side by side, token by token, as one sequence in one slot. `made`: all is generated."""
        longest = max(len(choice.tokens) for choice in answer.choices)
        async with aclosing(self._engine.generate(longest, how)) as steps:
            async for step in steps:
                if stream:
                    for name, event in answer.events(step):
                        await exchange.event(event, name)
        made()
        if not stream:
            await exchange.json(answer.body())
            return
        for name, event in answer.last_events(usage):
            await exchange.event(event, name)
        await exchange.end_events()

    async def _audio(self, task: str, exchange: Exchange) -> None:
        """It hears how much there is to hear, or says what it was told to say."""
        request, files = exchange.form(AudioRequest)
        self._check_model(request.model)
        if (heard := files.get("file")) is None:
            raise bad_request("`file` is missing.", "file")
        how = self._behaviour(exchange)
        made = self._heard(len(heard), how)
        id_ = f"{'trsc' if task == 'transcription' else 'trsl'}-{uuid.uuid4().hex}"
        seconds = len(heard) // _SOUND_BYTES_PER_S + 1
        answer = answers.Transcription(id_, self._model.alias, made, task=task, seconds=seconds)
        await self._answer(exchange, answer, how, request.stream, request.stream_include_usage)

    def _heard(self, size: int, how: Behaviour) -> Generation:
        said = self._model.fake_response or f"You sent {size} bytes of sound."
        return generation(said, max_tokens=self._budget(0, None), exactly=how.tokens)

    async def _message(self, exchange: Exchange) -> None:
        request = exchange.decoded(MessagesRequest)
        self._check_model(request.model)
        if not request.messages:
            raise bad_request("`messages` must not be empty.", "messages")
        how = self._behaviour(exchange)
        prompt_tokens = _chat_tokens(request.all_messages)
        made = generation(
            self._said(request.messages[-1].text),
            max_tokens=self._budget(prompt_tokens, request.max_tokens),
            exactly=how.tokens,
            stop=request.stop_sequences or (),
        )
        answer = answers.Message(f"chatcmpl-{uuid.uuid4().hex}", self._model.alias, [made], prompt_tokens)
        await self._answer(exchange, answer, how, bool(request.stream), usage=True)

    async def _count_tokens(self, exchange: Exchange) -> None:
        request = exchange.decoded(CountTokensRequest)
        self._check_model(request.model)
        await exchange.json({"input_tokens": _chat_tokens(request.messages)})

    def _pooling(self, type_: type[P], answer: Callable[[str, P], dict[str, Any]]) -> Handler:
        """A route of which all takes one step."""

        async def handle(exchange: Exchange) -> None:
            request = exchange.decoded(type_)
            self._check_model(request.model)
            body = answer(self._model.alias, request)
            async with aclosing(self._engine.generate(1, self._behaviour(exchange))) as steps:
                async for _ in steps:
                    pass
            await exchange.json(body)

        return handle

    async def _tokenize(self, exchange: Exchange) -> None:
        request = exchange.decoded(TokenizeRequest)
        self._check_model(request.model)
        if request.prompt is None and request.messages is None:
            raise bad_request("Give `prompt` or `messages`.", "prompt")
        text = _chat_text(request.messages) if request.messages is not None else request.prompt or ""
        ids = [token_id(token) for token in tokens(text)]
        limit = self._engine.facts.max_model_len
        await exchange.json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None})

    async def _detokenize(self, exchange: Exchange) -> None:
        request = exchange.decoded(DetokenizeRequest)
        self._check_model(request.model)
        await exchange.json({"prompt": detokenized(request.tokens)})

    async def _models(self, exchange: Exchange) -> None:
        card = {
            "id": self._model.alias,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": self._model.model_name or self._model.alias,
            "parent": None,
            "max_model_len": self._engine.facts.max_model_len,
        }
        await exchange.json({"object": "list", "data": [card]})

    async def _health(self, exchange: Exchange) -> None:
        await exchange.text("")

    async def _metrics(self, exchange: Exchange) -> None:
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "kv_cache_usage_perc": stats.kv_cache_usage,
        }
        lines = [
            f'# TYPE vllm:{name} gauge\nvllm:{name}{{engine="0",model_name="{self._model.alias}"}} {value}\n'
            for name, value in gauges.items()
        ]
        await exchange.text("".join(lines), b"text/plain; version=0.0.4; charset=utf-8")


def _wants_usage(request: ChatRequest | CompletionRequest) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def _chat_text(messages: list[ChatMessage]) -> str:
    return "".join(f"{message.role}: {message.text}\n" for message in messages)


def _chat_tokens(messages: list[ChatMessage]) -> int:
    return len(tokens(_chat_text(messages)))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
