"""The fused kernels' mathematics in plain operators: what CPU ranks compute, and what the kernels are tested against.

Half-precision inputs are computed in float32 and rounded where Transformers rounds, so that served models give the same
vectors. Gradients are rounded once, at the end. A product of a half-precision and a float32 tensor is float32, without
a copy of the former.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu, "gelu_tanh": _gelu_tanh, "relu": functional.relu, "silu": functional.silu}


def wide(x: Tensor) -> Tensor:
    """Half precision in float32, anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., width] -> (weight * x / rms(x), 1 / rms(x) [...] in float32).

    A weight of x's dtype multiplies what is rounded to it, as in Llama, one in float32 before that, as in Gemma.
    """
    rstd = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    normalized = x * rstd
    if weight.dtype == x.dtype:
        return weight * normalized.to(x.dtype), rstd.squeeze(-1)
    return (weight * normalized).to(x.dtype), rstd.squeeze(-1)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(residual + x, its norm, 1 / rms of it)."""
    total = residual + x
    return total, *rms_norm(total, weight, eps)


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_gradient: Tensor | None,
                      needs_weight: bool) -> tuple[Tensor, Tensor]:
    """(gradient of x, with `residual_gradient` added, parts of the weight's [parts, width] in float32, to be summed;
    no parts if it needs none)."""
    grad_x, part = _norm_gradient(gradient, x, weight, rstd)
    if residual_gradient is not None:
        grad_x = grad_x + residual_gradient
    return grad_x.to(x.dtype), part if needs_weight else part[:0]


def qkv_rotary(mixed: Tensor, cos_sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int,
               eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [tokens, heads, head_dim] and keys [tokens, groups, head_dim], after their norms if these have
    weights, and 1 / rms of both [tokens, heads + groups] in float32 (empty without norms).

    Args:
        mixed: [tokens, groups, heads / groups + 2, head_dim]: the queries of a group, its key, its value.
        cos_sin: [2, tokens, head_dim / 2] of mixed's dtype.
    """
    tokens, groups, _, head_dim = mixed.shape
    query, key = mixed[:, :, :-2].reshape(tokens, heads, head_dim), mixed[:, :, -2]
    rstd = mixed.new_empty(0, heads + groups, dtype=torch.float32)
    if q_weight is not None and k_weight is not None:
        (query, q_rstd), (key, k_rstd) = rms_norm(query, q_weight, eps), rms_norm(key, k_weight, eps)
        rstd = torch.cat((q_rstd, k_rstd), dim=1)
    cos, sin = cos_sin.unbind()
    return _rotate(query, cos, sin), _rotate(key, cos, sin), rstd


def qkv_rotary_backward(q_gradient: Tensor, k_gradient: Tensor, v_gradient: Tensor, cos_sin: Tensor,
                        mixed: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
                        rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of mixed, parts of those of the two weights [parts, 2, head_dim] in float32, to be summed).

    `mixed` is None without norms.
    """
    (tokens, heads, head_dim), groups = q_gradient.shape, k_gradient.shape[1]
    cos, sin = wide(cos_sin).unbind()
    grad_q, grad_k = _rotate(q_gradient, cos, -sin), _rotate(k_gradient, cos, -sin)
    parts = grad_q.new_empty(0, 2, head_dim)
    if mixed is not None and q_weight is not None and k_weight is not None:
        query, key = mixed[:, :, :-2].reshape(tokens, heads, head_dim), mixed[:, :, -2]
        grad_q, q_part = _norm_gradient(grad_q, query, q_weight, rstd[:, :heads])
        grad_k, k_part = _norm_gradient(grad_k, key, k_weight, rstd[:, heads:])
        parts = torch.stack((q_part, k_part), dim=1)
    gradient = q_gradient.new_empty(tokens, groups, heads // groups + 2, head_dim)
    gradient[:, :, :-2] = grad_q.view(tokens, groups, -1, head_dim)
    gradient[:, :, -2], gradient[:, :, -1] = grad_k, v_gradient
    return gradient, parts


def glu(x: Tensor, activation: str) -> Tensor:
    """[..., 2 * width] -> activation(first half) * second half."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def glu_backward(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    """Gradient of both halves."""
    gate, up = x.chunk(2, dim=-1)
    grad = torch.empty_like(x)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(gradient, ACTIVATIONS[activation](gate), out=grad_up)
    _activation_gradient(gradient * up, gate, activation, grad_gate)
    return grad


def weighted_glu(x: Tensor, weights: Tensor, activation: str) -> Tensor:
    """[rows, 2 * width] and a weight of each row, float32 -> `glu`, rounded, times the weight."""
    return (glu(x, activation) * weights[:, None]).to(x.dtype)


def weighted_glu_backward(gradient: Tensor, x: Tensor, weights: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of both halves, gradient of the weights)."""
    of_weights = (wide(gradient) * glu(x, activation)).sum(-1)
    return glu_backward((gradient * weights[:, None]).to(x.dtype), x, activation), of_weights.to(weights.dtype)


def bias_activation(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x + bias)."""
    return ACTIVATIONS[activation](x + bias)


def bias_activation_backward(gradient: Tensor, x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Gradient of x; that of the bias is its sum over the rows."""
    return _activation_gradient(gradient, x + bias, activation, torch.empty_like(x))


def _activation_gradient(gradient: Tensor, x: Tensor, activation: str, out: Tensor) -> Tensor:
    """`out`, filled with gradient * activation'(x)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, x, grad_input=out)  # type: ignore[no-any-return]
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, x, 0, grad_input=out)  # type: ignore[no-any-return]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(  # type: ignore[no-any-return]
        gradient, x, approximate=approximate, grad_input=out)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair (i, i + head_dim / 2) of [tokens, heads, head_dim] rotated by its angle."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight [1, width], both in float32 (or wider)."""
    rstd = rstd.unsqueeze(-1)
    normalized = x * rstd
    part = (gradient * normalized).flatten(0, -2).sum(0, keepdim=True)
    scaled = gradient * wide(weight)
    return rstd * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)), part
