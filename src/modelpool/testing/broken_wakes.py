"""Wakes from level 2 that go wrong unnoticed by vLLM, for `worker_extension_cls`: what the canary is there to find."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.model_loader import get_model_loader

from modelpool.engines.vllm.sleeper import Sleeper, pack_again

Weights = Iterable[tuple[str, torch.Tensor]]

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.")


class _BrokenSleeper(Sleeper):
    def modelpool_reload(self) -> None:
        config, model = self.vllm_config, self.model_runner.get_model()  # type: ignore[attr-defined]
        whole = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
        self.reload_weights(weights_iterator=self.modelpool_damaged(whole))  # type: ignore[attr-defined]
        pack_again(model)

    def modelpool_damaged(self, weights: Weights) -> Weights:
        raise NotImplementedError


class ZeroedLayer(_BrokenSleeper):
    """The weights of the second layer are zeros."""

    def modelpool_damaged(self, weights: Weights) -> Weights:
        for name, weight in weights:
            yield name, torch.zeros_like(weight) if _layer(name) == 1 else weight


class SwappedLayers(_BrokenSleeper):
    """The first two layers have changed places."""

    def modelpool_damaged(self, weights: Weights) -> Weights:
        for name, weight in weights:
            place = _layer(name)
            yield _LAYER.sub(rf"\g<1>{1 - place}.", name) if place in (0, 1) else name, weight


class SkippedReload(_BrokenSleeper):
    """All weights are what memory reads as that was given back: zeros."""

    def modelpool_damaged(self, weights: Weights) -> Weights:
        for name, weight in weights:
            yield name, torch.zeros_like(weight)


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[2]) if match else -1
