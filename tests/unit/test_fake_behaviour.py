"""A request's headers say it for that request only; else the model's registration does."""

from __future__ import annotations

from modelpool.engines.fake.behaviour import Behaviour, behaviour
from modelpool.messages.models import ModelSpec

MODEL = ModelSpec(
    alias="m", fake=True, fake_delay_ms=1, fake_token_ms=2, fake_crash_after_tokens=3, fake_stall_after_tokens=4
)


def test_without_headers_the_model_decides() -> None:
    assert behaviour(MODEL, []) == Behaviour(
        delay_ms=1, token_ms=2, crash_after_tokens=3, stall_after_tokens=4, tokens=None
    )


def test_each_header_replaces_its_setting() -> None:
    headers = [
        (b"x-fake-delay-ms", b"10.5"),
        (b"x-fake-token-ms", b"20"),
        (b"x-fake-crash-after-tokens", b"30"),
        (b"x-fake-stall-after-tokens", b"40"),
        (b"x-fake-tokens", b"50"),
        (b"x-other", b"nonsense"),
    ]
    assert behaviour(MODEL, headers) == Behaviour(
        delay_ms=10.5, token_ms=20, crash_after_tokens=30, stall_after_tokens=40, tokens=50
    )
