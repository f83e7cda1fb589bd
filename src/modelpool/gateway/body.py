"""What routing needs of a body, without decoding the rest."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from modelpool.errors import InvalidRequest
from modelpool.relay.form import MalformedForm, fields


class _Body(msgspec.Struct):
    model: Annotated[str, msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET


class _Streaming(msgspec.Struct):
    stream: bool = False


_DECODER = msgspec.json.Decoder(_Body)
_STREAMING = msgspec.json.Decoder(_Streaming)
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
        raise _missing()
    return model


def asks_for_stream(body: bytes) -> bool:
    """Whether a JSON body says `"stream": true`. What it says otherwise is the engine's to judge."""
    try:
        return _STREAMING.decode(body).stream
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def model_of_form(content_type: bytes, body: bytes) -> str:
    """The `model` of a multipart/form-data body, wherever among its fields it stands. Raises InvalidRequest."""
    model = None
    try:
        for field in fields(content_type, body):
            if field.name != "model":
                continue
            if model is not None:
                raise InvalidRequest("`model` came more than once.", param="model")
            if field.filename is not None:
                raise InvalidRequest("`model` must be a text that names a model, got a file.", param="model")
            model = body[field.start : field.end].decode()
    except MalformedForm as error:
        raise InvalidRequest(f"The body must be multipart/form-data, but {error}.", code="invalid_form") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("`model` is not valid UTF-8.", param="model") from error
    if not model:
        raise _missing()
    return model


def _missing() -> InvalidRequest:
    return InvalidRequest("`model` is missing: name one of those that GET /v1/models lists.", param="model")


def _explain(error: msgspec.ValidationError) -> InvalidRequest:
    text = str(error)
    got = match[1] if (match := _GOT.search(text)) else "an empty string"
    if "$.model" in text:
        return InvalidRequest(f"`model` must be a string that names a model, got {got}.", param="model")
    return InvalidRequest(f"The body must be a JSON object, got {got}.")
