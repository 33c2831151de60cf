"""MaxSim (Khattab and Zaharia 2020, arXiv:2004.12832): the sum, over a query's vectors, of each one's largest dot
product with a vector of the document. By tiles, with the gradient in closed form; no communication.

Of equal dot products the first vector of the document counts, forward and backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.names import MAXSIM_TILE_ELEMENTS


class PaddedDocuments:
    """Documents as one tensor, each with as many vectors as the longest has.

    Attributes:
        vectors: [documents * longest, dim]; a document's padding repeats one of its vectors.
        absent: [documents, longest] bool, true in the padding; None: there is none.
    """

    def __init__(self, documents: TextVectors) -> None:
        counts = documents.counts
        longest = int(counts.max()) if len(counts) else 0
        self.shape, self.absent = (len(counts), longest), None
        self._real, self.vectors = None, documents.vectors
        if longest * len(counts) == len(documents.vectors):
            return
        column = torch.arange(longest)
        absent = column >= counts[:, None]
        starts = counts.cumsum(0) - counts
        device = documents.vectors.device
        index = (starts[:, None] + torch.where(absent, 0, column)).flatten().to(device, non_blocking=True)
        self.vectors = documents.vectors.index_select(0, index)
        self.absent = absent.to(device, non_blocking=True)
        self._real = (~absent).flatten().nonzero()[:, 0].to(device, non_blocking=True)

    def of_vectors(self, gradient: Tensor) -> Tensor:
        """[vectors, dim] of the documents, from what belongs to the padded ones."""
        return gradient if self._real is None else gradient.index_select(0, self._real)

    def best(self, query_vectors: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """([query vectors, documents] largest dot product with each document, int64 the vector of it).

        `buffer`: at least query vectors * documents * longest numbers; what it holds afterwards has no meaning.
        """
        similarity = buffer[: len(query_vectors) * len(self.vectors)].view(len(query_vectors), len(self.vectors))
        torch.mm(query_vectors, self.vectors.T, out=similarity)
        by_document = similarity.view(len(query_vectors), *self.shape)
        if self.absent is not None:
            by_document.masked_fill_(self.absent, float("-inf"))
        best = by_document.max(dim=2)
        return best.values, best.indices


def maxsim(queries: TextVectors, documents: TextVectors, out: Tensor | None = None) -> Tensor:
    """[queries, documents] MaxSim of every query with every document, by tiles of MAXSIM_TILE_ELEMENTS dot products.

    Args:
        out: where it goes; None: a new tensor.
    """
    padded, text_of = PaddedDocuments(documents), queries.text_of
    scores = queries.vectors.new_empty(len(queries.counts), len(documents.counts)) if out is None else out
    scores.zero_()
    for rows, buffer in _tiles(queries.vectors, padded):
        best, _ = padded.best(queries.vectors[rows], buffer)
        scores.index_add_(0, text_of[rows], best)
    return scores


def maxsim_gradients(queries: TextVectors, documents: TextVectors, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad_scores * MaxSim): ([query vectors, dim], [document vectors, dim]).

    The largest dot products are found again, tile by tile; memory beyond the result is a tile.

    Args:
        grad_scores: [queries, documents].
    """
    padded, text_of = PaddedDocuments(documents), queries.text_of
    grad_query, grad_document = torch.empty_like(queries.vectors), torch.zeros_like(padded.vectors)
    for rows, buffer in _tiles(queries.vectors, padded):
        own = queries.vectors[rows]
        _, winner = padded.best(own, buffer)
        weights = buffer[: len(own) * len(padded.vectors)].zero_().view(len(own), *padded.shape)
        weights.scatter_(2, winner[:, :, None], grad_scores[text_of[rows]][:, :, None])
        weights = weights.view(len(own), -1)
        torch.mm(weights, padded.vectors, out=grad_query[rows])
        grad_document.addmm_(weights.T, own)
    return grad_query, padded.of_vectors(grad_document)


