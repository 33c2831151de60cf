"""Flash attention of the tokens that a rank holds: which keys each of its chunks needs, and both passes over them.

Under context parallelism a rank holds two chunks of the bin, which begin and end within sequences. It gathers keys and
values of the whole bin over the context-parallel group, and each chunk is one call of the kernels: its queries, and the
keys that the mask shows them. Only the rank's own keys and values are kept for the backward pass, which gathers them
again and returns each rank the sum of its tokens' gradients: memory per rank shrinks with the number of ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.platform.compat import tensor_parallel
from megatron_embed.platform.flash_attention import (
    ALL_TOKENS,
    CAUSAL,
    FlashCall,
    FlashState,
    flash_backward,
    flash_forward,
)


def flash_calls(cu_seqlens: Tensor, chunks: tuple[tuple[int, int], ...], causal: bool,
                window: tuple[int, int] | None = None) -> tuple[FlashCall, ...]:
    """Calls that compute the attention of a rank's tokens; none for a chunk of padding.

    Args:
        cu_seqlens: [sequences + 1] int32 on the CPU.
        chunks: bin tokens [start, stop) held by this rank, in local order.
        window: (tokens before, tokens after) that a token sees besides itself; None: all, or all before it if `causal`.
    """
    bounds, span = cu_seqlens.to(torch.int64), window or (CAUSAL if causal else ALL_TOKENS)
    calls: list[FlashCall] = []
    local = 0
    for first, stop in chunks:
        held = (bounds[:-1] < stop) & (bounds[1:] > first) & (bounds[1:] > bounds[:-1])
        if bool(held.any()):
            calls += _chunk_calls(bounds[:-1][held], bounds[1:][held], (first, stop), local, span)
        local += stop - first
    return tuple(calls)


def _chunk_calls(starts: Tensor, ends: Tensor, chunk: tuple[int, int], local: int,
                 span: tuple[int, int]) -> list[FlashCall]:
    """Calls for the sequences [starts, ends) that touch a chunk, whose first token is the rank's token `local`."""
    before, after = span
    query_starts, query_ends = starts.clamp(min=chunk[0]), ends.clamp(max=chunk[1])
    # All keys within the window; of the sequences between the first and the last one these are all.
    key_starts = starts if before < 0 else torch.maximum(starts, query_starts - before)
    key_ends = ends if after < 0 else torch.minimum(ends, query_ends + after)
    bounds, shift = torch.stack([query_starts, query_ends, key_starts, key_ends]), local - chunk[0]
    beyond = int(key_ends[-1] - query_ends[-1])
    if not beyond or span == ALL_TOKENS:
        return [_call(bounds, shift, span)]
    # The last sequence goes on behind the chunk, and the kernel would align its last query with its last key.
    moved = (before if before < 0 else before + beyond, after if after < 0 else after - beyond)
    whole = [_call(bounds[:, :-1], shift, span)] if bounds.shape[1] > 1 else []
    return [*whole, _call(bounds[:, -1:], shift, moved)]


def _call(bounds: Tensor, shift: int, window: tuple[int, int]) -> FlashCall:
    """`bounds`: [4, sequences], query starts and ends, key starts and ends, all in the bin's tokens."""
    query_starts, query_ends, key_starts, key_ends = bounds
    queries, keys = (int(query_starts[0]), int(query_ends[-1])), (int(key_starts[0]), int(key_ends[-1]))
    cu_queries = torch.cat([query_starts, query_ends[-1:]]).sub_(queries[0]).to(torch.int32)
    cu_keys = torch.cat([key_starts, key_ends[-1:]]).sub_(keys[0]).to(torch.int32)
    return FlashCall(
        queries=(queries[0] + shift, queries[1] + shift), keys=keys, cu_queries=cu_queries,
        cu_keys=cu_queries if torch.equal(cu_queries, cu_keys) else cu_keys,
        longest_queries=int((query_ends - query_starts).max()), longest_keys=int((key_ends - key_starts).max()),
        window=window)


@dataclass(frozen=True, kw_only=True)
class FlashSettings:
    """Settings of the attention of a layer."""

    scale: float
    dropout: float
    cp_group: Any
    """The context-parallel group, over which keys and values are gathered; None if it has one rank."""


