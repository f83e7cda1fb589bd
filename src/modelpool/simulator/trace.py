"""Arrivals: in our own form, in those of others, or made up.

Our own form is CSV with a head line. `time` and `model` are needed; seconds; an empty field is not known:

    time,model,status,wait_s,first_byte_s,service_s,tokens_in,tokens_out

`wait_s`: in the gateway; `service_s`: from when it was sent to an instance to the end of its answer, of which
`first_byte_s` passed before its first byte.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec

T = TypeVar("T")

COLUMNS = ("time", "model", "status", "wait_s", "first_byte_s", "service_s", "tokens_in", "tokens_out")


class TraceError(Exception):
    """A trace that cannot be read. The message names file, line and what is wrong."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request. `time`: seconds since the trace began. None: not known."""

    time: float
    model: str = ""
    status: int | None = None
    wait_s: float | None = None
    first_byte_s: float | None = None
    service_s: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


class _Azure(msgspec.Struct, frozen=True):
    """AzurePublicDataset, AzureLLMInferenceTrace."""

    TIMESTAMP: str
    ContextTokens: int
    GeneratedTokens: int


class _Mooncake(msgspec.Struct, frozen=True):
    """Mooncake's traces: milliseconds."""

    timestamp: float
    input_length: int
    output_length: int


def read_trace(path: Path) -> list[Arrival]:
    """In the order of time, which begins at 0. What form it has is seen from its first line. Raises TraceError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            first = file.readline()
            file.seek(0)
            arrivals = list(_read(path, first, file))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not arrivals:
        raise TraceError(f"{path}: there is no request in it")
    arrivals.sort(key=lambda each: each.time)
    begun = arrivals[0].time
    return [msgspec.structs.replace(each, time=each.time - begun) for each in arrivals] if begun else arrivals


def write_trace(file: TextIO, arrivals: Iterable[Arrival]) -> None:
    file.write(",".join(COLUMNS) + "\n")
    write_rows(file, arrivals)


def write_rows(file: TextIO, arrivals: Iterable[Arrival]) -> None:
    """More of them."""
    rows = csv.writer(file, lineterminator="\n")
    for each in arrivals:
        values = (getattr(each, name) for name in COLUMNS)
        rows.writerow(round(value, 6) if isinstance(value, float) else value for value in values)


def spread(arrivals: Sequence[Arrival], models: int, *, skew: float = 1.0, seed: int = 0) -> list[Arrival]:
    """Over `model-1`, `model-2`, … by a Zipf law: the k-th is asked for in proportion to 1 / k^skew."""
    names = model_names(models)
    chosen = random.Random(seed).choices(names, weights=zipf(models, skew), k=len(arrivals))
    return [msgspec.structs.replace(each, model=name) for each, name in zip(arrivals, chosen, strict=True)]


def generate(
    *,
    models: int,
    seconds: float,
    rate: float,
    skew: float = 1.0,
    daily: float = 0.0,
    day_s: float = 86400.0,
    seed: int = 0,
) -> list[Arrival]:
    """Arrivals of a Poisson process of `rate` a second, over models by a Zipf law.

    `daily`, 0 to 1: how far the rate swings around its mean within `day_s`, from its least at the beginning.
    """
    draw = random.Random(seed)
    times: list[float] = []
    now, most = 0.0, rate * (1 + daily)
    while (now := now + draw.expovariate(most)) < seconds:
        if draw.random() * most < rate * (1 - daily * math.cos(2 * math.pi * now / day_s)):
            times.append(now)
    return spread([Arrival(time=time) for time in times], models, skew=skew, seed=seed + 1)


def model_names(models: int) -> list[str]:
    return [f"model-{number}" for number in range(1, models + 1)]


def zipf(models: int, skew: float) -> list[float]:
    return [1 / number**skew for number in range(1, models + 1)]


def _read(path: Path, first: str, file: TextIO) -> Iterator[Arrival]:
    if first.startswith("{"):
        yield from _read_mooncake(path, file)
        return
    if not first:
        return
    rows = csv.DictReader(file)
    names = set(rows.fieldnames or ())
    if names == set(_Azure.__struct_fields__):
        yield from _read_azure(path, rows)
    elif {"time", "model"} <= names <= set(COLUMNS):
        yield from _read_own(path, rows)
    else:
        raise TraceError(
            f"{path}: its head is {first.strip()[:200]!r}; it must have `time` and `model`, may have "
            f"{', '.join(COLUMNS[2:])}, or be that of a trace of Azure's or Mooncake's"
        )


def _read_own(path: Path, rows: csv.DictReader[str]) -> Iterator[Arrival]:
    for number, row in enumerate(rows, start=2):
        known = {name: value for name, value in row.items() if value}
        yield _converted(path, number, known, Arrival)


def _read_azure(path: Path, rows: csv.DictReader[str]) -> Iterator[Arrival]:
    for number, row in enumerate(rows, start=2):
        each = _converted(path, number, row, _Azure)
        try:
            at = datetime.fromisoformat(each.TIMESTAMP[:26]).replace(tzinfo=UTC).timestamp()
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: TIMESTAMP={each.TIMESTAMP!r}: {error}") from error
        yield Arrival(time=at, tokens_in=each.ContextTokens, tokens_out=each.GeneratedTokens)


def _read_mooncake(path: Path, file: TextIO) -> Iterator[Arrival]:
    for number, line in enumerate(file, start=1):
        try:
            each = msgspec.json.decode(line, type=_Mooncake)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}, line {number}: {error}") from error
        yield Arrival(time=each.timestamp / 1000, tokens_in=each.input_length, tokens_out=each.output_length)


def _converted(path: Path, number: int, row: dict[str, str], type_: type[T]) -> T:
    try:
        return msgspec.convert(row, type_, strict=False)
    except msgspec.ValidationError as error:
        raise TraceError(f"{path}, line {number}: {error}") from error
