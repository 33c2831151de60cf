"""SPLADE's pooling (Formal et al. 2021, arXiv:2109.10086): for each token of the vocabulary the largest logit that any
token of a text gives it, then log(1 + relu).

Logits are computed by tiles of tokens, forward and backward; kept are, for each text and token of the vocabulary, which
token won and the slope there. Of equal logits the first token counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.models.pooling import PoolingPlan
from megatron_embed.names import LOGIT_TILE_ELEMENTS

NO_PLACE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one text."""

    text: int
    first: int
    last: int
    """First token, and one after the last."""


def splade_max(states: Tensor, weight: Tensor, bias: Tensor | None, plan: PoolingPlan,
               group: dist.ProcessGroup) -> Tensor:
    """[texts, vocabulary] float32 (float64 of such states): log(1 + relu(largest logit)) of each text.

    Args:
        states: [tokens, hidden], the pooled tokens of `plan`.
        weight: [vocabulary, hidden], or a tensor-parallel rank's share.
        bias: [vocabulary], or None.
        plan: with `pieces` and `places`.
        group: ranks that hold different tokens of the same texts. Two all-reduces of [texts, vocabulary]; backward
            none, as every rank's gradient of the result is complete.
    """
    rows: Tensor = _SpladeMax.apply(states, weight, bias, plan, group)  # type: ignore[no-untyped-call]
    return rows


def _tiles(pieces: tuple[tuple[int, int, int], ...], width: int) -> Iterator[list[Piece]]:
    """The pieces in order, in tiles of at most LOGIT_TILE_ELEMENTS logits, or one token; long ones are divided."""
    most = max(1, LOGIT_TILE_ELEMENTS // max(1, width))
    tile: list[Piece] = []
    for text, first, last in pieces:
        while first < last:
            left = most - (tile[-1].last - tile[0].first if tile else 0)
            if tile and left < min(last - first, most):
                yield tile
                tile, left = [], most
            stop = min(last, first + left)
            tile.append(Piece(text, first, stop))
            first = stop
    if tile:
        yield tile


class _SpladeMax(torch.autograd.Function):
    """See `splade_max`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, plan: PoolingPlan,
                group: dist.ProcessGroup) -> Tensor:
        assert plan.pieces is not None and plan.places is not None
        dtype = torch.promote_types(states.dtype, torch.float32)
        largest = states.new_full((plan.num_sequences, len(weight)), float("-inf"), dtype=dtype)
        winner = torch.zeros(largest.shape, dtype=torch.int32, device=states.device)
        for tile in _tiles(plan.pieces, len(weight)):
            start = tile[0].first
            logits = _logits(states[start : tile[-1].last], weight, bias).to(dtype)
            for piece in tile:
                best = logits[piece.first - start : piece.last - start].max(dim=0)
                better = best.values > largest[piece.text]
                largest[piece.text] = torch.where(better, best.values, largest[piece.text])
                winner[piece.text] = torch.where(better, best.indices + piece.first, winner[piece.text])
        own = largest > 0
        if group.size() > 1:
            largest, own = _over_ranks(largest, winner, plan.places, group)
        slope = torch.where(own, 1.0 / (1.0 + largest), 0.0)
        ctx.save_for_backward(states, weight, winner, slope)
        ctx.has_bias, ctx.pieces = bias is not None, plan.pieces
        return largest.relu_().log1p_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, winner, slope = ctx.saved_tensors
        grad = gradients[0] * slope
        grad_states, grad_weight = torch.zeros_like(states), torch.zeros_like(weight, dtype=grad.dtype)
        grad_bias = grad.sum(dim=0) if ctx.has_bias else None
        for tile in _tiles(ctx.pieces, len(weight)):
            start, last = tile[0].first, tile[-1].last
            of_logits = grad.new_zeros(last - start, len(weight))
            for piece in tile:
                # Of a text in several pieces each finds its own winners; a token outside takes part with 0.
                place = winner[piece.text] - piece.first
                inside = (place >= 0) & (place < piece.last - piece.first)
                of_logits[piece.first - start : piece.last - start].scatter_(
                    0, torch.where(inside, place, 0).long()[None],
                    torch.where(inside, grad[piece.text], 0.0)[None])
            of_logits = of_logits.to(states.dtype)
            torch.mm(of_logits, weight, out=grad_states[start:last])
            grad_weight += of_logits.T @ states[start:last]
        return (grad_states, grad_weight.to(weight.dtype),
                None if grad_bias is None else grad_bias.to(weight.dtype), None, None)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(states, weight, bias)


def _over_ranks(largest: Tensor, winner: Tensor, places: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(largest over the ranks, where this rank's winner is the winner of all and its logit positive)."""
    total = largest.clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    if len(places):
        place = torch.where(largest == total, places[winner.long()], NO_PLACE)
    else:
        place = torch.full(largest.shape, NO_PLACE, device=largest.device)
    first = place.clone()
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
    return total, (place == first) & (largest == total) & (total > 0)
