"""Linear layers of several experts at once: each multiplies its own rows, which stand behind one another.

On GPUs in bfloat16 the rows of all experts are one product (torch's `grouped_mm`, a CUTLASS kernel for compute
capability 9.0 and 10.0, which reads where each expert's rows end on the device, so that rows need no padding to tiles).
Elsewhere, and for widths that are no multiple of 16 bytes, every expert's product is computed by itself, on CPU ranks
with the libraries of cpu_linear.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.platform import cpu_linear

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
    if not (rows.shape[0] and has_grouped_product(rows)):
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

    On GPUs the gradient of a weight that Megatron's DistributedDataParallel holds is added to its `main_grad` here, for
    all experts in two launches; autograd then gets an empty gradient, as from Megatron's own fused accumulation.
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
        gradients = weight_gradients(grad_outputs, inputs, ctx.groups)
        if isinstance(gradients, Tensor) and all("main_grad" in vars(weight) for weight in weights):
            return grad_inputs, None, *add_to_main_gradients(weights, gradients)
        return grad_inputs, None, *gradients


def outputs_of(inputs: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """[tokens, inputs] -> [tokens, outputs]."""
    if groups.ends is not None and _is_aligned(inputs, weights[0]):
        return torch.nn.functional.grouped_mm(inputs, torch.stack(list(weights)).transpose(1, 2), offs=groups.ends)
    outputs = inputs.new_empty(inputs.shape[0], weights[0].shape[0])
    for rows, weight, result in zip(inputs.split(groups.sizes), weights, outputs.split(groups.sizes), strict=True):
        result.copy_(cpu_linear.forward_product(rows, weight) if inputs.device.type == "cpu" else rows @ weight.t())
    return outputs


def input_gradients(grad_outputs: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """[tokens, outputs] -> [tokens, inputs]."""
    if groups.ends is not None and _is_aligned(grad_outputs, weights[0]):
        return torch.nn.functional.grouped_mm(grad_outputs, torch.stack(list(weights)), offs=groups.ends)
    gradients = grad_outputs.new_empty(grad_outputs.shape[0], weights[0].shape[1])
    for rows, weight, result in zip(grad_outputs.split(groups.sizes), weights, gradients.split(groups.sizes),
                                    strict=True):
        result.copy_(cpu_linear.input_gradient(rows, weight) if rows.device.type == "cpu" else rows @ weight)
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


def add_to_main_gradients(weights: Sequence[Tensor], gradients: Tensor) -> list[Tensor]:
    """Add [experts, outputs, inputs] to the weights' `main_grad`. Returns tensors for autograd to hand on."""
    mains = [vars(weight)["main_grad"] for weight in weights]
    torch._foreach_add_(mains, gradients.to(mains[0].dtype).unbind())
    for weight in weights:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return [torch.empty_like(weight) for weight in weights]


def _is_aligned(left: Tensor, right: Tensor) -> bool:
    """Whether the rows of two row-major factors have the kernel's alignment."""
    return all(factor.shape[-1] * factor.element_size() % ALIGNED_BYTES == 0 for factor in (left, right))
