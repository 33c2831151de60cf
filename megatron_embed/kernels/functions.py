"""Element-wise work of a layer as differentiable functions: norms, rotary positions, activations.

`fused`: by one kernel on the GPU (operators.py); otherwise by plain operators (reference.py). Forward and backward are
written out, so either way autograd keeps the same few tensors. Nothing here communicates.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_embed.kernels.operators import kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, fused: bool) -> Tensor:
    """[..., width] -> the same: weight * x / sqrt(mean of squares + eps) (Zhang and Sennrich 2019, arXiv:1910.07467).

    In float32, and rounded to x's dtype before the weight, as in Transformers.
    """
    return _RMSNorm.apply(x, None, weight, eps, fused)[1]  # type: ignore[no-any-return,no-untyped-call]


def rms_norm_of_sum(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *,
                    fused: bool) -> tuple[Tensor, Tensor]:
    """(residual + x, or x if there is no residual; its `rms_norm`).

    With the first result used as the next residual, the backward kernel also adds the residual's gradient.
    """
    return _RMSNorm.apply(x, residual, weight, eps, fused)  # type: ignore[no-any-return,no-untyped-call]


def qkv_rotary(mixed: Tensor, cos_sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int,
               eps: float, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [tokens, heads, head_dim], keys and values [tokens, groups, head_dim] of a projection, queries and keys
    normalized per head if the norms' weights [head_dim] are given, and rotated (Su et al. 2021, arXiv:2104.09864).

    Args:
        mixed: [tokens, groups, heads / groups + 2, head_dim]: the queries of a group, its key, its value.
        cos_sin: [2, tokens, head_dim / 2] of mixed's dtype, see `rope.rotary_cos_sin`.
    """
    return _QKVRotary.apply(mixed, cos_sin, q_weight, k_weight, heads, eps, fused)  # type: ignore


def partial_rotary(mixed: Tensor, cos_sin: Tensor, heads: int, *, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_rotary` without norms, in plain operators, for the first dimensions of a head alone.

    Args:
        cos_sin: [2, tokens, rotated dimensions / 2].
        interleaved: dimensions 2i and 2i + 1 are rotated together, not i and i + half of the rotated ones.
    """
    tokens, _, _, head_dim = mixed.shape
    rotated = 2 * cos_sin.shape[-1]
    cos, sin = cos_sin[:, :, None].unbind()

    def rotate(x: Tensor) -> Tensor:
        turned, kept = x.split((rotated, head_dim - rotated), dim=-1)
        first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
        pairs = first * cos - second * sin, second * cos + first * sin
        return torch.cat((torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1), kept),
                         dim=-1)

    return rotate(mixed[:, :, :-2].reshape(tokens, heads, head_dim)), rotate(mixed[:, :, -2]), mixed[:, :, -1]


def glu(x: Tensor, activation: str, *, fused: bool) -> Tensor:
    """Gated linear unit (Shazeer 2020, arXiv:2002.05202): [..., 2 * width] -> activation(first half) * second half.

    Its backward computes the activation again. `activation`: a key of `reference.ACTIVATIONS`.
    """
    return _GLU.apply(x, activation, fused)  # type: ignore[no-any-return,no-untyped-call]


def weighted_glu(x: Tensor, weights: Tensor, activation: str, *, fused: bool) -> Tensor:
    """`glu` of [rows, 2 * width], times a weight of each row: [rows] in float32, the router's for experts."""
    return _WeightedGLU.apply(x, weights, activation, fused)  # type: ignore[no-any-return,no-untyped-call]


def bias_activation(x: Tensor, bias: Tensor, activation: str, *, fused: bool) -> Tensor:
    """activation(x + bias): [..., width] and [width]. Keeps x only."""
    return _BiasActivation.apply(x, bias, activation, fused)  # type: ignore[no-any-return,no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """(sum, norm) of a tensor and perhaps a residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
                fused: bool) -> tuple[Tensor, Tensor]:
        ctx.fused, ctx.has_residual = fused, residual is not None
        if residual is None:
            total = x.view_as(x)
            normed, rstd = kernel("rms_norm", fused)(x, weight, eps)
        else:
            total, normed, rstd = kernel("add_rms_norm", fused)(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor | None,  # type: ignore[override]
                 gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = total_gradient, None
        if gradient is not None:
            grad_x, parts = kernel("rms_norm_backward", ctx.fused)(
                gradient, total, weight, rstd, total_gradient, ctx.needs_input_grad[2])
            grad_weight = parts.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_x if ctx.has_residual else None, grad_weight, None, None


class _QKVRotary(torch.autograd.Function):
    """(queries, keys, values) of a projection. The values are a view of it."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos_sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int,
                eps: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, key, rstd = kernel("qkv_rotary", fused)(mixed, cos_sin, q_weight, k_weight, heads, eps)
        ctx.save_for_backward(cos_sin, mixed if q_weight is not None else None, q_weight, k_weight, rstd)
        ctx.fused = fused
        return query, key, mixed[:, :, -1]

    @staticmethod
    def backward(ctx: Any, q_gradient: Tensor, k_gradient: Tensor,  # type: ignore[override]
                 v_gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos_sin, mixed, q_weight, k_weight, rstd = ctx.saved_tensors
        gradient, parts = kernel("qkv_rotary_backward", ctx.fused)(
            q_gradient, k_gradient, v_gradient, cos_sin, mixed, q_weight, k_weight, rstd)
        grad_q = grad_k = None
        if q_weight is not None:
            grad_q, grad_k = parts.sum(0).to(q_weight.dtype).unbind()
        return gradient, None, grad_q, grad_k, None, None, None


class _GLU(torch.autograd.Function):
    """Gated linear unit that keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, fused: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation, ctx.fused = activation, fused
        return kernel("glu", fused)(x, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return kernel("glu_backward", ctx.fused)(gradient, x, ctx.activation), None, None


class _WeightedGLU(torch.autograd.Function):
    """Gated linear unit times a weight of each row that keeps these two only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, activation: str, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.activation, ctx.fused = activation, fused
        return kernel("weighted_glu", fused)(x, weights, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights = ctx.saved_tensors
        return *kernel("weighted_glu_backward", ctx.fused)(gradient, x, weights, ctx.activation), None, None


class _BiasActivation(torch.autograd.Function):
    """Activation of a sum with a bias that keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, activation: str, fused: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.activation, ctx.fused = activation, fused
        return kernel("bias_activation", fused)(x, bias, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        grad_x = kernel("bias_activation_backward", ctx.fused)(gradient, x, bias, ctx.activation)
        grad_bias = grad_x.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None
