"""Which code a pool runs: by its content, since a checkout that was changed has the same `__version__`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import modelpool
from modelpool.process import StartupError

_PACKAGE = "modelpool"


def running_code() -> str:
    """A digest of the code of this process, as it is on disk."""
    return _digest(Path(modelpool.__file__).parent)


def deployed_code(working_dir: str) -> str:
    """A digest of the code that Ray runs on every node: that in `working_dir` (RAY_WORKING_DIR), else what is installed
    here. What lies at a URI is known by the URI, which is part of the settings. Raises StartupError.
    """
    if not working_dir:
        return running_code()
    path = Path(working_dir)
    if path.is_file():
        return _digest(path)
    if not path.is_dir():
        return ""
    if not (path / _PACKAGE / "__init__.py").is_file():
        raise StartupError(
            f"The folder {working_dir}, which Ray is to take to the nodes, has no package `{_PACKAGE}`.",
            "RAY_WORKING_DIR (--working-dir) is the folder that it lies in, such as `src` of a checkout.",
        )
    return _digest(path / _PACKAGE)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_files(path)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    """Without what Python makes of them."""
    return (file for file in folder.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
