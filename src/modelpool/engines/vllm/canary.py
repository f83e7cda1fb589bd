"""Asks vLLM's engine, past its HTTP app, what the model makes of the canary's prompt."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from modelpool.engines.canary import Position, Reading, prompt_ids

_GENERATED = 2
"""The first token comes of the prompt, the second reads the KV cache too."""

T = TypeVar("T")


async def read(llm: AsyncLLM, tasks: Sequence[str], adapter: LoRARequest | None = None) -> Reading:
    """What the model makes of the prompt, with an adapter or without. Raises whatever vLLM raises."""
    config = llm.model_config
    longest = config.max_model_len - _GENERATED
    prompt: Any = {"prompt_token_ids": prompt_ids(config.get_vocab_size(), longest)}
    request = f"canary-{uuid.uuid4().hex}"
    if "generate" in tasks:
        asked = SamplingParams(
            temperature=0.0,
            max_tokens=_GENERATED,
            ignore_eos=True,
            prompt_logprobs=2,
            logprobs=2,
            detokenize=False,
        )
        return _generated(await _last(llm.generate(prompt, asked, request, lora_request=adapter)))
    pooled = await _last(llm.encode(prompt, PoolingParams(task=tasks[0]), request, lora_request=adapter))
    return Reading(vector=tuple(float(number) for number in pooled.outputs.data.float().flatten().tolist()))


async def _last(outputs: AsyncGenerator[T, None]) -> T:
    *_, last = [output async for output in outputs]
    return last


def _generated(output: Any) -> Reading:
    # The first token of the prompt has none: nothing stands before it.
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    answer = output.outputs[0]
    made = zip(answer.token_ids, answer.logprobs, strict=True)
    return Reading(
        prompt=tuple(_position(token, likeliest) for token, likeliest in prompt),
        generated=tuple(_position(token, likeliest) for token, likeliest in made),
    )


def _position(given: int, logprobs: dict[int, Any]) -> Position:
    by_rank = sorted(logprobs.items(), key=lambda each: each[1].rank)
    (token, first), (_, second) = by_rank[:2]
    return Position(
        token=token,
        logprob=first.logprob,
        lead=first.logprob - second.logprob,
        given=logprobs[given].logprob,
    )
