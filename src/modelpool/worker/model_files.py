"""Models on this machine's disk: whether one is whole, and which of a hub's are here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

SAFE_WEIGHTS = (".safetensors",)
OLD_WEIGHTS = (".bin", ".pt", ".pth")
_REPOSITORY = "models--"


def is_complete(snapshot: Path) -> bool:
    """Whether a folder holds a whole model, as far as it says itself which files belong to it."""
    if not (snapshot / "config.json").exists():
        return False
    for index in snapshot.glob("*.index.json"):
        try:
            files = set(msgspec.json.decode(index.read_bytes())["weight_map"].values())
        except (OSError, msgspec.DecodeError, LookupError, TypeError, AttributeError):
            return False
        if index.name.startswith("model.safetensors") and not all((snapshot / name).exists() for name in files):
            return False
    return any(path.suffix in SAFE_WEIGHTS + OLD_WEIGHTS for path in snapshot.iterdir())


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where the hub's own tools keep what they fetched."""
    if folder := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def cached_models(cache: Path) -> Iterator[str]:
    """The hub names of the models that are whole in a cache. Blocks."""
    for repository in cache.glob(f"{_REPOSITORY}*"):
        snapshots = repository.glob("snapshots/*")
        if any(snapshot.is_dir() and is_complete(snapshot) for snapshot in snapshots):
            yield repository.name.removeprefix(_REPOSITORY).replace("--", "/", 1)
