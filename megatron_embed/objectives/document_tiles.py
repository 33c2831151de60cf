"""Documents' vectors of all data-parallel ranks, a tile at a time, and the return of their gradients.

A multi-vector model gives a document about a hundred vectors, so the global batch's are never gathered whole. In each
round every rank shows all others some of its documents; memory is that of one round, whatever the size of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.names import MAXSIM_TILE_ELEMENTS
from megatron_embed.parallel.collectives import gather_padded, scatter_sum
from megatron_embed.parallel.device_copy import copy_to_device


@dataclass(frozen=True, kw_only=True)
class DocumentTile:
    """Some documents of one rank."""

    rank: int
    columns: slice
    """Their indices over all ranks."""
    documents: TextVectors


class DocumentTiles:
    """The documents of all ranks of a group, in rounds. Every method is called by all of them together."""

    def __init__(self, own: TextVectors, gradient: Tensor, num_documents: Tensor, capacity: int,
                 group: dist.ProcessGroup) -> None:
        """One small all-gather of the numbers of vectors, between the CPUs; one asynchronous copy of them.

        Args:
            own: this rank's documents.
            gradient: [own vectors, dim], to which `return_gradients` adds.
            num_documents: [ranks] int64 on the CPU.
            capacity: the most documents of a rank, equal on all of them.
        """
        self._own, self._gradient, self._group = own, TextVectors(vectors=gradient, counts=own.counts), group
        gathered = gather_padded(own.counts, capacity, group)
        self._counts = [row[:count] for row, count in zip(gathered, num_documents.tolist(), strict=True)]
        self._counts_on_device = copy_to_device(tuple(self._counts), own.vectors.device)
        self._first_column = (num_documents.cumsum(0) - num_documents).tolist()
        budget = MAXSIM_TILE_ELEMENTS // max(1, own.vectors.shape[1]) // group.size()
        self._tiles = [_cut(counts.tolist(), max(1, budget)) for counts in self._counts]
        self.rounds = max(map(len, self._tiles))

    def show(self, turn: int) -> list[DocumentTile]:
        """The documents of a round: one all-gather of vectors, padded to the most that a rank shows."""
        first, last = self._bounds(self._group.rank(), turn)
        gathered = gather_padded(self._own.part(first, last).vectors, self._capacity(turn), self._group)
        tiles = []
        for rank, counts in enumerate(self._counts):
            first, last = self._bounds(rank, turn)
            if last > first:
                column = self._first_column[rank]
                own = counts[first:last]
                tiles.append(DocumentTile(
                    rank=rank, columns=slice(column + first, column + last),
                    documents=TextVectors(vectors=gathered[rank, : int(own.sum())], counts=own,
                                          counts_on_device=self._counts_on_device[rank][first:last])))
        return tiles

    def return_gradients(self, turn: int, gradients: Iterator[tuple[DocumentTile, Tensor]]) -> None:
        """Adds the gradients of this rank's documents of a round, summed over the ranks: one reduce-scatter.

        Args:
            gradients: for each tile of the round, [its vectors, dim], computed on this rank.
        """
        vectors = self._own.vectors
        padded = vectors.new_zeros(self._group.size(), self._capacity(turn), vectors.shape[1])
        for tile, gradient in gradients:
            padded[tile.rank, : len(gradient)] = gradient
        first, last = self._bounds(self._group.rank(), turn)
        own = self._gradient.part(first, last).vectors
        own += scatter_sum(padded, self._group)[: len(own)]

    def _bounds(self, rank: int, turn: int) -> tuple[int, int]:
        """(first document, last + 1) that a rank shows in a round; equal if it has no more."""
        return self._tiles[rank][turn] if turn < len(self._tiles[rank]) else (0, 0)

    def _capacity(self, turn: int) -> int:
        """The most vectors that a rank shows in a round."""
        sizes = [int(counts[slice(*self._bounds(rank, turn))].sum()) for rank, counts in enumerate(self._counts)]
        return max(1, *sizes)


def _cut(counts: list[int], budget: int) -> list[tuple[int, int]]:
    """Documents in order, in tiles of which each, padded to its longest, has at most `budget` vectors, or one
    document."""
    tiles, first, longest = [], 0, 0
    for index, count in enumerate(counts):
        longest = max(longest, count)
        if index > first and longest * (index + 1 - first) > budget:
            tiles.append((first, index))
            first, longest = index, count
    return [*tiles, (first, len(counts))] if counts else []
