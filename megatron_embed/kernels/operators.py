"""Operators of torch's dispatcher for the fused kernels: `torch.ops.megatron_embed.*`, one kernel launch each.

On a GPU they are Triton kernels (triton_norm.py, triton_rotary.py, triton_activation.py). What counts or replaces
operators - a profiler, fake tensors, the pretend device of the tests - sees them under these names.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_embed.kernels import reference

NAMESPACE = "megatron_embed"
SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "rms_norm_backward": "(Tensor gradient, Tensor x, Tensor weight, Tensor rstd, Tensor? residual_gradient, "
                         "bool needs_weight) -> (Tensor, Tensor)",
    "qkv_rotary": "(Tensor mixed, Tensor cos_sin, Tensor? q_weight, Tensor? k_weight, int heads, float eps) -> "
                  "(Tensor, Tensor, Tensor)",
    "qkv_rotary_backward": "(Tensor q_gradient, Tensor k_gradient, Tensor v_gradient, Tensor cos_sin, Tensor? mixed, "
                           "Tensor? q_weight, Tensor? k_weight, Tensor rstd) -> (Tensor, Tensor)",
    "glu": "(Tensor x, str activation) -> Tensor",
    "glu_backward": "(Tensor gradient, Tensor x, str activation) -> Tensor",
    "weighted_glu": "(Tensor x, Tensor weights, str activation) -> Tensor",
    "weighted_glu_backward": "(Tensor gradient, Tensor x, Tensor weights, str activation) -> (Tensor, Tensor)",
    "bias_activation": "(Tensor x, Tensor bias, str activation) -> Tensor",
    "bias_activation_backward": "(Tensor gradient, Tensor x, Tensor bias, str activation) -> Tensor",
}
PARTS = 256
"""Programs of a backward kernel, each of which sums its rows' share of a weight's gradient: about two for each
multiprocessor of an H100."""

_library = torch.library.Library(NAMESPACE, "DEF")


def _define() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(f"{name}{schema}")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _SHAPES[name], lib=_library)


def kernel(name: str, fused: bool) -> Callable[..., Any]:
    """The operator, or the plain function of the same arguments and results."""
    return operator.attrgetter(name)(torch.ops.megatron_embed if fused else reference)  # type: ignore[no-any-return]


@functools.cache
def why_no_kernels() -> str | None:
    """A clause that says why there are no fused kernels for this GPU; None after registering them, if there are."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    # The pretend device of the tests has registered its own.
    if all(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA") for name in SCHEMAS):
        return None
    try:
        from megatron_embed.kernels.triton_launch import LAUNCHERS
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    for name, launcher in LAUNCHERS.items():
        _library.impl(name, launcher, "CUDA")
    return None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_rms_norm(x, weight, eps)


def _rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_gradient: Tensor | None,
                       needs_weight: bool) -> tuple[Tensor, Tensor]:
    parts = min(PARTS, rstd.numel()) if needs_weight else 0
    return torch.empty_like(x), x.new_empty(parts, x.shape[-1], dtype=torch.float32)


def _qkv_rotary(mixed: Tensor, cos_sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int,
                eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, _, head_dim = mixed.shape
    return (mixed.new_empty(tokens, heads, head_dim), mixed.new_empty(tokens, groups, head_dim),
            mixed.new_empty(tokens if q_weight is not None else 0, heads + groups, dtype=torch.float32))


def _qkv_rotary_backward(q_gradient: Tensor, k_gradient: Tensor, v_gradient: Tensor, cos_sin: Tensor,
                         mixed: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
                         rstd: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, heads, head_dim), groups = q_gradient.shape, k_gradient.shape[1]
    parts = 0 if mixed is None else min(PARTS, tokens)
    return (q_gradient.new_empty(tokens, groups, heads // groups + 2, head_dim),
            q_gradient.new_empty(parts, 2, head_dim, dtype=torch.float32))


def _glu(x: Tensor, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


_SHAPES: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rms_norm_backward": _rms_norm_backward,
    "qkv_rotary": _qkv_rotary, "qkv_rotary_backward": _qkv_rotary_backward, "glu": _glu,
    "glu_backward": lambda gradient, x, activation: torch.empty_like(x),
    "weighted_glu": lambda x, weights, activation: _glu(x, activation),
    "weighted_glu_backward": lambda gradient, x, weights, activation: (torch.empty_like(x), torch.empty_like(weights)),
    "bias_activation": lambda x, bias, activation: torch.empty_like(x),
    "bias_activation_backward": lambda gradient, x, bias, activation: torch.empty_like(x)}

_define()
