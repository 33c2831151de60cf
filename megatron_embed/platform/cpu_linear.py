"""Megatron's tensor-parallel linear with float32 products by oneDNN or by torch's own library, for the CPU adapter.

torch computes float32 products by MKL, whose kernels on AMD processors use at most AVX2: 190 GFLOP/s on two Zen 5 cores
where oneDNN, which ships in the same torch, reaches 430. Held to AVX2, oneDNN's gradients of weights reach 0.7 of
MKL's. So each kind of product has its library; a run measures which (cpu_matmul.py). For other dtypes torch itself uses
oneDNN.

On a processor without bfloat16 instructions torch multiplies bfloat16 element by element, and takes 25 times as long as
in float32. There the factors are converted to float32, which is exact, multiplied, and the sums rounded once, as the
instructions do.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.names import MatmulLibrary
from megatron_embed.platform.bf16_support import has_native_bf16

Libraries = tuple[MatmulLibrary, ...]
"""Libraries of the forward pass, the gradient of the input and the gradient of the weight."""
DEFAULT_LIBRARIES: Libraries = ("onednn", "onednn", "onednn")
_libraries = DEFAULT_LIBRARIES
_of_context: ContextVar[Libraries | None] = ContextVar("libraries", default=None)


def use_libraries(libraries: Libraries) -> None:
    """Set the libraries of all float32 products of this process from now on."""
    global _libraries
    assert len(libraries) == len(DEFAULT_LIBRARIES)
    _libraries = libraries


@contextlib.contextmanager
def libraries_used(libraries: Libraries | None) -> Iterator[None]:
    """Context in which this thread computes float32 products by these libraries. None: by those of the process."""
    token = _of_context.set(libraries)
    try:
        yield
    finally:
        _of_context.reset(token)


def libraries_in_use() -> Libraries:
    """The libraries of this thread's float32 products."""
    return _of_context.get() or _libraries


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, *, library: MatmulLibrary) -> Tensor:
    """left @ right.T (+ bias): [..., inner] and [outer, inner], any strides -> [..., outer]."""
    if is_widened(left):
        bias = None if bias is None else bias.float()
        return product(left.float(), right.float(), bias, library=library).to(left.dtype)
    # Experts that no token chose have no rows, which oneDNN refuses.
    if library == "torch" or left.dtype != torch.float32 or left.numel() == 0 or not is_available():
        return torch.nn.functional.linear(left, right, bias)
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def forward_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., inner] and [outer, inner] -> [..., outer]."""
    return product(inputs, weight, bias, library=libraries_in_use()[0])


def input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """[..., outer] and [outer, inner] -> [..., inner]."""
    return product(grad_output, weight.t(), library=libraries_in_use()[1])


def is_widened(factor: Tensor) -> bool:
    """Whether products of tensors like this one are computed in float32."""
    return factor.dtype == torch.bfloat16 and not has_native_bf16()


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`functional.linear` without a bias; computed in float32 if that is faster. No communication."""
    if not is_widened(inputs):
        return torch.nn.functional.linear(inputs, weight)
    return WidenedLinear.apply(inputs, weight)  # type: ignore[no-any-return,no-untyped-call]


class WidenedLinear(torch.autograd.Function):
    """[..., inner] and [outer, inner] of bfloat16 -> [..., outer]; every product is summed in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return forward_product(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        return (input_gradient(grad_output, weight) if needs_inputs else None,
                weight_gradient(rows, inputs.reshape(-1, inputs.shape[-1])) if needs_weight else None)


def weight_gradient(grad_output: Tensor, inputs: Tensor, library: MatmulLibrary | None = None) -> Tensor:
    """grad_output.T @ inputs: [tokens, outer] and [tokens, inner] -> [outer, inner]. `library`: None: the run's.

    oneDNN needs a row-major left factor, so one is transposed in memory: the narrower of the two.
    """
    library = library or libraries_in_use()[2]
    if library == "torch" or grad_output.shape[1] <= inputs.shape[1]:
        return product(grad_output.t(), inputs.t(), library=library)
    return product(inputs.t(), grad_output.t(), library=library).t()


class OneDnnLinear(torch.autograd.Function):
    """Replaces Megatron's LinearWithGradAccumulationAndAsyncCommunication, with its arguments and values.

    Its collectives, each over the tensor-parallel group: with sequence parallelism an all-gather of the input (forward,
    and again for the weight's gradient) and a reduce-scatter of the input's gradient; else an all-reduce of the latter.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool,
                allreduce_dgrad: bool, sequence_parallel: bool, grad_output_buffer: list[Tensor] | None,
                wgrad_deferral_limit: int | None, tp_group: dist.ProcessGroup, gtp_remat_size: int = 1) -> Tensor:
        # gtp_remat_size exists since Megatron-Core 0.19, for gathered weights, which are never used here.
        assert gtp_remat_size == 1
        assert not gradient_accumulation_fusion and grad_output_buffer is None, "CUDA-only forms of the gradient"
        ctx.save_for_backward(inputs, weight)
        ctx.has_bias = bias is not None
        ctx.allreduce_dgrad = allreduce_dgrad
        ctx.sequence_parallel = sequence_parallel
        ctx.tp_group = tp_group
        return forward_product(_gathered(inputs, tp_group) if sequence_parallel else inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        total = _gathered(inputs, ctx.tp_group) if ctx.sequence_parallel else inputs
        grad_inputs = input_gradient(grad_output, weight)
        work = None
        if ctx.sequence_parallel:
            share = torch.empty_like(inputs)
            work = dist.reduce_scatter_tensor(share, grad_inputs, group=ctx.tp_group, async_op=True)
            grad_inputs = share
        elif ctx.allreduce_dgrad:
            work = dist.all_reduce(grad_inputs, group=ctx.tp_group, async_op=True)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = weight_gradient(rows, total.reshape(-1, total.shape[-1]))
        grad_bias = rows.sum(dim=0) if ctx.has_bias else None
        if work is not None:
            work.wait()
        return grad_inputs, grad_weight, grad_bias, None, None, None, None, None, None, None


class OneDnnFrozenLinear(torch.autograd.Function):
    """Replaces Megatron's LinearWithFrozenWeight, with its arguments and values.

    An all-reduce of the input's gradient over the tensor-parallel group, if asked for.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool,
                tp_group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.allreduce_dgrad = allreduce_dgrad
        ctx.tp_group = tp_group
        return forward_product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        grad_inputs = input_gradient(grad_output, weight)
        if ctx.allreduce_dgrad:
            dist.all_reduce(grad_inputs, group=ctx.tp_group)
        return grad_inputs, None, None, None, None


def _gathered(inputs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens/tp, ...] -> [tokens, ...] over the tensor-parallel group."""
    total = inputs.new_empty(inputs.shape[0] * group.size(), *inputs.shape[1:])
    dist.all_gather_into_tensor(total, inputs.contiguous(), group=group)
    return total


@functools.cache
def is_available() -> bool:
    """Whether this torch has oneDNN on an x86 processor; elsewhere torch's own choice is good."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
