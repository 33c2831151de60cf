"""MaxSim (Khattab and Zaharia 2020, arXiv:2004.12832): the sum, over a query's vectors, of each one's largest dot
product with a vector of the document. By tiles, with the gradient in closed form; no communication.

Of equal dot products the first vector of the document counts, forward and backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors, owners
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
        self.shape, self.vectors = (len(counts), longest), documents.vectors
        self.absent: Tensor | None = None
        self._total = len(documents.vectors)
        if longest * len(counts) == self._total:
            return
        self._counts = documents.device_counts
        index, self.absent = _padded_index(_starts(self._counts), self._counts, longest)
        self.vectors = documents.vectors.index_select(0, index.flatten())

    def of_vectors(self, gradient: Tensor) -> Tensor:
        """[vectors, dim] of the documents, from what belongs to the padded ones."""
        if self.absent is None:
            return gradient
        return gradient.index_select(0, _places(self._counts, self.shape[1], self._total))

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


def maxsim_pairs(queries: TextVectors, documents: TextVectors, query_of: Tensor,
                 query_on_device: Tensor | None = None) -> Tensor:
    """[documents] MaxSim of each document with its own query, differentiable with respect to the vectors.

    Args:
        query_of: [documents] int64 on the CPU, each document's query.
        query_on_device: the same on the vectors' device; None: it is copied, for which the host waits.
    """
    if query_on_device is None:
        query_on_device = query_of.to(queries.vectors.device)
    scores: Tensor = _MaxSimPairs.apply(  # type: ignore[no-untyped-call]
        queries.vectors, documents.vectors, _Pairs(queries, documents, query_of, query_on_device))
    return scores


class _MaxSimPairs(torch.autograd.Function):
    """MaxSim of pairs, by tiles of documents; keeps the vectors and, for each of a query's vectors, which one won."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, document: Tensor, pairs: "_Pairs") -> Tensor:
        scores = query.new_empty(pairs.num_documents)
        winners = torch.empty(pairs.num_documents, pairs.longest_query, dtype=torch.int64, device=query.device)
        for first, last in pairs.tiles(query.shape[1]):
            own, absent = pairs.queries(first, last)
            index, missing = pairs.documents(first, last)
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
            (own, absent), real = pairs.queries(first, last), pairs.real(first, last)
            own, won = own.flatten()[real], winners[first:last].flatten()[real]
            weight = gradients[0][first:last, None].expand(absent.shape).flatten()[real, None]
            grad_query.index_add_(0, own, weight * document[won])
            grad_document.index_add_(0, won, weight * query[own])
        return grad_query, grad_document, None


class _Pairs:
    """Indices of the vectors of documents and of each one's query, padded to the longest."""

    def __init__(self, queries: TextVectors, documents: TextVectors, query_of: Tensor, query_on_device: Tensor) -> None:
        """See `maxsim_pairs`. Sizes follow from counts on the CPU, indices from those on the device."""
        self._query_sizes, self._document_sizes = queries.counts[query_of], documents.counts
        counts = queries.device_counts
        self._query_counts, self._query_starts = counts[query_on_device], _starts(counts)[query_on_device]
        self._document_counts = documents.device_counts
        self._document_starts = _starts(self._document_counts)
        self.num_documents = len(self._document_sizes)
        self.longest_query = int(queries.counts.max()) if len(queries.counts) else 0

    def tiles(self, dim: int) -> Iterator[tuple[int, int]]:
        """(first document, last + 1) of tiles of about MAXSIM_TILE_ELEMENTS numbers, vectors included."""
        total = self.num_documents
        longest = int(self._document_sizes.max()) if total else 0
        numbers = self.longest_query * longest + (self.longest_query + longest) * dim
        size = max(1, MAXSIM_TILE_ELEMENTS // max(1, numbers))
        for first in range(0, total, size):
            yield first, min(first + size, total)

    def queries(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """([documents, longest query] int64 vectors of their queries, bool true in the padding)."""
        return _padded_index(self._query_starts[first:last], self._query_counts[first:last], self.longest_query)

    def real(self, first: int, last: int) -> Tensor:
        """[vectors of the documents' queries] int64, where they are in `queries`, flattened."""
        return _places(self._query_counts[first:last], self.longest_query, int(self._query_sizes[first:last].sum()))

    def documents(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """([documents, longest of them] int64 vectors, bool true in the padding)."""
        return _padded_index(self._document_starts[first:last], self._document_counts[first:last],
                             int(self._document_sizes[first:last].max()))


def _starts(counts: Tensor) -> Tensor:
    """[texts] int64, each text's first vector."""
    return counts.cumsum(0) - counts


def _padded_index(starts: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """([texts, width] int64 vectors of each text, its first one in the padding, bool true in the padding)."""
    column = torch.arange(width, device=counts.device)
    absent = column >= counts[:, None]
    return starts[:, None] + torch.where(absent, 0, column), absent


def _places(counts: Tensor, width: int, total: int) -> Tensor:
    """[total] int64, where the vectors of texts are among those of texts padded to `width` vectors.

    `total`: sum of `counts`, which are on the device.
    """
    text = owners(counts, total)
    return text * width + torch.arange(total, device=counts.device) - _starts(counts)[text]
