"""Puts the compiled device under torch: the Python side of `torch.cuda` and of NCCL that a CPU build leaves out.

PRETEND_GPUS: number of devices, 8 unless set. Nothing of megatron_embed or Megatron-Core is replaced.
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.pretend_cuda import flash, kernels, waits
from tests.pretend_cuda.build import MODULE

COUNT = int(os.environ.get("PRETEND_GPUS", "8"))
MEMORY = 80 << 30
PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9, minor=0,
                             multi_processor_count=132)


class Event(torch.Event):
    """torch.cuda.Event; everything has happened already."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> "Event":
        return super().__new__(cls, "cuda")


class Stream(torch.Stream):
    """torch.cuda.Stream; everything runs in program order."""

    cuda_stream = 0

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> "Stream":
        return super().__new__(cls, device="cuda" if device is None else device)


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(library: Path) -> None:
    """Called once, directly after torch has been imported."""
    compiled = _load(library)
    compiled.install(COUNT, waits.record)
    waits.write_at_exit()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # a compiler for the device does not exist
    _install_cuda(compiled)
    _install_nccl(compiled)
    flash.install(compiled.to_host_alias, compiled.to_device_alias)
    kernels.install(compiled.to_host_alias, compiled.to_device_alias)


def _install_cuda(compiled: ModuleType) -> None:
    generator = torch.Generator()

    def seed(value: int) -> None:
        # Kernels draw from the CPU's generator, the only one that there is.
        torch.default_generator.manual_seed(value)
        generator.manual_seed(value)

    def set_device(device: Any) -> None:
        compiled.set_device(device if isinstance(device, int) else torch.device(device).index)

    def exchange_device(index: int) -> int:
        old: int = compiled.get_device()
        if index >= 0:
            compiled.set_device(index)
        return old

    random = {"manual_seed": seed, "manual_seed_all": seed, "initial_seed": generator.initial_seed,
              "get_rng_state": lambda *args, **kwargs: generator.get_state(),
              "set_rng_state": lambda state, *args, **kwargs: generator.set_state(state),
              "current_device": compiled.get_device}
    vars(torch.cuda.random).update(random)
    vars(torch.cuda).update(
        random, _is_compiled=lambda: True, _lazy_init=lambda: None, init=lambda: None, is_initialized=lambda: True,
        is_available=lambda: True, device_count=lambda: COUNT, set_device=set_device,
        _exchange_device=exchange_device, _maybe_exchange_device=exchange_device,
        get_device_name=lambda device=None: PROPERTIES.name, get_device_properties=lambda device=None: PROPERTIES,
        get_device_capability=lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        is_bf16_supported=lambda *args, **kwargs: True, default_generators=[generator] * COUNT,
        Stream=Stream, Event=Event, stream=lambda stream: contextlib.nullcontext(), set_stream=lambda stream: None,
        current_stream=lambda device=None: the_stream, default_stream=lambda device=None: the_stream,
        is_current_stream_capturing=lambda: False,
        synchronize=lambda device=None: waits.record("synchronize", "device"), empty_cache=lambda: None,
        memory_allocated=lambda device=None: compiled.allocated(),
        memory_reserved=lambda device=None: compiled.allocated(),
        max_memory_allocated=lambda device=None: compiled.peak(),
        reset_peak_memory_stats=lambda device=None: compiled.reset_peak(),
        mem_get_info=lambda device=None: (MEMORY - compiled.allocated(), MEMORY))
    the_stream = Stream()
    torch.version.cuda = "13.0"
    vars(torch._C).update(_cuda_getDevice=compiled.get_device, _cuda_getCurrentRawStream=lambda index: 0)


class _NcclOptions:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config, self.is_high_priority_stream = SimpleNamespace(), False


def gloo_group(store: Any, rank: int, size: int, options: Any) -> Any:
    """The group that computes the collectives of a ProcessGroupNCCL; called by its constructor."""
    from torch.distributed import distributed_c10d as c10d

    return c10d.ProcessGroupGloo(c10d.PrefixStore("pretend-nccl", store), rank, size, timeout=options._timeout)


def _install_nccl(compiled: ModuleType) -> None:
    """Give torch.distributed the backend `nccl`, which it looks up under these names."""
    from torch.distributed import distributed_c10d as c10d

    compiled.ProcessGroupNCCL.Options = _NcclOptions
    for module in (c10d, torch.distributed):
        vars(module).update(ProcessGroupNCCL=compiled.ProcessGroupNCCL, is_nccl_available=lambda: True)
    vars(c10d).update(_NCCL_AVAILABLE=True, default_pg_nccl_timeout=c10d.default_pg_timeout)
    torch.cuda.nccl.version = lambda: (2, 27, 0)  # type: ignore[assignment, return-value]
