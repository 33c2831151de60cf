"""CPU adapter: Megatron-Core runs without CUDA, its hard-wired device calls replaced by CPU ones.

Installed by `platform/compat.py`, before any Megatron module is imported, and only if CUDA is absent. Megatron's
modules get a `torch` of their own, with the calls below replaced; for all other modules it is unchanged (replaced
globally, the factory functions broke Transformers' loading). A GPU run never imports this file.
`tests/platform/test_cpu.py` lists the CUDA-only sites of the installed Megatron-Core and fails on one that is not
covered.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import platform
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_embed.platform import cpu_linear
from megatron_embed.platform.bf16_support import has_native_bf16

FACTORIES = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn", "randint",
             "randperm", "tensor", "zeros", "zeros_like")
"""torch functions whose `device="cuda"` becomes the CPU and whose `pin_memory` is removed."""

CUDA_TYPE_SITES = (
    ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params", "__init__"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer", "__init__"),
    ("megatron.core.optimizer.clip_grads", None, "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", None, "clip_grad_by_total_norm_fp32"),
)
"""(module, class or None, function) that compare `param.type()` with 'torch.cuda.FloatTensor' and the like."""


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""glibc's names for mallopt's options (malloc.h)."""


class Stream:
    """Stands in for torch.cuda.Stream: CPU work is already in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event if event is not None else Event()


class Event:
    """Stands in for torch.cuda.Event: every event has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = Stream()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces calls that only order or wait for device work."""


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _same(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


CUDA_CALLS: dict[str, Any] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": _nothing,
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "is_current_stream_capturing": lambda: False,
}
"""Replacements in Megatron's `torch.cuda`. One random stream serves as Megatron's CPU and CUDA streams both."""


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Make `tensor.type()` of a CPU tensor return the CUDA type's name within the block."""
    original = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _import_without_compiler() -> None:
    """Bind Megatron's `jit_fuser` to plain Python: torch.compile would need a C++ compiler and recompile per shape."""
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment, misc]
    try:
        importlib.import_module("megatron.core.jit")
    finally:
        torch.compile = compile_function


def _numpy_split_sizes(moe_utils: types.ModuleType) -> None:
    """`maybe_move_tensor_to_cpu(..., as_numpy=True)` returns numpy only for CUDA tensors; the all-to-all needs it
    always."""
    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = move
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = move


def _name_cuda_types(module_name: str, class_name: str | None, method_name: str) -> None:
    module = importlib.import_module(module_name)
    owner = module if class_name is None else vars(module)[class_name]
    method = vars(owner)[method_name]

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return method(*args, **kwargs)

    setattr(owner, method_name, call)


def _skip_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, skipped when a group of one would copy a tensor onto itself (as in NCCL)."""
    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if output.data_ptr() == source.data_ptr() and output.numel() == source.numel():
            return None
        return collective(output, source, *args, **kwargs)

    return call


def _pad_uneven_collectives(mappings: types.ModuleType) -> None:
    """Pad gathers and scatters of uneven shares of rows, which gloo refuses, to the longest share.

    An expert that is split over tensor-parallel ranks gathers as many tokens of each as were sent to it.
    """
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_uneven(rows: torch.Tensor, group: Any, sizes: list[int] | None = None,
                      use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or len(set(map(int, sizes))) == 1:
            return gather(rows, group, sizes, use_global_buffer)
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)])

    @functools.wraps(scatter)
    def scatter_uneven(rows: torch.Tensor, group: Any, sizes: list[int] | None = None,
                       use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or len(set(map(int, sizes))) == 1:
            return scatter(rows, group, sizes, use_global_buffer)
        longest = max(sizes)
        padded = rows.new_zeros(len(sizes) * longest, *rows.shape[1:])
        for rank, part in enumerate(rows.split([int(size) for size in sizes])):
            padded[rank * longest : rank * longest + part.shape[0]] = part
        share = rows.new_empty(longest, *rows.shape[1:])
        torch.distributed.reduce_scatter_tensor(share, padded, group=group)
        return share[: sizes[group.rank()]].contiguous()

    vars(mappings).update(_gather_along_first_dim=gather_uneven, _reduce_scatter_along_first_dim=scatter_uneven)


class _Overlay(types.ModuleType):
    """A module's attributes with some replaced; the module itself is unchanged."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _torch_for_megatron() -> _Overlay:
    """`torch` as Megatron's modules see it."""
    factories = {name: _on_cpu(vars(torch)[name]) for name in FACTORIES}
    return _Overlay(torch, {"cuda": _Overlay(torch.cuda, CUDA_CALLS), **factories})


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Gives every module below `megatron.core` the overlaid `torch` as soon as it has been executed."""

    def __init__(self) -> None:
        self.torch = _torch_for_megatron()

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _MegatronLoader(spec.loader.name, spec.loader.path, self.torch)
        return spec


class _MegatronLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, overlay: _Overlay) -> None:
        super().__init__(name, path)
        self.overlay = overlay

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if vars(module).get("torch") is torch:
            vars(module)["torch"] = self.overlay


def _keep_freed_memory() -> None:
    """Tell glibc to keep memory that tensors free instead of returning it to the kernel.

    Otherwise each large activation is mapped, zeroed page by page, and unmapped again: 20 % of a training step of
    all-MiniLM-L6-v2 on 11,000 tokens. oneDNN's cache of primitives, one per shape, would fragment the heap (4.3 GB
    instead of 2.7 after 12 steps of ever new sizes); without it nothing is slower.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)


def install() -> None:
    """Install the adapter. Must run before the first import of a Megatron module; harmless when repeated."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed on a machine with CUDA")
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    early = sorted(name for name in sys.modules if name.startswith("megatron.core"))
    if early:
        raise RuntimeError(f"{early[0]} was imported before megatron_embed.platform.compat; import that first")
    _keep_freed_memory()
    sys.meta_path.insert(0, _MegatronFinder())
    # Without CUDA these raise, so no other code can depend on them.
    torch.Tensor.cuda = _same  # type: ignore[method-assign, assignment]
    torch.Tensor.pin_memory = _same  # type: ignore[method-assign, assignment]
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = _same  # type: ignore[method-assign, assignment]
    _import_without_compiler()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    vars(moe_utils).setdefault("te_general_gemm", None)  # 0.16.1 leaves the name undefined without Transformer Engine
    _numpy_split_sizes(moe_utils)
    for site in CUDA_TYPE_SITES:
        _name_cuda_types(*site)
    _pad_uneven_collectives(importlib.import_module("megatron.core.tensor_parallel.mappings"))
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        vars(buffers)[name] = _skip_alone(vars(buffers)[name])
    if cpu_linear.is_available() or not has_native_bf16():
        layers = importlib.import_module("megatron.core.tensor_parallel.layers")
        vars(layers)["LinearWithGradAccumulationAndAsyncCommunication"] = cpu_linear.OneDnnLinear
        vars(layers)["LinearWithFrozenWeight"] = cpu_linear.OneDnnFrozenLinear
