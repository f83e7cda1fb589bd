"""What a host is told at its start, and what its forkserver's environment is."""

from __future__ import annotations

from collections.abc import Mapping

from modelpool.worker.devices import CUDA

TAG = "MODELPOOL_ENGINES_OF"
"""Set in every process below a worker, to `home:worker_id`: how its successor finds what it left behind."""

# Read by libraries while they are imported, so given to the forkserver; no secret among them.
_FORKSERVER_NAMES = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"}
    | {"PYTHONPATH", "VIRTUAL_ENV", "HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "NO_PROXY", "no_proxy"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
)
_FORKSERVER_PREFIXES = (
    *("LC_", "XDG_", "PYTHON", "VLLM_", "TORCH", "PYTORCH_", "TRITON_", "NCCL_", "GLOO_", "NVIDIA_", "CUDA_"),
    *("TRANSFORMERS_", "TOKENIZERS_", "FLASHINFER_", "OMP_", "KMP_", "GOMP_", "UCX_", "RAYON_", "MALLOC_"),
)
_HOST_NAMES = ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE")
_HOST_PREFIXES = ("VLLM_",)
# Chosen for each host by its devices, or harmful in a parent.
_NOT_FOR_FORKSERVER = frozenset({"CUDA_VISIBLE_DEVICES", "PYTHONSTARTUP", "PYTHONINSPECT"})


def forkserver_environment(environ: Mapping[str, str], *, tag: str, run_id: str) -> dict[str, str]:
    """The environment of a forkserver: of ours what its imports read, and what makes a fork safe.

    OpenMP's settings only where a user made them: an engine chooses its threads by its share of the cores.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if (name in _FORKSERVER_NAMES or name.startswith(_FORKSERVER_PREFIXES)) and name not in _NOT_FOR_FORKSERVER
    }
    return {
        **kept,
        TAG: tag,
        "MODELPOOL_RUN_ID": run_id,
        # Its threads would be started by the import, and a process with threads must not be forked.
        "OPENBLAS_NUM_THREADS": "1",
        # Otherwise the title is written over the environment, where the tag is looked for.
        "SPT_NOENV": "1",
        "PYTHONUNBUFFERED": "1",
    }


def host_environment(environ: Mapping[str, str], *, device_kind: str, devices: tuple[int, ...]) -> dict[str, str]:
    """The variables a host sets over those of its forkserver: devices, hub, and the worker's `VLLM_*`."""
    kept = {name: value for name, value in environ.items() if name in _HOST_NAMES or name.startswith(_HOST_PREFIXES)}
    if device_kind != CUDA:
        return {**kept, "CUDA_VISIBLE_DEVICES": ""}
    # In NVML's order, which the numbers are from; CUDA's own default is another one.
    numbers = ",".join(str(index) for index in devices)
    return {**kept, "CUDA_VISIBLE_DEVICES": numbers, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
