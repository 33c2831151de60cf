"""Triton kernels of RMSNorm, with the residual's addition before it and the residual's gradient after it.

Never run on a GPU; `tests/kernels/test_triton.py` runs them in Triton's interpreter against reference.py.
"""

# Triton's functions take pointers, and compile-time constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_embed.kernels.operators import PARTS


@triton.jit
def _forward(x_ptr, residual_ptr, weight_ptr, total_ptr, normed_ptr, rstd_ptr, width, eps,
             HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """One row: total = residual + x, rstd, normed = weight * total * rstd, each rounded to x's dtype."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    offsets = row * width + columns
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    values = x.to(tl.float32)
    if HAS_RESIDUAL:
        total = (values + tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + offsets, total, mask=inside)
        values = total.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normalized = (values * rstd).to(x.dtype).to(tl.float32)
    tl.store(normed_ptr + offsets, (weight * normalized).to(x.dtype), mask=inside)


@triton.jit
def _backward(gradient_ptr, x_ptr, weight_ptr, rstd_ptr, residual_gradient_ptr, grad_x_ptr, parts_ptr, rows, width,
              steps, HAS_RESIDUAL: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Every PARTS-th row: the gradient of x; and the sum over those rows of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(steps):
        row = program + step * tl.num_programs(0)
        held = columns < tl.where(row < rows, width, 0)
        offsets = row * width + columns
        x = tl.load(x_ptr + offsets, mask=held, other=0.0)
        gradient = tl.load(gradient_ptr + offsets, mask=held, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normalized = x.to(tl.float32) * rstd
        if NEEDS_WEIGHT:
            part += gradient * normalized
        scaled = gradient * weight
        grad_x = rstd * (scaled - normalized * (tl.sum(scaled * normalized, axis=0) / width))
        if HAS_RESIDUAL:
            grad_x += tl.load(residual_gradient_ptr + offsets, mask=held, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, grad_x.to(x.dtype), mask=held)
    if NEEDS_WEIGHT:
        tl.store(parts_ptr + program * width + columns, part, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    x = x.contiguous()
    normed, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel():
        _forward[(rstd.numel(),)](x, x, weight, x, normed, rstd, x.shape[-1], eps, HAS_RESIDUAL=False,
                                  **_block(x.shape[-1]))
    return normed, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    x, residual = x.contiguous(), residual.contiguous()
    total, normed, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel():
        _forward[(rstd.numel(),)](x, residual, weight, total, normed, rstd, x.shape[-1], eps, HAS_RESIDUAL=True,
                                  **_block(x.shape[-1]))
    return total, normed, rstd


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_gradient: Tensor | None,
                      needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Launch of one kernel; see reference.py."""
    gradient, x, rows, width = gradient.contiguous(), x.contiguous(), rstd.numel(), x.shape[-1]
    other = gradient if residual_gradient is None else residual_gradient.contiguous()
    grad_x, programs = torch.empty_like(x), min(PARTS, rows)
    steps = triton.cdiv(rows, max(1, programs))
    parts = x.new_empty(programs if needs_weight else 0, width, dtype=torch.float32)
    if rows:
        _backward[(programs,)](gradient, x, weight, rstd, other, grad_x, parts, rows, width, steps,
                               HAS_RESIDUAL=residual_gradient is not None, NEEDS_WEIGHT=needs_weight, **_block(width))
    return grad_x, parts


def _block(width: int) -> dict[str, Any]:
    """A row's block, and warps for eight or more numbers per thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(32, max(1, block // 256))}
