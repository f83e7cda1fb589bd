"""The OpenAPI document says what a gateway serves: no more, no less."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpool.errors import PoolError
from modelpool.gateway.routes import INFERENCE, match
from tests.contract.test_keys import running_pool


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("pool")

    async def read() -> Any:
        async with running_pool(folder) as pool:
            return (await pool.http.get("/openapi.json")).json()

    return asyncio.run(read())


def operations(document: Any) -> set[tuple[bytes, str]]:
    return {(method.upper().encode(), path) for path, operations in document["paths"].items() for method in operations}


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def test_all_that_it_names_is_routed_and_nothing_else_of_these_paths(document: Any) -> None:
    listed = operations(document)
    for path in {path for _, path in listed}:
        for method in (b"GET", b"POST", b"PUT", b"DELETE"):
            # Of what the manager has the gateway passes any method on. A model may have the name `register`.
            may_be_more = path.startswith(("/admin", "/workers")) or (method, path) == (b"GET", "/v1/models/register")
            routed = is_routed(method, re.sub("{.*?}", "x", path).encode())
            assert routed == ((method, path) in listed) or (routed and may_be_more), (method, path)


def is_routed(method: bytes, path: bytes) -> bool:
    try:
        match(method, path)
    except PoolError:
        return False
    return True


def test_it_names_all_that_engines_serve_for_clients(document: Any) -> None:
    assert {(b"POST", route.path.decode()) for route in INFERENCE.values()} <= operations(document)


def lead_somewhere(document: Any) -> set[str]:
    """All references in a document. Raises KeyError for one that leads nowhere."""
    found = set(references(document))
    for reference in found:
        at = document
        for name in reference.removeprefix("#/").split("/"):
            at = at[name]
    return found


def test_its_references_lead_somewhere(document: Any) -> None:
    found = lead_somewhere(document)
    assert "#/components/schemas/Error" in found
    assert len(found) > 3
