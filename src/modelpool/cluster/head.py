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
from modelpool.process_table import with_variable
from modelpool.settings import ENVIRONMENT

TAG = "MODELPOOL_RAY_OF"
_DEADLINE_S = 300.0


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


def runs_here(home: Home) -> bool:
    """Whether a Ray that was started for this home runs."""
    return bool(with_variable(TAG, str(home.path)))


def remember_head(home: Home, address: str) -> None:
    _address_file(home).write_text(address)


def address_of_head(home: Home) -> str:
    """Where it is; "auto" if that is not known."""
    try:
        return _address_file(home).read_text()
    except OSError:
        return "auto"


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
