"""Ray's head on this machine, where `deploy` had to start one: it, and all that Ray started below it, carry our tag."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from modelpool.home import Home
from modelpool.process import StartupError
from modelpool.process_group import reap
from modelpool.process_table import command_line, with_variable
from modelpool.settings import ENVIRONMENT

TAG = "MODELPOOL_RAY_OF"
_DEADLINE_S = 300.0
_GCS_ADDRESS = "--gcs-address="


def start_head(home: Home, arguments: str) -> None:
    """`ray start --head` with these more arguments. Raises StartupError with what it printed."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--disable-usage-stats"]
    try:
        done = subprocess.run(
            [*command, *shlex.split(arguments)],
            env=_environ(home, os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise StartupError("Ray is not installed in this Python.", "`pip install 'modelpool[ray]'`") from error
    except subprocess.TimeoutExpired as error:
        end_head(home)
        raise StartupError(f"`ray start --head` did not end within {_DEADLINE_S:.0f} s.") from error
    if done.returncode:
        end_head(home)
        raise StartupError(
            f"Ray cannot be started: {_reason(done.stderr or done.stdout)}",
            "Name a running cluster with RAY_ADDRESS, or pass other arguments to `ray start` with MODELPOOL_RAY_ARGS.",
        )


def address_of_head(home: Home) -> str:
    """Of the head that runs here for this home, as its raylet was told; "" where there is none.

    Ray's own "auto" may find the raylet of another cluster on this machine.
    """
    for pid in with_variable(TAG, str(home.path)):
        for argument in command_line(pid):
            if argument.startswith(_GCS_ADDRESS):
                return argument.removeprefix(_GCS_ADDRESS)
    return ""


def remember_head(home: Home, address: str) -> None:
    """For people, in `run/ray-address`."""
    _address_file(home).write_text(address)


def end_head(home: Home) -> None:
    """SIGKILL to all of it. What must end in order has ended before."""
    reap(TAG, str(home.path))
    _address_file(home).unlink(missing_ok=True)


def _address_file(home: Home) -> Path:
    return home.run / "ray-address"


def _environ(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Without our own variables: a node's environment wins over what is deployed, and would be that of this moment."""
    ours = {variable for variable, _ in ENVIRONMENT}
    return {
        **{name: value for name, value in environ.items() if name not in ours},
        TAG: str(home.path),
        "SPT_NOENV": "1",
    }


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
