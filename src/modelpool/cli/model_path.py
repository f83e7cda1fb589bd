"""Models on a disk, as people name them."""

from __future__ import annotations

from pathlib import Path


def as_workers_find_it(model_name: str) -> str:
    """A path that is relative to whoever types it as an absolute one: a worker would look in a folder of its own.

    What has two slashes or more is a path: names on a hub have one at most. URLs and names stay.
    """
    if model_name.startswith((".", "~")) or (model_name.count("/") > 1 and "://" not in model_name):
        return str(Path(model_name).expanduser().absolute())
    return model_name
