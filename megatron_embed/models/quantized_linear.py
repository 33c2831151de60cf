"""Megatron's tensor-parallel linears over a frozen quantized weight, restored in the forward and the backward product.

Nothing keeps the restored weight between the two: the graph refers to the quantized one.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.models.quantized_weight import QuantizedWeight
from megatron_embed.platform import cpu_linear
from megatron_embed.platform.compat import ColumnParallelLinear, RowParallelLinear, tensor_parallel
from megatron_embed.platform.grouped_linear import Groups, input_gradients, outputs_of


class QuantizedProduct(torch.autograd.Function):
    """inputs @ weight.T + bias, [..., inputs] -> [..., outputs], with a gradient for the inputs alone.

    An all-reduce of it over the tensor-parallel group, if asked for.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: QuantizedWeight, bias: Tensor | None, allreduce_dgrad: bool,
                tp_group: dist.ProcessGroup | None) -> Tensor:
        ctx.weight, ctx.allreduce_dgrad, ctx.tp_group = weight, allreduce_dgrad, tp_group
        restored = weight.restored(inputs.dtype)
        if inputs.device.type == "cpu":
            return cpu_linear.forward_product(inputs, restored, bias)
        return torch.nn.functional.linear(inputs, restored, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        restored = ctx.weight.restored(grad_output.dtype)
        gradient = (cpu_linear.input_gradient(grad_output, restored) if grad_output.device.type == "cpu"
                    else grad_output @ restored)
        if ctx.allreduce_dgrad:
            dist.all_reduce(gradient, group=ctx.tp_group)
        return gradient, None, None, None, None


class QuantizedLinear:
    """The methods of Megatron's linears whose weight is quantized; its full-precision parameter is never allocated."""

    weight: QuantizedWeight

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        on_meta = copy.copy(config)
        on_meta.use_cpu_initialization = True  # no device is named, so the context's is taken
        with torch.device("meta"):
            super().__init__(*args, config=on_meta, **kwargs)
        linear: Any = self
        linear.config = config
        described = linear.weight
        del linear.weight
        linear.weight = QuantizedWeight(tuple(described.shape), allreduce=described.allreduce)
        if linear.bias is not None:
            device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            bias = torch.nn.Parameter(torch.empty_like(linear.bias, device=device))
            vars(bias).update(vars(linear.bias))  # Megatron's marks
            linear.bias = bias

    def _forward_impl(self, *, weight: QuantizedWeight, bias: Tensor | None, allreduce_dgrad: bool,
                      sequence_parallel: bool, tp_group: dist.ProcessGroup | None, **others: Any) -> Tensor:
        """Called by Megatron's `forward` in place of the product with a parameter."""
        inputs = others["input"]
        if sequence_parallel:
            inputs = tensor_parallel.gather_from_sequence_parallel_region(
                inputs, tensor_parallel_output_grad=True, group=tp_group)
        return QuantizedProduct.apply(inputs, weight, bias, allreduce_dgrad, tp_group)  # type: ignore[no-any-return]


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """ColumnParallelLinear over a quantized weight, [outputs/tp, inputs]."""


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """RowParallelLinear over a quantized weight, [outputs, inputs/tp]."""


class RestoredWeights(Sequence[Tensor]):
    """The weights of several experts, each restored when it is taken."""

    def __init__(self, weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, index: Any) -> Any:
        return self._weights[index].restored(self._dtype)


class GroupedQuantizedProduct(torch.autograd.Function):
    """`platform.grouped_linear.GroupedLinear` for frozen quantized weights of experts. No communication."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, groups: Groups, weights: Sequence[QuantizedWeight]) -> Tensor:
        ctx.groups, ctx.weights = groups, weights
        return outputs_of(inputs, RestoredWeights(weights, inputs.dtype), groups)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        restored = RestoredWeights(ctx.weights, grad_outputs.dtype)
        return input_gradients(grad_outputs.contiguous(), restored, ctx.groups), None, None


def quantized_weights(model: torch.nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Name, as that of the parameter in its place, and weight of each quantized linear of a rank's model."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}.weight", module.weight
