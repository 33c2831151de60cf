"""Linear layers of several experts at once: each multiplies its own rows, which stand behind one another.

On GPUs in bfloat16 the rows of all experts are one product (torch's `grouped_mm`, a CUTLASS kernel for compute
capability 9.0 and 10.0, which reads where each expert's rows end on the device, so that rows need no padding to tiles).
Elsewhere, for widths that are no multiple of 16 bytes, and for a rank's only expert, whose weight would be copied for
it, every expert's product is computed by itself, on CPU ranks with the libraries of cpu_linear.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.platform import cpu_linear
from megatron_embed.platform.compat import linear_layers
from megatron_embed.platform.weight_gradient import products_can_accumulate

ALIGNED_BYTES = 16
"""A row of every factor of a grouped product is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The places of each expert's rows, which stand behind one another."""

    sizes: tuple[int, ...]
    """Rows of each expert, on the host."""
    ends: Tensor | None
    """[experts] int32 on the device, the end of each expert's rows; None: no grouped products here."""


def groups_of(sizes: Sequence[int], rows: Tensor) -> Groups:
    """The groups of `rows`, [tokens, ...], by the numbers of rows of the experts. One asynchronous copy at most."""
    if not (rows.shape[0] and len(sizes) > 1 and has_grouped_product(rows)):
        return Groups(sizes=tuple(sizes), ends=None)
    on_host = torch.empty(len(sizes), dtype=torch.int32, pin_memory=True)
    on_host[:] = torch.tensor(sizes).cumsum(0)
    return Groups(sizes=tuple(sizes), ends=on_host.to(rows.device, non_blocking=True))


def has_grouped_product(rows: Tensor) -> bool:
    """Whether torch has one kernel for the products of several groups of rows like these."""
    return (rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and "grouped_mm" in vars(torch.nn.functional)
            and torch.cuda.get_device_capability(rows.device)[0] in (9, 10))


class GroupedLinear(torch.autograd.Function):
    """[tokens, inputs], groups and a weight [outputs, inputs] per expert -> [tokens, outputs]. No communication.

    On GPUs the gradient of a weight that Megatron's DistributedDataParallel holds is added to its `main_grad` here:
    by the product itself, one for each expert, where there are such products, which saves 20 bytes of traffic for a
    weight; otherwise, of grouped products, in two launches for all experts. Autograd then gets an empty gradient, as
    from Megatron's own fused accumulation.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, groups: Groups, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, *weights)
        ctx.groups = groups
        return outputs_of(inputs, weights, groups)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        inputs, *weights = ctx.saved_tensors
        grad_outputs = grad_outputs.contiguous()
        grad_inputs = input_gradients(grad_outputs, weights, ctx.groups) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return grad_inputs, None, *[None] * len(weights)
        held = inputs.device.type == "cuda" and all("main_grad" in vars(weight) for weight in weights)
        if held and products_can_accumulate() and vars(weights[0])["main_grad"].dtype == torch.float32:
            sizes = ctx.groups.sizes
            for left, right, weight in zip(grad_outputs.split(sizes), inputs.split(sizes), weights, strict=True):
                if len(left):
                    linear_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(
                        right, left, vars(weight)["main_grad"])
            return grad_inputs, None, *_added(weights)
        gradients = weight_gradients(grad_outputs, inputs, ctx.groups)
        if held and isinstance(gradients, Tensor):
            mains = [vars(weight)["main_grad"] for weight in weights]
            torch._foreach_add_(mains, gradients.to(mains[0].dtype).unbind())
            return grad_inputs, None, *_added(weights)
        return grad_inputs, None, *gradients


def outputs_of(inputs: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """[tokens, inputs] -> [tokens, outputs]."""
    if groups.ends is not None and _is_aligned(inputs, weights[0]):
        return torch.nn.functional.grouped_mm(inputs, torch.stack(list(weights)).transpose(1, 2), offs=groups.ends)
    product = cpu_linear.forward_product if inputs.device.type == "cpu" else torch.nn.functional.linear
    if len(weights) == 1:
        return product(inputs, weights[0])
    outputs = inputs.new_empty(inputs.shape[0], weights[0].shape[0])
    for rows, weight, result in zip(inputs.split(groups.sizes), weights, outputs.split(groups.sizes), strict=True):
        result.copy_(product(rows, weight))
    return outputs


def input_gradients(grad_outputs: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """[tokens, outputs] -> [tokens, inputs]."""
    if groups.ends is not None and _is_aligned(grad_outputs, weights[0]):
        return torch.nn.functional.grouped_mm(grad_outputs, torch.stack(list(weights)), offs=groups.ends)
    product = cpu_linear.input_gradient if grad_outputs.device.type == "cpu" else torch.matmul
    if len(weights) == 1:
        return product(grad_outputs, weights[0])
    gradients = grad_outputs.new_empty(grad_outputs.shape[0], weights[0].shape[1])
    for rows, weight, result in zip(grad_outputs.split(groups.sizes), weights, gradients.split(groups.sizes),
                                    strict=True):
        result.copy_(product(rows, weight))
    return gradients


def weight_gradients(grad_outputs: Tensor, inputs: Tensor, groups: Groups) -> Tensor | list[Tensor]:
    """[tokens, outputs] and [tokens, inputs] -> [outputs, inputs] per expert, in one tensor if it is one product; zeros
    for an expert without rows."""
    if groups.ends is not None and _is_aligned(inputs, grad_outputs):
        gradients = torch.nn.functional.grouped_mm(grad_outputs.t(), inputs, offs=groups.ends)
        # Of an expert without rows the kernel for compute capability 10.0 leaves what was in memory
        # (github.com/pytorch/pytorch/issues/172439); where it writes zeros this costs nothing beside a product.
        empty = [gradients[index] for index, size in enumerate(groups.sizes) if not size]
        if empty:
            torch._foreach_zero_(empty)
        return gradients
    pairs = zip(grad_outputs.split(groups.sizes), inputs.split(groups.sizes), strict=True)
    return [cpu_linear.weight_gradient(left, right) if left.device.type == "cpu" else left.t() @ right
            for left, right in pairs]


def _added(weights: Sequence[Tensor]) -> list[Tensor]:
    """Tensors for autograd to hand on, of weights whose gradients have been added to `main_grad`."""
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return [torch.empty_like(weight) for weight in weights]


def _is_aligned(left: Tensor, right: Tensor) -> bool:
    """Whether the rows of two row-major factors have the kernel's alignment."""
    return all(factor.shape[-1] * factor.element_size() % ALIGNED_BYTES == 0 for factor in (left, right))
