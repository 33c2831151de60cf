"""Micro-batches in sizes from a short list, so that shapes repeat, and micro-batches merged into larger ones."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from megatron_embed.batch import MicroBatch
from megatron_embed.rounding import round_up

NUM_SIZES = 8
"""Sizes of the micro-batches of a token budget."""


def bin_sizes(budget: int, alignment: int) -> list[int]:
    """The eighths of a token budget, ascending: the sizes that its micro-batches may have.

    Args:
        budget: tokens, a multiple of `alignment`; the last size.
        alignment: tokens, >= 1; every size is a multiple of it, so that a small budget has fewer than eight.
    """
    return sorted({min(budget, round_up(-(-budget * share // NUM_SIZES), alignment))
                   for share in range(1, NUM_SIZES + 1)})


def pad_to_sizes(micro_batches: Sequence[MicroBatch], sizes: Sequence[int], *, uniform: bool) -> tuple[MicroBatch, ...]:
    """The micro-batches, each with the padding that brings it to the next of `sizes`.

    Args:
        sizes: tokens, ascending; the last one holds every micro-batch.
        uniform: all get the size of the largest, for pipelines, whose messages have one shape.
    """
    tokens = [micro.num_tokens for micro in micro_batches]
    needed = [max(tokens)] * len(tokens) if uniform else tokens
    return tuple(_padded_to(micro, sizes[bisect_left(sizes, count)])
                 for micro, count in zip(micro_batches, needed, strict=True))


def _padded_to(micro: MicroBatch, size: int) -> MicroBatch:
    """The micro-batch with `size` tokens, at least its real ones."""
    if micro.token_ids.numel() == size:
        return micro
    real = micro.num_tokens

    def resized(values: torch.Tensor, filler: int = 0) -> torch.Tensor:
        return functional.pad(values[:real], (0, size - real), value=filler)

    return replace(micro, token_ids=resized(micro.token_ids), position_ids=resized(micro.position_ids),
                   token_types=None if micro.token_types is None else resized(micro.token_types),
                   vectors=None if micro.vectors is None else resized(micro.vectors, -1))


def merge(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """One micro-batch, without padding, of the sequences of several; those that are run again are left out.

    If all of them are, it is one of them.
    """
    counted = [micro for micro in micro_batches if not micro.repeated]
    if not counted:
        return _padded_to(micro_batches[0], micro_batches[0].num_tokens)
    sizes = [micro.num_tokens for micro in counted]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    bounds = [micro.cu_seqlens[1:] + start for micro, start in zip(counted, starts, strict=True)]

    def joined(values: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
        given = [part[:size] for part, size in zip(values, sizes, strict=True) if part is not None]
        return torch.cat(given) if given else None

    keys = [micro.key_lengths for micro in counted if micro.key_lengths is not None]
    return MicroBatch(
        token_ids=torch.cat([micro.token_ids[:size] for micro, size in zip(counted, sizes, strict=True)]),
        position_ids=torch.cat([micro.position_ids[:size] for micro, size in zip(counted, sizes, strict=True)]),
        cu_seqlens=torch.cat([counted[0].cu_seqlens[:1], *bounds]), rows=torch.cat([micro.rows for micro in counted]),
        token_types=joined(micro.token_types for micro in counted),
        vectors=joined(micro.vectors for micro in counted), key_lengths=torch.cat(keys) if keys else None,
        joint=counted[0].joint)
