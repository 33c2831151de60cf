"""Exact top-k search over a tensor, or over a corpus in blocks that need not fit into memory."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.names import Similarity

QUERIES_AT_ONCE = 512
"""Queries scored together; with DOCUMENTS_PER_CHUNK, the size of the largest matrix of a search."""
DOCUMENTS_PER_CHUNK = 8192
"""Documents scored together."""


def for_similarity(embeddings: Tensor, similarity: Similarity) -> Tensor:
    """[rows, dim] whose dot products are this similarity: unit vectors for cosine, otherwise the embeddings."""
    return normalize(embeddings, dim=-1) if similarity == "cosine" else embeddings


def search(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact search for the k documents of largest dot product with each query, best first.

    Of equal scores the larger index comes first, also at the cutoff. With documents in ascending order of id that is
    trec_eval's rule. (Two copies of a vector may score differently in the last bit: a matrix product rounds
    by position.)

    Args:
        queries: [queries, dim].
        documents: [documents, dim], fewer than 2**32.
        k: number of documents, >= 1; all documents if there are fewer.
    Returns:
        Scores [queries, min(k, documents)] float32 and indices [queries, min(k, documents)] int64, on the queries'
        device. No communication.
    """
    stream = StreamedSearch(queries, k)
    stream.add(documents)
    return stream.result()


class StreamedSearch:
    """`search` over documents that come in blocks and are not kept.

    Optionally in two stages: the search uses short vectors, and the documents that it retrieves are scored with full
    vectors. Memory: the queries, k scores for each, and 16 bytes for each of QUERIES_AT_ONCE x DOCUMENTS_PER_CHUNK
    scores. No communication.
    """

    def __init__(self, queries: Tensor, k: int, *, full_queries: Tensor | None = None,
                 excluded: Tensor | None = None) -> None:
        """
        Args:
            queries: [queries, dim].
            full_queries: [queries, full dim] for the second stage.
            excluded: [queries] int64, index of a document that must not be retrieved, -1: none. Its score is minus
                infinity: it comes last if there are at most k documents.
        """
        self._excluded = None if excluded is None else excluded.to(queries.device)
        self._queries, self._full_queries = queries.float(), None if full_queries is None else full_queries.float()
        self._k = k
        self._seen = self._kept = 0
        # One block for all queries and one buffer for all chunks, written in place: results that outlive the large
        # temporaries between them leave holes that malloc never fills (measured: 3.2 GB beyond 100,000 vectors).
        self._keys = queries.new_empty((len(queries), 0), dtype=torch.int64)
        self._full_scores = queries.new_empty((len(queries), 0), dtype=torch.float32)
        self._buffers: _Buffers | None = None

    def add(self, documents: Tensor, full_documents: Tensor | None = None) -> None:
        """Search the next documents, [documents, dim] (and [documents, full dim])."""
        for start in range(0, len(documents), DOCUMENTS_PER_CHUNK):
            chunk = documents[start : start + DOCUMENTS_PER_CHUNK].to(self._queries)
            full = None
            if self._full_queries is not None:
                assert full_documents is not None
                full = full_documents[start : start + DOCUMENTS_PER_CHUNK].to(chunk)
            width = min(self._k, self._kept + len(chunk))
            self._keys = _widened(self._keys, width)
            self._full_scores = _widened(self._full_scores, 0 if full is None else width)
            if self._buffers is None or self._buffers.columns < self._kept + len(chunk):
                self._buffers = None  # freed before the larger ones are allocated
                self._buffers = _Buffers(self._keys, self._kept + len(chunk))
            for first in range(0, len(self._queries), QUERIES_AT_ONCE):
                self._add_chunk(slice(first, first + QUERIES_AT_ONCE), chunk, full, self._buffers)
            self._seen, self._kept = self._seen + len(chunk), width

    def _add_chunk(self, rows: slice, documents: Tensor, full_documents: Tensor | None, buffers: "_Buffers") -> None:
        """Merge a chunk into the best documents of these queries."""
        known, best = self._keys[rows, : self._kept], self._keys[rows]
        queries, columns = self._queries[rows], self._kept + len(documents)
        keys, scores, spare = (buffer[: len(queries), :columns]
                               for buffer in (buffers.keys, buffers.scores, buffers.spare))
        torch.mm(queries, documents.T, out=scores[:, self._kept :])
        self._exclude(rows, scores[:, self._kept :])
        keys[:, : self._kept] = known
        pack_keys(scores[:, self._kept :], self._seen, out=keys[:, self._kept :], spare=spare[:, self._kept :])
        top = keys.topk(best.shape[1], dim=1)
        best.copy_(top.values)
        if self._full_queries is not None:
            assert full_documents is not None
            scores[:, : self._kept] = self._full_scores[rows, : self._kept]
            torch.mm(self._full_queries[rows], full_documents.T, out=scores[:, self._kept :])
            self._exclude(rows, scores[:, self._kept :])
            self._full_scores[rows] = scores.gather(1, top.indices)

    def _exclude(self, rows: slice, scores: Tensor) -> None:
        """Set the scores [queries, chunk] of excluded documents to minus infinity."""
        if self._excluded is None:
            return
        columns = self._excluded[rows] - self._seen
        here = torch.nonzero((columns >= 0) & (columns < scores.shape[1])).squeeze(1)
        scores[here, columns[here]] = -torch.inf

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores [queries, min(k, documents)] float32 and indices int64, best first (by full score, in two stages)."""
        self._buffers = None
        scores, indices = unpack_keys(self._keys)
        if self._full_queries is None:
            return scores, indices
        order = torch.empty_like(indices)
        full = self._full_scores.clone()
        pack_keys(full, indices, out=order, spare=torch.empty_like(full, dtype=torch.int32))
        return unpack_keys(order.topk(order.shape[1], dim=1).values)


class _Buffers:
    """Work memory for one block of queries and one chunk of documents."""

    def __init__(self, like: Tensor, columns: int) -> None:
        """`like`: [queries, any number], on the device of the search."""
        shape = (min(QUERIES_AT_ONCE, len(like)), columns)
        self.columns = columns
        self.keys = like.new_empty(shape, dtype=torch.int64)
        self.scores = like.new_empty(shape, dtype=torch.float32)
        self.spare = like.new_empty(shape, dtype=torch.int32)


def _widened(rows: Tensor, width: int) -> Tensor:
    """The rows with at least `width` columns."""
    if rows.shape[1] >= width:
        return rows
    wider = rows.new_empty((len(rows), width))
    wider[:, : rows.shape[1]] = rows
    return wider


def pack_keys(scores: Tensor, indices: Tensor | int, *, out: Tensor, spare: Tensor) -> None:
    """Write int64 keys that sort by (score, index): the score's bits above the index's 32 bits. Overwrites the scores.

    Args:
        scores: [queries, n] float32.
        indices: [queries, n] int64, or the first of n consecutive ones.
        out: [queries, n] int64, the keys.
        spare: [queries, n] int32, work memory.
    """
    bits = scores.add_(0.0).view(torch.int32)  # + 0.0: -0.0 would sort below 0.0
    torch.bitwise_right_shift(bits, 31, out=spare)
    bits ^= spare.bitwise_and_(0x7FFFFFFF)  # negative floats: the larger the bits, the smaller
    if isinstance(indices, int):
        indices = torch.arange(indices, indices + out.shape[1], device=out.device)
    out.copy_(bits)
    out <<= 32
    out |= indices


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of `pack_keys`'s keys."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), keys & 0xFFFFFFFF
