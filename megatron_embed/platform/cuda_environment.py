"""Environment variables of a process that uses GPUs, set before torch and CUDA start. What the user has set is kept."""

import os
import re

from megatron_embed.errors import ConfigError
from megatron_embed.platform.gpus import compute_capability

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
BLACKWELL = 10
"""Compute capability from which kernels start in order without CUDA_DEVICE_MAX_CONNECTIONS."""
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_ALGO": ("Ring",),
                 "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",)}
"""Variable -> values with which a run is repeatable, the first one being set: cuBLAS's workspaces, NCCL's order of sums
and Transformer Engine's kernels (as Megatron-LM's --deterministic-mode, megatron/training/determinism.py)."""


def set_defaults() -> None:
    """Set what does not depend on the run. Must be called before torch is imported; harmless without a GPU.

    Nothing is set for NCCL's error handling and NVLink SHARP: torch's and NCCL's own defaults are right.
    """
    version = torch_version()
    # Micro-batches of varying sizes fragment the caching allocator: without this a 70B run that fits runs out of
    # memory. torch before 2.10 ignores the new name (pytorch/pytorch#183387) and from 2.9 on complains of the old one.
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        os.environ[ALLOCATOR_NAMES[version < (2, 10)]] = EXPANDABLE
    if version < (2, 8):
        # Otherwise tensors that NCCL's streams use are freed late, and memory grows; 2.8 does it by itself and
        # complains of the variable.
        os.environ.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")


def set_for_layout(tensor_model_parallel_size: int, context_parallel_size: int) -> None:
    """Let communication of tensor and context parallelism start before the computation that hides it.

    Megatron orders the two by submission, which needs one hardware queue before Blackwell, and warns or refuses without
    it (megatron/training/arguments.py); everything else is faster with CUDA's own number. Before CUDA starts.
    """
    if max(tensor_model_parallel_size, context_parallel_size) == 1:
        return
    capability = compute_capability()
    if capability is None or capability[0] < BLACKWELL:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_deterministic() -> None:
    """Set what `training.deterministic` needs, before cuBLAS and NCCL start. Raises ConfigError, naming the variable,
    if one is set to something else."""
    for name, values in DETERMINISTIC.items():
        value = os.environ.setdefault(name, values[0])
        if value not in values:
            raise ConfigError(f"training.deterministic = True: {name} = {value!r} does not repeat its results; unset "
                              f"it, or set it to {' or '.join(values)}", key="training.deterministic")


def torch_version() -> tuple[int, int]:
    """(major, minor) of the installed torch, without importing it; (0, 0) if there is none."""
    import importlib.metadata  # slow to import, and --help need not wait for it

    try:
        numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
