"""Attention of a long segment on a CPU in memory that grows with its tokens: no mask of all pairs is formed.

torch's flash kernel for CPUs knows two masks, everything and the triangle of as many queries as keys. A segment is
computed in parts that need no others: under a causal mask the keys before the first query, and the triangle behind
them, whose results are joined by their log-sum-exp; within a window, blocks of queries, each with a small mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.models.segments import LongSegment

BLOCK = 512
"""Queries of a block within a window."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One call of the kernel."""

    queries: slice
    keys: slice
    is_causal: bool = False
    masked: bool = False


def long_attention(query: Tensor, key: Tensor, value: Tensor, segment: LongSegment, scale: float) -> Tensor:
    """[1, heads, queries, head_dim] attention of a segment, with gradients; no dropout, no communication."""
    output: Tensor = _LongAttention.apply(query, key, value, segment, scale)
    return output


def _parts(segment: LongSegment, queries: int, keys: int) -> list[_Part]:
    if segment.window is None:
        assert segment.causal and keys == segment.offset + queries
        triangle = _Part(queries=slice(0, queries), keys=slice(segment.offset, keys), is_causal=True)
        return [triangle] + ([_Part(queries=slice(0, queries), keys=slice(0, segment.offset))]
                             if segment.offset else [])
    parts = []
    for first in range(0, queries, BLOCK):
        stop = min(first + BLOCK, queries)
        parts.append(_Part(queries=slice(first, stop), keys=slice(*segment.keys_of(first, stop, keys)), masked=True))
    return parts


def _mask(part: _Part, segment: LongSegment, like: Tensor) -> Tensor | None:
    """[queries, keys] of the dtype of `like`: 0 where a query sees a key, -inf elsewhere; None: the kernel's own."""
    if not part.masked:
        return None
    seen = segment.mask(part.queries.stop - part.queries.start, part.keys.stop - part.keys.start, like.device,
                        first_query=part.queries.start, first_key=part.keys.start)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


class _LongAttention(torch.autograd.Function):
    """All parts as one differentiable function, which keeps its inputs, its output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segment: LongSegment, scale: float) -> Tensor:
        output, sums = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf)
        for part in _parts(segment, query.shape[2], key.shape[2]):
            own, own_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, part.queries], key[:, :, part.keys], value[:, :, part.keys], 0.0, part.is_causal,
                attn_mask=_mask(part, segment, query), scale=scale)
            before, joined = output[:, :, part.queries], sums[:, :, part.queries]
            both = torch.logaddexp(joined, own_sums)
            before.mul_((joined - both).exp_()[..., None]).add_(own * (own_sums - both).exp_()[..., None])
            joined.copy_(both)
        ctx.segment, ctx.scale = segment, scale
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, sums = ctx.saved_tensors
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part in _parts(ctx.segment, query.shape[2], key.shape[2]):
            queries, keys = part.queries, part.keys
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                output[:, :, queries], sums[:, :, queries], 0.0, part.is_causal,
                attn_mask=_mask(part, ctx.segment, query), scale=ctx.scale)
            d_query[:, :, queries].add_(made[0])
            d_key[:, :, keys].add_(made[1])
            d_value[:, :, keys].add_(made[2])
        return d_query, d_key, d_value, None, None
