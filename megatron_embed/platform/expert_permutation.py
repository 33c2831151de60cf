"""Tokens to their experts' rows and back by indices, in place of Megatron's masks, splits and scattered sums.

Megatron without Transformer Engine selects by masks, for which the host waits, and sums a token's rows with atomic
additions in the tokens' dtype. Here each row knows its token and each token its rows: both ways, and both gradients,
gather rows; sums over a token's rows are made in float32 and in the order of the experts. Chunks of rows are sorted by
one gather, too, or not at all where they are sorted already.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Places:
    """The copies of each token among the rows, which are sorted by expert, then by token."""

    experts: Tensor
    """[tokens, chosen] int64, ascending."""
    rows: Tensor
    """[tokens, chosen] int64, the row of each of these copies."""
    copies: Tensor
    """[rows] int64, the copy in each row: token * chosen + place among the token's experts."""

    @property
    def tokens(self) -> Tensor:
        """[rows] int64, the token in each row."""
        return self.copies.div(self.rows.shape[1], rounding_mode="floor")


def places_of(routing_map: Tensor, chosen: int) -> Places:
    """The places by [tokens, experts] bool, of which each token has `chosen`. The host does not wait."""
    falling = torch.arange(routing_map.shape[1], 0, -1, device=routing_map.device)
    experts = (routing_map * falling).topk(chosen).indices
    copies = experts.flatten().argsort(stable=True)
    rows = torch.empty_like(copies).scatter_(0, copies, torch.arange(len(copies), device=copies.device))
    return Places(experts=experts, rows=rows.view_as(experts), copies=copies)


def sum_of_rows(rows: Tensor, places: Places) -> Tensor:
    """[rows, hidden] -> [tokens, hidden], each token's rows summed in float32."""
    return torch.nn.functional.embedding_bag(places.rows, rows, mode="sum")


class ToExperts(torch.autograd.Function):
    """[tokens, hidden] -> [rows, hidden]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return tokens.index_select(0, places.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_of_rows(gradient.contiguous(), ctx.places), None


class FromExperts(torch.autograd.Function):
    """[rows, hidden] -> [tokens, hidden], sums over each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return sum_of_rows(rows, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.places.tokens), None


class WeightsOfRows(torch.autograd.Function):
    """[tokens, experts] -> [rows], the router's weight of each row."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, places: Places) -> Tensor:
        ctx.places, ctx.shape = places, weights.shape
        return weights.gather(1, places.experts).flatten().index_select(0, places.copies)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        places = ctx.places
        chosen = gradient.index_select(0, places.rows.flatten()).view_as(places.experts)
        return gradient.new_zeros(ctx.shape).scatter_(1, places.experts, chosen), None


class Reordered(torch.autograd.Function):
    """[rows, ...] in another order; `orders` [2, rows]: where each new row was, and where each old row goes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, orders: Tensor) -> Tensor:
        ctx.orders = orders
        return rows.index_select(0, orders[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.orders[1]), None


def orders_of(sizes: Tensor, chunks: Tensor, rows: Tensor) -> Tensor:
    """[2, rows] for `Reordered` on the device of `rows`, whose chunks of these sizes are put into the order `chunks`;
    both on the host. One asynchronous copy."""
    chosen = sizes[chunks]
    shifts = (sizes.cumsum(0) - sizes)[chunks] - (chosen.cumsum(0) - chosen)
    orders = torch.empty(2, len(rows), dtype=torch.int64, pin_memory=rows.device.type == "cuda")
    count = torch.arange(len(rows))
    orders[0] = torch.repeat_interleave(shifts, chosen, output_size=len(rows)) + count
    orders[1].scatter_(0, orders[0], count)
    return orders.to(rows.device, non_blocking=True)


def install(dispatcher: ModuleType) -> None:
    """Replace the functions of Megatron's token dispatchers (module token_dispatcher). With Transformer Engine's fused
    permutation (`fused`), and for experts of a fixed capacity, they stay Megatron's."""
    if "permute" not in vars(dispatcher) or isinstance(vars(dispatcher)["permute"], _Permute):
        return
    vars(dispatcher).update(permute=_Permute(dispatcher.permute), unpermute=_unpermute(dispatcher.unpermute),
                            sort_chunks_by_idxs=_sort_chunks(dispatcher.sort_chunks_by_idxs))


class _Permute:
    """Megatron's `permute`; its "sorted indices" are Places."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        # Megatron-Core 0.17 and later also return offsets of padding and counts.
        self.more = "align_size" in inspect.signature(original).parameters

    def __call__(self, tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None,
                 num_out_tokens: int | None = None, fused: bool = False, drop_and_pad: bool = False,
                 **others: Any) -> tuple[Any, ...]:
        if fused or drop_and_pad or probs is None or num_out_tokens is None:
            result: tuple[Any, ...] = self.original(tokens, routing_map, probs=probs, num_out_tokens=num_out_tokens,
                                                    fused=fused, drop_and_pad=drop_and_pad, **others)
            return result
        places = places_of(routing_map, num_out_tokens // len(tokens))
        permuted = ToExperts.apply(tokens, places), WeightsOfRows.apply(probs, places), places
        return (*permuted, None, others.get("tokens_per_expert")) if self.more else permuted


def _unpermute(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def unpermute(permuted_tokens: Tensor, sorted_indices: Any, *args: Any, **others: Any) -> Tensor:
        if isinstance(sorted_indices, Places):
            assert others.get("probs") is None, "the weights have been applied to the rows"
            return FromExperts.apply(permuted_tokens, sorted_indices)  # type: ignore[no-any-return]
        return original(permuted_tokens, sorted_indices, *args, **others)

    return unpermute


def _sort_chunks(original: Callable[..., Any]) -> Callable[..., Any]:
    def sort_chunks(rows: Tensor, split_sizes: Tensor, sorted_idxs: Tensor, probs: Tensor | None = None,
                    fused: bool = False) -> Any:
        if fused:
            return original(rows, split_sizes, sorted_idxs, probs=probs, fused=True)
        if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
            return rows, probs
        orders = orders_of(split_sizes, sorted_idxs, rows)
        return Reordered.apply(rows, orders), None if probs is None else Reordered.apply(probs, orders)

    return sort_chunks
