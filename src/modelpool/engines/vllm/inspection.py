"""Make vLLM's look at a model's class cheap.

vLLM inspects an architecture that it has not seen before in a fresh Python process: seconds of imports, to protect its
own process from what the model's module might do to the accelerator. A host imports the module sooner or later anyway,
in processes forked from it, so it is imported here, before the fork, and registered as a class.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vllm.model_executor.models.registry import ModelRegistry

logger = logging.getLogger(__name__)


def register_architecture(model_path: Path) -> None:
    """Import the classes that the model's config names, where they are vLLM's own. All else is left to vLLM."""
    for name in _architectures(model_path):
        if (registered := ModelRegistry.models.get(name)) is not None:
            try:
                ModelRegistry.register_model(name, registered.load_model_cls())
            except ImportError as error:
                logger.warning("%s cannot be imported here, which vLLM will report: %s", name, error)


def _architectures(model_path: Path) -> list[str]:
    try:
        names = json.loads((model_path / "config.json").read_bytes()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return []  # vLLM says what is wrong with it
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
