"""From a model as registered to vLLM's own parsed arguments."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from modelpool.engines.engine import LoadError
from modelpool.messages.models import OWNED_ENGINE_ARGS, ModelSpec

# Arguments of `vllm serve` that have no meaning in a host: other files of settings, other processes, other servers.
_NOT_HOSTED = frozenset(
    {"config", "headless", "api_server_count", "grpc", "grpc_port", "enable_ssl_refresh", "data_parallel_backend"}
)

_AT_ARGUMENT = re.compile(r"argument (--[\w.-]+)[^:]*: (?P<problem>.*)", re.DOTALL)


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, but an error is raised instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        at = _AT_ARGUMENT.match(message)
        if at is None:
            raise LoadError(f"engine_args: {message}", permanent=True)
        raise LoadError(f"engine_args.{at[1].lstrip('-').replace('-', '_')}: {at['problem']}", permanent=True)


@cache
def new_parser() -> FlexibleArgumentParser:
    """Made once, in the forkserver: it takes longer to make than to use."""
    return make_arg_parser(_Parser(prog="engine_args"))


def parsed(model: ModelSpec, model_path: str, memory: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's arguments for a model. `memory` holds those that the pool decides, by name.

    Raises LoadError, naming the argument, for one that vLLM does not have or a value that it does not take.
    """
    parser = new_parser()
    given = {name.replace("-", "_"): value for name, value in model.engine_args.items()}
    own = {
        "model": model_path,
        "served_model_name": [model.alias],
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": model.tensor_parallel_size,
        "trust_remote_code": model.trust_remote_code or None,
        **memory,
    }
    _check_names(parser, given)
    arguments = [argument for name, value in (own | given).items() for argument in rendered(parser, name, value)]
    namespace: argparse.Namespace = parser.parse_args(arguments)
    try:
        validate_parsed_serve_args(namespace)
        validate_api_server_args(namespace)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"engine_args: {error.args[0] if error.args else error}", permanent=True) from error
    return namespace


def _check_names(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    known = {option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")}
    for name in names:
        head = name.partition(".")[0]
        if head in _NOT_HOSTED or head in OWNED_ENGINE_ARGS:
            raise LoadError(f"engine_args.{name}: not for an engine that a pool hosts", permanent=True)
        if head not in known:
            nearest = difflib.get_close_matches(head, known, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise LoadError(f"engine_args.{name}: vLLM has no such argument{hint}", permanent=True)


def rendered(parser: argparse.ArgumentParser, name: str, value: Any) -> list[str]:
    """One argument as the command line has it. None means vLLM's default."""
    option = "--" + name.replace("_", "-")
    action = parser._option_string_actions.get(option)
    if value is None:
        return []
    if isinstance(value, bool) and (action is None or action.nargs == 0):
        return _flag(parser, option, value)
    if isinstance(value, list) and action is not None and action.nargs in ("+", "*"):
        return [option, *(_text(item) for item in value)]
    if isinstance(value, list) and isinstance(action, argparse._AppendAction):
        return [f"{option}={_text(item)}" for item in value]
    return [f"{option}={_text(value)}"]


def _flag(parser: argparse.ArgumentParser, option: str, value: bool) -> list[str]:
    if value:
        return [option]
    # A flag that can only be switched on is off already.
    negative = f"--no-{option[2:]}"
    return [negative] if negative in parser._option_string_actions else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