def flash_attention(query: Tensor, key: Tensor, value: Tensor, calls: tuple[FlashCall, ...],
                    settings: FlashSettings) -> Tensor:
    """[tokens/cp, heads, head_dim] attention of this rank's tokens, 0 for padding; of the query's dtype.

    Communicates over the context-parallel group: one all-gather forward, one all-gather and one reduce-scatter
    backward.

    Args:
        query: [tokens/cp, heads, head_dim], see `flash_forward`.
        key: [tokens/cp, groups, head_dim], as `value`.
        calls: see `flash_calls`; the same on every tensor-parallel rank, others on each context-parallel one.
    """
    output: Tensor = _FlashAttention.apply(query, key, value, calls, settings)
    return output


class _FlashAttention(torch.autograd.Function):
    """Both operators and the communication, as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: tuple[FlashCall, ...],
                settings: FlashSettings) -> Tensor:
        keys, values = gather_bin(key, value, settings.cp_group)
        outputs, states = [], []
        for call in calls:
            output, state = flash_forward(query, keys, values, call, scale=settings.scale, dropout=settings.dropout)
            outputs.append(output)
            states.append(state)
        joined = _joined(outputs, [call.queries for call in calls], query)
        ctx.calls, ctx.settings = calls, settings
        ctx.save_for_backward(query, key, value, joined,
                              *(tensor for state in states for tensor in (state.logsumexp, *state.rng)))
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, *states = ctx.saved_tensors
        settings: FlashSettings = ctx.settings
        keys, values = gather_bin(key, value, settings.cp_group)
        parts = []
        for index, call in enumerate(ctx.calls):
            logsumexp, *rng = states[3 * index:3 * index + 3]
            parts.append(flash_backward(
                gradient, (query, keys, values, output), FlashState(logsumexp=logsumexp, rng=(rng[0], rng[1])), call,
                scale=settings.scale, dropout=settings.dropout))
        d_query = _joined([part[0] for part in parts], [call.queries for call in ctx.calls], query)
        spans = [call.keys for call in ctx.calls]
        if settings.cp_group is None:
            return d_query, *(_joined([part[which] for part in parts], spans, key) for which in (1, 2)), None, None
        # Chunks share keys: theirs and those of other ranks are added up.
        d_both = key.new_zeros(len(keys), *key.shape[1:-1], 2 * key.shape[-1])
        for part, (first, stop) in zip(parts, spans, strict=True):
            for half, made in zip(d_both.chunk(2, dim=-1), part[1:], strict=True):
                half[first:stop].add_(made)
        return d_query, *scatter_bin(d_both, settings.cp_group).chunk(2, dim=-1), None, None


def _joined(parts: list[Tensor], spans: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Parts at their ascending spans of tokens, zeros elsewhere; of the shape of `like`."""
    pieces, end = [], 0
    for part, (first, stop) in zip([*parts, None], [*spans, (len(like), len(like))], strict=True):
        if first > end:
            pieces.append(like.new_zeros(first - end, *like.shape[1:]))
        if part is not None:
            pieces.append(part)
        end = stop
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def gather_bin(key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """[tokens/cp, groups, head_dim] of this rank's two chunks -> [tokens, groups, head_dim] in the bin's order, by one
    all-gather over the context-parallel group (backward: one reduce-scatter); as they are without a group."""
    if group is None:
        return key, value
    both = torch.cat([key, value], dim=-1)
    gathered = tensor_parallel.gather_from_sequence_parallel_region(both, group=group)
    # Rank r holds chunks r and 2*cp-1-r: first halves ascend, second halves descend.
    chunks = gathered.chunk(2 * group.size())
    whole = torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
    return whole.chunk(2, dim=-1)  # type: ignore[return-value]


def scatter_bin(whole: Tensor, group: Any) -> Tensor:
    """[tokens, ...] in the bin's order, each rank's own -> [tokens/cp, ...], the sum over the ranks for this rank's two
    chunks: the transpose of `gather_bin`, by one reduce-scatter."""
    chunks = whole.chunk(2 * group.size())
    by_rank = torch.cat([chunk for pair in zip(chunks, reversed(chunks), strict=True) for chunk in pair][:len(chunks)])
    scattered: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(by_rank, group=group)
    return scattered
