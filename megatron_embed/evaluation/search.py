"""Exact top-k search: of a tensor at once, or of a corpus that passes by in blocks and need not fit into memory."""

import torch
from torch import Tensor

QUERIES_AT_ONCE = 512
"""Scored together: with a chunk of documents, the largest matrix of a search."""


def search(queries: Tensor, documents: Tensor, k: int, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The k documents of largest dot product for each query, best first; exact.

    Equal scores: the larger index first, also at the cut. With documents in ascending order of id that is trec_eval's
    rule. (Copies of a vector may differ in the last bit: a matrix product rounds by position.)

    Args:
        queries: [queries, dim].
        documents: [documents, dim], fewer than 2**32.
        k: how many, >= 1; all documents where there are fewer.
        chunk: documents scored at once; memory is O(queries * (k + chunk)).
    Returns:
        Scores [queries, min(k, documents)] float32 and indices [queries, min(k, documents)] int64, on the queries'
        device. No communication.
    """
    stream = StreamedSearch(queries, k, chunk=chunk)
    stream.add(documents)
    return stream.result()


class StreamedSearch:
    """`search` over documents that come in blocks, of which none is kept.

    Optionally in two stages: the search itself sees short vectors, and the documents it ends with are scored with full
    ones. Memory: the queries, k scores for each, and 16 bytes for each of QUERIES_AT_ONCE x chunk scores. No
    communication.
    """

    def __init__(self, queries: Tensor, k: int, *, full_queries: Tensor | None = None, excluded: Tensor | None = None,
                 chunk: int = 8192) -> None:
        """
        Args:
            queries: [queries, dim].
            full_queries: [queries, full dim] where the found documents get other scores.
            excluded: [queries] int64, index of a document that is not to be found, -1: none. Its score is minus
                infinity: it comes last where no more than k documents there are.
        """
        self._excluded = None if excluded is None else excluded.to(queries.device)
        self._queries, self._full_queries = queries.float(), None if full_queries is None else full_queries.float()
        self._k, self._chunk = k, chunk
        self._seen = self._found = 0
        # One block for all queries, and one room for all chunks, written in place: results that outlive the large
        # temporaries between them leave holes that malloc never fills (measured: 3.2 GB beyond 100,000 vectors).
        self._keys = queries.new_empty((len(queries), 0), dtype=torch.int64)
        self._full_scores = queries.new_empty((len(queries), 0), dtype=torch.float32)
        self._room: _Room | None = None

    def add(self, documents: Tensor, full_documents: Tensor | None = None) -> None:
        """The next documents, [documents, dim] (and [documents, full dim])."""
        for start in range(0, len(documents), self._chunk):
            chunk = documents[start : start + self._chunk].to(self._queries)
            full = None
            if self._full_queries is not None:
                assert full_documents is not None
                full = full_documents[start : start + self._chunk].to(chunk)
            width = min(self._k, self._found + len(chunk))
            self._keys = _widened(self._keys, width)
            self._full_scores = _widened(self._full_scores, 0 if full is None else width)
            if self._room is None or self._room.columns < self._found + len(chunk):
                self._room = None  # before the larger one
                self._room = _Room(self._keys, self._found + len(chunk))
            for first in range(0, len(self._queries), QUERIES_AT_ONCE):
                self._add_chunk(slice(first, first + QUERIES_AT_ONCE), chunk, full, self._room)
            self._seen, self._found = self._seen + len(chunk), width

    def _add_chunk(self, rows: slice, documents: Tensor, full_documents: Tensor | None, room: "_Room") -> None:
        """The best of what these queries have and the chunk."""
        known, best = self._keys[rows, : self._found], self._keys[rows]
        queries, columns = self._queries[rows], self._found + len(documents)
        keys, scores, spare = (part[: len(queries), :columns] for part in (room.keys, room.scores, room.spare))
        torch.mm(queries, documents.T, out=scores[:, self._found :])
        self._exclude(rows, scores[:, self._found :])
        keys[:, : self._found] = known
        _pack(scores[:, self._found :], self._seen, out=keys[:, self._found :], spare=spare[:, self._found :])
        found = keys.topk(best.shape[1], dim=1)
        best.copy_(found.values)
        if self._full_queries is not None:
            assert full_documents is not None
            scores[:, : self._found] = self._full_scores[rows, : self._found]
            torch.mm(self._full_queries[rows], full_documents.T, out=scores[:, self._found :])
            self._exclude(rows, scores[:, self._found :])
            self._full_scores[rows] = scores.gather(1, found.indices)

    def _exclude(self, rows: slice, scores: Tensor) -> None:
        """Sets the scores of excluded documents among those of the chunk, [queries, chunk]."""
        if self._excluded is None:
            return
        columns = self._excluded[rows] - self._seen
        here = torch.nonzero((columns >= 0) & (columns < scores.shape[1])).squeeze(1)
        scores[here, columns[here]] = -torch.inf

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores [queries, min(k, documents)] float32 and indices int64, best first; in two stages, by full score."""
        self._room = None
        scores, indices = _unpack(self._keys)
        if self._full_queries is None:
            return scores, indices
        order = torch.empty_like(indices)
        full = self._full_scores.clone()
        _pack(full, indices, out=order, spare=torch.empty_like(full, dtype=torch.int32))
        return _unpack(order.topk(order.shape[1], dim=1).values)


class _Room:
    """Where one block of queries meets one chunk of documents."""

    def __init__(self, like: Tensor, columns: int) -> None:
        """`like`: [queries, any], on the device of the search."""
        shape = (min(QUERIES_AT_ONCE, len(like)), columns)
        self.columns = columns
        self.keys = like.new_empty(shape, dtype=torch.int64)
        self.scores = like.new_empty(shape, dtype=torch.float32)
        self.spare = like.new_empty(shape, dtype=torch.int32)


def _widened(rows: Tensor, width: int) -> Tensor:
    """The rows with room for so many columns."""
    if rows.shape[1] >= width:
        return rows
    wider = rows.new_empty((len(rows), width))
    wider[:, : rows.shape[1]] = rows
    return wider


def _pack(scores: Tensor, indices: Tensor | int, *, out: Tensor, spare: Tensor) -> None:
    """int64 keys that sort by (score, index): the score's bits above the index's 32 bits. Overwrites the scores.

    Args:
        scores: [queries, n] float32.
        indices: [queries, n] int64, or the first of n that follow each other.
        out: [queries, n] int64, for the keys.
        spare: [queries, n] int32.
    """
    bits = scores.add_(0.0).view(torch.int32)  # + 0.0: -0.0 would sort below 0.0
    torch.bitwise_right_shift(bits, 31, out=spare)
    bits ^= spare.bitwise_and_(0x7FFFFFFF)  # negative floats: the larger the bits, the smaller
    if isinstance(indices, int):
        indices = torch.arange(indices, indices + out.shape[1], device=out.device)
    out.copy_(bits)
    out <<= 32
    out |= indices


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of `_pack`'s keys."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), keys & 0xFFFFFFFF
