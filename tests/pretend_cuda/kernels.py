"""The fused kernels, and cuBLAS's product that adds to a float32 matrix, by plain operators on the same memory.

On a processor without bfloat16 instructions, products of bfloat16 matrices are computed in float32 and rounded once, as
a GPU does: element by element they take 25 times as long.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_embed.kernels import operators
from megatron_embed.platform.bf16_support import processor_has_bf16

_libraries: list[torch.library.Library] = []


def install(to_host_alias: Callable[[Tensor], Tensor], to_device_alias: Callable[[Tensor], Tensor]) -> None:
    """Registers both for the device; its tensors and the host's share memory by these functions."""
    products = torch.library.Library("aten", "IMPL")
    kernels = torch.library.Library(operators.NAMESPACE, "IMPL")

    def add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: float = 1,
                    alpha: float = 1, out: Tensor) -> Tensor:
        _check((total, left, right, out))
        assert out is total or out.data_ptr() == total.data_ptr(), "it is copied first: two operations, not one product"
        assert left.dtype == right.dtype == torch.bfloat16 and total.dtype == dtype == torch.float32
        to_host_alias(out).mul_(beta).add_(to_host_alias(left).float() @ to_host_alias(right).float(), alpha=alpha)
        return out

    def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **numbers: Any) -> Any:
            _check(arguments)
            result = function(*tree_map_only(Tensor, to_host_alias, arguments), **numbers)
            return tree_map_only(Tensor, to_device_alias, result)

        return call

    products.impl("addmm.dtype_out", add_product, "CUDA")
    if not processor_has_bf16():
        for name, product in PRODUCTS.items():
            products.impl(name, on_device(product), "CUDA")
    for name in operators.SCHEMAS:
        kernels.impl(name, on_device(operators.kernel(name, fused=False)), "CUDA")
    _libraries.extend((products, kernels))


def _widened(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator, computed in float32 for bfloat16 matrices."""

    def compute(first: Tensor, *others: Tensor, **numbers: Any) -> Tensor:
        if first.dtype != torch.bfloat16:
            return operator(first, *others, **numbers)
        return operator(first.float(), *(other.float() for other in others), **numbers).to(first.dtype)

    return compute


PRODUCTS = {name: _widened(vars(torch)[name]) for name in ("mm", "addmm", "bmm", "baddbmm")}


def _check(arguments: Any) -> None:
    """As a launch on a GPU refuses a pointer to the host's memory."""
    devices = {leaf.device.type for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    if devices != {"cuda"}:
        raise RuntimeError(f"Expected all tensors to be on the same device, but got {sorted(devices)}")
