"""Which URLs a worker may name as its own."""

from __future__ import annotations

import pytest

from modelpool.worker_url import is_worker_url


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1:7000", "http://jump.example", "http://[::1]:7000/w1", "http://xn--bcher-kva.example:80"],
)
def test_a_worker_is_reached_by_http_at_a_host(url: str) -> None:
    assert is_worker_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "here",
        "https://jump:7000",
        "unix:/run/worker.sock",
        "http://:7000",
        "http://10.0.0.1:70000",
        "http://10.0.0.1:-1",
        "http://10.0.0.1:7_000",
        "http://jump:${PORT}",
        "http://[::1",
        "http://xn--a",
        "http://日本:7000",
        "http://jump:",
        "http://jump:7000?a",
        "http://jump:7000/#a",
        "http://jump host:7000",
        "http://jump:7000/\0",
        "http://jump:7000/" + 70_000 * "a",
    ],
)
def test_what_cannot_be_asked_for_is_no_url_of_a_worker(url: str) -> None:
    assert not is_worker_url(url)
