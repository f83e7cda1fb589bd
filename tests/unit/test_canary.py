"""The canary tells a damaged model from a sound one, whose numbers are never quite the same twice."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.engines.canary import (
    FLOOR,
    MARGIN,
    PROMPT_TOKENS,
    Position,
    Reading,
    Unsteady,
    baseline,
    damage,
    distance,
    prompt_ids,
)


def position(token: int = 1, logprob: float = -1.0, lead: float = 2.0, given: float = -3.0) -> Position:
    return Position(token=token, logprob=logprob, lead=lead, given=given)


SOUND = Reading(prompt=(position(), position(2), position(3)), generated=(position(4), position(5)))


def changed(reading: Reading, place: int, **fields: float) -> Reading:
    prompt = list(reading.prompt)
    prompt[place] = replace(prompt[place], **fields)
    return replace(reading, prompt=tuple(prompt))


def found(first: Reading, second: Reading, after: Reading) -> str:
    return damage({"": baseline(first, second)}, {"": after})


def test_the_same_reading_again_is_sound() -> None:
    assert found(SOUND, SOUND, SOUND) == ""


@given(st.floats(-FLOOR * 0.99, FLOOR * 0.99))
def test_what_lies_within_the_floor_is_sound(by: float) -> None:
    assert found(SOUND, SOUND, changed(SOUND, 1, logprob=-1.0 + by, given=-3.0 - by)) == ""


@pytest.mark.parametrize("field", ["logprob", "given"])
@pytest.mark.parametrize("by", [2 * FLOOR, -2 * FLOOR, 5, math.nan, math.inf])
def test_one_number_that_is_off_is_damage(field: str, by: float) -> None:
    says = found(SOUND, SOUND, changed(SOUND, 2, **{field: getattr(SOUND.prompt[2], field) + by}))
    assert says.startswith("the model is not what it was: a log probability differs by ")


def test_a_model_whose_own_numbers_scatter_may_scatter_as_far_again_but_not_much_farther() -> None:
    scattered = changed(SOUND, 0, logprob=-1.1)
    assert found(SOUND, scattered, changed(SOUND, 0, logprob=-1.0 + 0.9 * MARGIN * 0.1)) == ""
    assert found(SOUND, scattered, changed(SOUND, 0, logprob=-1.0 + 1.1 * MARGIN * 0.1)) != ""


def test_another_likeliest_token_is_damage_unless_the_two_were_as_likely_as_each_other() -> None:
    assert "its likeliest token was 2 somewhere and is 9" in found(SOUND, SOUND, changed(SOUND, 1, token=9))
    close = changed(SOUND, 1, lead=FLOOR)
    assert found(close, close, changed(close, 1, token=9)) == ""


def test_what_is_generated_counts_as_long_as_the_text_before_is_the_same() -> None:
    another = replace(SOUND, generated=(position(4), position(5, logprob=-2.0)))
    assert found(SOUND, SOUND, another) != ""
    close = replace(SOUND, generated=(position(4, lead=0.0), position(5)))
    parted = replace(SOUND, generated=(position(6, lead=0.0), position(7, logprob=-2.0)))
    assert found(close, close, parted) == ""


def test_embeddings_are_compared_by_their_angle() -> None:
    vector = Reading(vector=(3.0, 4.0))
    assert found(vector, vector, Reading(vector=(6.0, 8.0))) == ""
    for other in ((4.0, 3.0), (0.0, 0.0), (math.nan, 1.0), (3.0, 4.0, 0.0), ()):
        assert "embedding" in found(vector, vector, Reading(vector=other)), other


def test_every_adapter_is_compared_and_one_that_is_gone_is_damage() -> None:
    sound = {"": baseline(SOUND, SOUND), "ad": baseline(SOUND, SOUND)}
    assert damage(sound, {"": SOUND, "ad": SOUND, "new": Reading()}) == ""
    assert damage(sound, {"": SOUND}) == "the adapter 'ad' is gone"
    wrong = damage(sound, {"": SOUND, "ad": changed(SOUND, 0, token=7)})
    assert wrong.startswith("the adapter 'ad' is not what it was")


@pytest.mark.parametrize(
    "second", [Reading(), changed(SOUND, 0, given=math.nan), replace(SOUND, prompt=SOUND.prompt[1:])]
)
def test_a_model_that_cannot_be_told_from_a_damaged_one_has_no_baseline(second: Reading) -> None:
    with pytest.raises(Unsteady):
        baseline(SOUND, second)
    with pytest.raises(Unsteady):
        baseline(Reading(), Reading())


def test_tokens_that_can_never_be_are_as_far_apart_as_two_equal_numbers() -> None:
    never = changed(SOUND, 0, given=-math.inf)
    assert distance(never, never) == 0
    assert distance(never, SOUND) == math.inf


@given(st.integers(1, 300_000), st.integers(-5, 64))
def test_the_prompt_fits_every_vocabulary_and_context(vocabulary: int, longest: int) -> None:
    ids = prompt_ids(vocabulary, longest)
    assert len(ids) == max(1, min(longest, PROMPT_TOKENS))
    assert all(0 <= each < vocabulary for each in ids)
    assert ids == prompt_ids(vocabulary, longest)


def test_the_prompt_is_not_one_token_again_and_again() -> None:
    assert len(set(prompt_ids(4096))) == PROMPT_TOKENS
