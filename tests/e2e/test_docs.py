"""Every example in the documentation works as it is printed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.pool import PoolProcess

DOCS = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(curl .*?)\n```", (DOCS / "docs" / "api.md").read_text(), re.DOTALL)


def run(block: str, pool: PoolProcess) -> str:
    """What one example prints. curl itself runs it, told to fail on an HTTP error."""
    with pool.worker_http() as worker:
        worker_url = str(worker.base_url).rstrip("/")
    script = (
        block.replace("http://127.0.0.1:8000", pool.url)
        .replace("http://127.0.0.1:7000", worker_url)
        .replace("~/.modelpool", str(pool.home))
    )
    command = ["bash", "-c", f'curl() {{ command curl -sS --fail-with-body --max-time 60 "$@"; }}\n{script}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


def test_every_curl_example_of_the_api_documentation_works_in_order(demo_pool: PoolProcess) -> None:
    assert len(BLOCKS) >= 15
    for block in BLOCKS:
        assert run(block, demo_pool), block


@pytest.mark.parametrize("register", ["/admin/models/register", "/v1/models/register"])
def test_the_register_and_chat_examples_work_under_both_register_paths(demo_pool: PoolProcess, register: str) -> None:
    example = next(block for block in BLOCKS if "/admin/models/register" in block)
    chat = next(block for block in BLOCKS if "/v1/chat/completions" in block and "stream" not in block)
    demo_pool.remove("echo")
    run(example.replace("/admin/models/register", register), demo_pool)
    demo_pool.wait_active("echo", within=30)
    assert "Hello from a fake model." in run(chat.replace('"demo"', '"echo"'), demo_pool)
    demo_pool.remove("echo")


def test_both_readmes_name_the_same_commands() -> None:
    english, chinese = (
        re.findall(r"^(?:make|[\w.]*/?\.?venv/bin/modelpool) [\w-]+", (DOCS / name).read_text(), re.MULTILINE)
        for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese
    assert len(english) > 6


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (DOCS / "README.md").read_text()
    assert re.search(r"^make check test$", (DOCS / ".ci" / "run").read_text(), re.MULTILINE)
