"""This code as another version of itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import modelpool

VERSION = "99.0"


def another_version(folder: Path) -> Path:
    """A folder with a package `modelpool` that says it is VERSION."""
    package = folder / "modelpool"
    shutil.copytree(Path(modelpool.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    said = package / "__init__.py"
    said.write_text(said.read_text().replace(modelpool.__version__, VERSION))
    return folder
