"""Attention over packed sequences by torch's variable-length flash kernels, called as the operators that they are.

`torch.nn.attention.varlen.varlen_attn` is not used: its arguments differ between torch 2.10, 2.11 and 2.12 (no
`enable_gqa` before 2.12), and since 2.14 it takes cuDNN's kernel instead where queries and keys have equal heads. The
operators have had the same arguments since torch 2.6, take fewer key/value heads without a flag, and choose the
deterministic backward where `torch.use_deterministic_algorithms` asks for it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

FORWARD_ARGUMENTS = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
                     "return_debug_mask")
"""Positional arguments of `aten::_flash_attention_forward`, in order."""
BACKWARD_ARGUMENTS = ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q",
                      "max_k", "dropout_p", "is_causal")
"""Those of `aten::_flash_attention_backward`, before the forward's two results about random numbers (named rng_state
and unused since torch 2.7, philox_seed and philox_offset before)."""
KEYWORDS = ("scale", "window_size_left", "window_size_right")
"""Keyword-only arguments that both are given."""
FORWARD_RESULTS, BACKWARD_RESULTS = 5, 3
CAUSAL, ALL_TOKENS = (-1, 0), (-1, -1)
"""Windows of `flash_attention` without a bound."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float,
                    window: tuple[int, int]) -> Tensor:
    """Attention of every sequence within itself, without dropout.

    Args:
        query: [tokens, heads, head_dim] float16 or bfloat16 on a GPU, head_dim a multiple of 8 and at most 256.
        key: [tokens, groups, head_dim], as `value`; heads is a multiple of groups.
        cu_seqlens: [sequences + 1] int32 on the device, from 0 to tokens.
        longest: tokens of the longest sequence.
        window: (tokens before, tokens after) that a token sees besides itself; -1: all.
    Returns:
        [tokens, heads, head_dim] of the query's dtype.
    """
    output: Tensor = _FlashAttention.apply(query, key, value, cu_seqlens, longest, scale, window)
    return output


class _FlashAttention(torch.autograd.Function):
    """Both operators, as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float,
                window: tuple[int, int]) -> Tensor:
        ctx.options = {"scale": scale, "window_size_left": window[0], "window_size_right": window[1]}
        ctx.longest, ctx.is_causal = longest, window == CAUSAL
        output, logsumexp, rng_state, unused, _ = forward_operator()(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.0, ctx.is_causal, False,
            **ctx.options)
        # Without dropout a kernel may leave these undefined; the backward's schema asks for tensors.
        rng_state, unused = (query.new_empty(0) if tensor is None else tensor for tensor in (rng_state, unused))
        ctx.save_for_backward(query, key, value, output, logsumexp, cu_seqlens, rng_state, unused)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, cu_seqlens, rng_state, unused = ctx.saved_tensors
        gradients = backward_operator()(gradient, *tensors, cu_seqlens, cu_seqlens, ctx.longest, ctx.longest, 0.0,
                                        ctx.is_causal, rng_state, unused, **ctx.options)
        return *gradients, None, None, None, None


def forward_operator() -> Any:
    """torch's operator; raises AttributeError if there is none."""
    return torch.ops.aten._flash_attention_forward.default


def backward_operator() -> Any:
    """torch's operator; raises AttributeError if there is none."""
    return torch.ops.aten._flash_attention_backward.default


@functools.cache
def why_no_flash() -> str | None:
    """A clause that says why this torch's flash operators cannot be used; None if they can."""
    parts = (("_flash_attention_forward", forward_operator, FORWARD_ARGUMENTS, 0, FORWARD_RESULTS),
             ("_flash_attention_backward", backward_operator, BACKWARD_ARGUMENTS, 2, BACKWARD_RESULTS))
    for name, operator, arguments, more, results in parts:
        try:
            schema = operator()._schema
        except AttributeError:
            return f"torch {torch.__version__} has no operator aten::{name}"
        if not takes(schema, arguments, more=more, results=results):
            return f"torch {torch.__version__} has other arguments or results in {schema}"
    return None


def takes(schema: Any, arguments: tuple[str, ...], *, more: int, results: int) -> bool:
    """Whether an operator of `schema` can be called with `arguments` and `more` of other names in this order, and with
    KEYWORDS, and returns `results` tensors; what else it has must have defaults."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    named = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    others_have_defaults = all(argument.has_default_value() for name, argument in named.items()
                               if name not in KEYWORDS)
    return (tuple(positional[:len(arguments)]) == arguments and len(positional) == len(arguments) + more
            and named.keys() >= set(KEYWORDS) and others_have_defaults and len(schema.returns) == results)
