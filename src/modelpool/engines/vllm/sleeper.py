"""Mixed into vLLM's worker on a CPU, where vLLM has no sleep mode: gives memory back and takes it again.

The pages go, the addresses stay (`madvise`): views, handles and whatever else points into a tensor remain valid, a page
reads as zeros when it is touched again, and waking from level 1 costs nothing but that. vLLM finds this class by its
name (`worker_extension_cls`); it is called by `collective_rpc`, while nothing runs.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.malloc_trim.argtypes = (ctypes.c_size_t,)


class Sleeper:
    """A worker of vLLM at level 0 (awake), 1 (no KV cache) or 2 (no weights either)."""

    model_runner: Any
    modelpool_level = 0

    def modelpool_sleep(self, level: int) -> int:
        """From any lighter level. Returns by how many bytes this process has become smaller."""
        before = _resident_bytes()
        if not self.modelpool_level:
            give_back(_tensors(self.model_runner.kv_caches))
        if level == 2:
            model = self.model_runner.get_model()
            give_back(model.parameters())
            _drop_packed(model)
            _drop_expert_kernels(model)
        self.modelpool_level = level
        _LIBC.malloc_trim(0)
        return max(0, before - _resident_bytes())

    def modelpool_wake(self) -> None:
        """Awake again, after level 2 with the weights from disk."""
        if self.modelpool_level == 2:
            self.modelpool_reload()
            _LIBC.malloc_trim(0)
        self.modelpool_level = 0

    def modelpool_reload(self) -> None:
        self.reload_weights()  # type: ignore[attr-defined]  # vLLM's worker has it
        pack_again(self.model_runner.get_model())


def give_back(tensors: Iterable[torch.Tensor]) -> None:
    """Zero these tensors by giving their pages back to the system."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    for address, size in storages.items():
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin >= end:
            begin = end = address + size  # too small to hold a page
        ctypes.memset(address, 0, begin - address)
        ctypes.memset(end, 0, address + size - end)
        if begin < end and _LIBC.madvise(begin, end - begin, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists: one for each attention layer, several for each layer of a state space model."""
    if isinstance(tree, torch.Tensor):
        yield tree
    else:
        for each in tree:
            yield from _tensors(each)


def _asleep(*_: object) -> NoReturn:
    raise RuntimeError("the model was asked while it slept")


def _drop_packed(model: torch.nn.Module) -> None:
    """Let go of the weights as oneDNN has packed them, which on this platform is what linear layers compute with."""
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = _asleep


def _drop_expert_kernels(model: torch.nn.Module) -> None:
    """Have a reload make the kernels of mixtures of experts anew: one that is there does not pack its weights again."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def pack_again(model: torch.nn.Module) -> None:
    """Pack the weights of layers that a reload leaves out, having none of their own: a head tied to the embedding."""
    for module in model.modules():
        if getattr(module, "cpu_linear", None) is _asleep:
            module.quant_method.process_weights_after_loading(module)
