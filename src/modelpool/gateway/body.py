"""What routing needs of a body, without decoding the rest."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from modelpool.errors import InvalidRequest


class _Body(msgspec.Struct):
    model: Annotated[str, msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET


_DECODER = msgspec.json.Decoder(_Body)
_GOT = re.compile(r"got `(\w+)`")


def model_of(body: bytes) -> str:
    """The `model` of a JSON body. Raises InvalidRequest.

    Everything else is skipped, but must be JSON: what it means is the engine's to judge.
    """
    if not body:
        raise InvalidRequest("The body is empty; it must be a JSON object with `model`.", code="invalid_json")
    try:
        model = _DECODER.decode(body).model
    except msgspec.ValidationError as error:
        raise _explain(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if isinstance(model, msgspec.UnsetType):
        raise InvalidRequest("`model` is missing: name one of those that GET /v1/models lists.", param="model")
    return model


def _explain(error: msgspec.ValidationError) -> InvalidRequest:
    text = str(error)
    got = match[1] if (match := _GOT.search(text)) else "an empty string"
    if "$.model" in text:
        return InvalidRequest(f"`model` must be a string that names a model, got {got}.", param="model")
    return InvalidRequest(f"The body must be a JSON object, got {got}.")
