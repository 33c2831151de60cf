"""Context parallelism by heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): before attention every rank
gives its tokens of all heads for all tokens of its heads, and takes its tokens back after it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def split_heads(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [tokens/cp, heads, head_dim], keys and values [tokens/cp, groups, head_dim] of this rank's two chunks ->
    [tokens, heads/cp, head_dim] and [tokens, groups/cp, head_dim] in the bin's order.

    One all-to-all over the context-parallel group, and another in the backward pass.
    """
    size = group.size()
    parts = [tensor.unflatten(1, (size, -1)) for tensor in (query, key, value)]
    widths = [part.shape[2] for part in parts]
    gathered: Tensor = _TokensToHeads.apply(torch.cat(parts, dim=2).transpose(0, 1), group)
    query, key, value = gathered.split(widths, dim=1)
    return query, key, value


def join_heads(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, heads/cp * head_dim] in the bin's order -> [tokens/cp, heads * head_dim] of this rank's two chunks: the
    way back of `split_heads`, with the same communication."""
    own: Tensor = _HeadsToTokens.apply(output, group)
    return own.transpose(0, 1).flatten(1)


class _TokensToHeads(torch.autograd.Function):
    """[cp, tokens/cp, ...], a part for each rank -> [tokens, ...] of this rank's parts, in the bin's order."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _in_order(_exchanged(parts, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _exchanged(_by_rank(gradient, ctx.group.size()), ctx.group), None


class _HeadsToTokens(torch.autograd.Function):
    """The inverse and transpose of _TokensToHeads."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(_by_rank(tokens, group.size()), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _in_order(_exchanged(gradient, ctx.group)), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[cp, ...]: part r goes to rank r, and comes from it."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _in_order(by_rank: Tensor) -> Tensor:
    """[cp, tokens/cp, ...], two chunks of every rank -> [tokens, ...]. Rank r holds chunks r and 2 cp - 1 - r."""
    first, second = by_rank.unflatten(1, (2, -1)).unbind(1)
    return torch.cat([first, second.flip(0)]).flatten(0, 1)


def _by_rank(tokens: Tensor, size: int) -> Tensor:
    """[tokens, ...] -> [cp, tokens/cp, ...], the inverse of `_in_order`."""
    first, second = tokens.unflatten(0, (2, size, -1)).unbind(0)
    return torch.cat([first, second.flip(0)], dim=1)
