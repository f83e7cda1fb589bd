"""The command that runs, as its user would type it again."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def command(environ: Mapping[str, str] = os.environ) -> str:
    """For another terminal: with the home, where that is not the default one."""
    home = environ.get("MODELPOOL_HOME")
    return f"MODELPOOL_HOME={shlex.quote(str(Path(home).expanduser().absolute()))} {program()}" if home else program()


def program() -> str:
    """For this terminal: `modelpool` as it was reached."""
    own = Path(sys.argv[0])
    if own.name != "modelpool":  # `python -m modelpool.cli`, or a program that calls us
        return f"{shlex.quote(sys.executable)} -m modelpool.cli"
    found = shutil.which("modelpool")
    if found and Path(found).absolute() == own.absolute():
        return "modelpool"
    return shlex.quote(os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own))
