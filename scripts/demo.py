"""`make demo`: start a pool, ask its demo model through the openai SDK, print the address, and serve until Ctrl-C.

DEMO_ONCE=1 ends it after the answer. Exits 0 only if the answer came.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from modelpool import demo

QUESTION = "What is Model Pool?"


def main() -> int:
    console = Console()
    console.print("Starting the pool; the engine's imports take a few seconds …", style="dim")
    with subprocess.Popen(
        [sys.executable, "-m", "modelpool.cli", "up", "--json"], stdout=subprocess.PIPE, text=True
    ) as pool:
        try:
            ready = wait_until_ready(pool, console)
            if ready is None:
                return 1
            ask(ready["url"], console)
            console.print(f"\nModel Pool serves at [bold]{ready['url']}/v1[/]", highlight=False)
            if os.environ.get("DEMO_ONCE"):
                return 0
            console.print(f"Another terminal:  {command()} chat demo\nCtrl-C ends it.", highlight=False)
            return pool.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            if pool.poll() is None:
                pool.send_signal(signal.SIGTERM)
            pool.wait()


def wait_until_ready(pool: subprocess.Popen[str], console: Console) -> dict[str, Any] | None:
    """What `up` says when it is ready and the demo model serves or rests; None when it ended or the model failed."""
    assert pool.stdout is not None
    for line in pool.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "notice":
            console.print(event["message"], style="yellow", highlight=False)
        elif event["event"] == "progress":
            console.print(", ".join(f"{name}: {state}" for name, state in event["models"].items()), style="dim")
        elif event["event"] == "ready":
            models = {model["alias"]: model for model in event["models"]}
            model = models.get(demo.ALIAS, {"state": "missing", "wanted": 1})
            if model["state"] == "ACTIVE" or not model["wanted"]:  # one that nobody asked for comes when it is
                return event
            console.print(f"The demo model does not serve: {model.get('reason')}", style="red")
            return None
    return None


def ask(url: str, console: Console) -> None:
    """One streamed question through the SDK."""
    client = OpenAI(base_url=f"{url}/v1", api_key=api_key())
    console.print(f"\n[bold]> {QUESTION}[/]", highlight=False)
    stream = client.chat.completions.create(
        model=demo.ALIAS, messages=[{"role": "user", "content": QUESTION}], stream=True
    )
    for chunk in stream:
        console.file.write(chunk.choices[0].delta.content or "" if chunk.choices else "")
        console.file.flush()
    console.print()


def api_key() -> str:
    """What a pool of this machine takes: the key set for clients, or any text where it is open."""
    return os.environ.get("MODELPOOL_API_KEY") or "none"


def command() -> str:
    path = Path(sys.executable).with_name("modelpool")
    return os.path.relpath(path) if path.exists() else "modelpool"


if __name__ == "__main__":
    sys.exit(main())