def _tiles(query_vectors: Tensor, padded: PaddedDocuments) -> Iterator[tuple[slice, Tensor]]:
    """Query vectors whose dot products with these documents make up a tile, and memory for them."""
    width = max(1, len(padded.vectors))
    count = max(1, min(len(query_vectors), MAXSIM_TILE_ELEMENTS // width))
    buffer = query_vectors.new_empty(min(count, len(query_vectors)) * width)
    for first in range(0, len(query_vectors), count):
        yield slice(first, min(first + count, len(query_vectors))), buffer


def maxsim_pairs(queries: TextVectors, documents: TextVectors, query_of: Tensor) -> Tensor:
    """[documents] MaxSim of each document with its own query, differentiable with respect to the vectors.

    Args:
        query_of: [documents] int64 on the CPU, each document's query.
    """
    scores: Tensor = _MaxSimPairs.apply(  # type: ignore[no-untyped-call]
        queries.vectors, documents.vectors, queries.counts, documents.counts, query_of)
    return scores


class _MaxSimPairs(torch.autograd.Function):
    """MaxSim of pairs, by tiles of documents; keeps the vectors and, for each of a query's vectors, which one won."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, document: Tensor, query_counts: Tensor, document_counts: Tensor,
                query_of: Tensor) -> Tensor:
        pairs = _Pairs(query_counts, document_counts, query_of)
        scores = query.new_empty(len(document_counts))
        winners = torch.empty(len(document_counts), pairs.longest_query, dtype=torch.int64, device=query.device)
        for first, last in pairs.tiles(query.shape[1]):
            own, absent = pairs.queries(first, last, query.device)
            index, missing = pairs.documents(first, last, query.device)
            similarity = torch.bmm(query[own], document[index].transpose(1, 2))
            best = similarity.masked_fill_(missing[:, None, :], float("-inf")).max(dim=2)
            scores[first:last] = best.values.masked_fill(absent, 0.0).sum(dim=1)
            winners[first:last] = index.gather(1, best.indices)
        ctx.save_for_backward(query, document, winners)
        ctx.pairs = pairs
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, document, winners = ctx.saved_tensors
        grad_query, grad_document = torch.zeros_like(query), torch.zeros_like(document)
        pairs: _Pairs = ctx.pairs
        for first, last in pairs.tiles(query.shape[1]):
            own, absent = pairs.queries(first, last, query.device)
            real = (~absent).flatten()
            own, won = own.flatten()[real], winners[first:last].flatten()[real]
            weight = gradients[0][first:last, None].expand(absent.shape).flatten()[real, None]
            grad_query.index_add_(0, own, weight * document[won])
            grad_document.index_add_(0, won, weight * query[own])
        return grad_query, grad_document, None, None, None


class _Pairs:
    """Indices of the vectors of documents and of each one's query, padded to the longest."""

    def __init__(self, query_counts: Tensor, document_counts: Tensor, query_of: Tensor) -> None:
        self._query_counts, self._document_counts = query_counts[query_of], document_counts
        self._query_starts = (query_counts.cumsum(0) - query_counts)[query_of]
        self._document_starts = document_counts.cumsum(0) - document_counts
        self.longest_query = int(query_counts.max()) if len(query_counts) else 0

    def tiles(self, dim: int) -> Iterator[tuple[int, int]]:
        """(first document, last + 1) of tiles of about MAXSIM_TILE_ELEMENTS numbers, vectors included."""
        total = len(self._document_counts)
        longest = int(self._document_counts.max()) if total else 0
        numbers = self.longest_query * longest + (self.longest_query + longest) * dim
        size = max(1, MAXSIM_TILE_ELEMENTS // max(1, numbers))
        for first in range(0, total, size):
            yield first, min(first + size, total)

    def queries(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """([documents, longest query] int64 vectors of their queries, bool true in the padding)."""
        return _padded_index(self._query_starts[first:last], self._query_counts[first:last], self.longest_query, device)

    def documents(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """([documents, longest of them] int64 vectors, bool true in the padding)."""
        counts = self._document_counts[first:last]
        return _padded_index(self._document_starts[first:last], counts, int(counts.max()), device)


def _padded_index(starts: Tensor, counts: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    column = torch.arange(width)
    absent = column >= counts[:, None]
    index = starts[:, None] + torch.where(absent, 0, column)
    return index.to(device, non_blocking=True), absent.to(device, non_blocking=True)
