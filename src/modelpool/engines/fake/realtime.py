"""The fake engine's `/v1/realtime`: vLLM's events, over ASGI. It hears how much there is to hear."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from modelpool.engines.engine import Receive, Send
from modelpool.engines.fake.text import Generation

Say = Callable[[int], tuple[Generation, AsyncGenerator[int, None]]]
"""For so many bytes of sound: what is said, and the steps in which it is generated."""


class Realtime:
    """One session. It transcribes what came between a commit and the final commit."""

    def __init__(self, receive: Receive, send: Send, *, alias: str, say: Say) -> None:
        self._receive = receive
        self._send = send
        self._alias = alias
        self._say = say
        self._model_known = False
        self._heard = 0
        self._complete = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Until the client leaves."""
        await self._receive()  # websocket.connect
        await self._send({"type": "websocket.accept"})
        await self._event(type="session.created", id=f"sess-{uuid.uuid4().hex}", created=int(time.time()))
        try:
            while (message := await self._receive())["type"] == "websocket.receive":
                await self._take(message.get("text") or "")
        finally:
            if self._making is not None:
                self._making.cancel()
                await asyncio.gather(self._making, return_exceptions=True)

    async def _take(self, text: str) -> None:
        try:
            event = msgspec.json.decode(text)
        except msgspec.DecodeError:
            await self._error("Invalid JSON", "invalid_json")
            return
        match event:
            case {"type": "session.update", "model": str(model)}:
                self._model_known = model == self._alias
                if not self._model_known:
                    await self._error(f"The model `{model}` does not exist.", "model_not_found")
            case {"type": "session.update"}:
                await self._error("Missing required field: model", "invalid_event")
            case {"type": "input_audio_buffer.append", "audio": str(audio)}:
                await self._hear(audio)
            case {"type": "input_audio_buffer.commit"} if not self._model_known:
                await self._error("Model not validated.", "model_not_validated")
            case {"type": "input_audio_buffer.commit", "final": True}:
                self._complete.set()
            case {"type": "input_audio_buffer.commit"}:
                if self._making is None or self._making.done():
                    self._complete.clear()
                    self._making = asyncio.create_task(self._transcribe())
            case _:
                await self._error("Unknown event type", "unknown_event")

    async def _hear(self, audio: str) -> None:
        try:
            self._heard += len(base64.b64decode(audio, validate=True))
        except binascii.Error:
            await self._error("Invalid audio data", "invalid_audio")

    async def _transcribe(self) -> None:
        await self._complete.wait()
        said, steps = self._say(self._heard)
        self._heard = 0
        async with aclosing(steps):
            async for step in steps:
                await self._event(type="transcription.delta", delta=said.tokens[step])
        made = len(said.tokens)
        usage = {"prompt_tokens": 0, "total_tokens": made, "completion_tokens": made, "prompt_tokens_details": None}
        await self._event(type="transcription.done", text=said.text, usage=usage)

    async def _error(self, text: str, code: str) -> None:
        await self._event(type="error", error=text, code=code)

    async def _event(self, **fields: Any) -> None:
        await self._send({"type": "websocket.send", "text": msgspec.json.encode(fields).decode()})
