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
    ones. Memory: the queries, k scores for each, and QUERIES_AT_ONCE x chunk scores. No communication.
    """

    def __init__(self, queries: Tensor, k: int, *, full_queries: Tensor | None = None, chunk: int = 8192) -> None:
        """`queries` [queries, dim]; `full_queries` [queries, full dim] where the found documents get other scores."""
        self._queries = queries.float().split(QUERIES_AT_ONCE)
        self._full_queries = None if full_queries is None else full_queries.float().split(QUERIES_AT_ONCE)
        self._k, self._chunk = k, chunk
        self._seen = 0
        self._keys = [part.new_empty((len(part), 0), dtype=torch.int64) for part in self._queries]
        self._full_scores = [part.new_empty((len(part), 0)) for part in self._queries]

    def add(self, documents: Tensor, full_documents: Tensor | None = None) -> None:
        """The next documents, [documents, dim] (and [documents, full dim])."""
        for start in range(0, len(documents), self._chunk):
            chunk = documents[start : start + self._chunk].to(self._queries[0])
            full = None
            if full_documents is not None:
                full = full_documents[start : start + self._chunk].to(chunk)
            for number in range(len(self._queries)):
                self._add_chunk(number, chunk, full)
            self._seen += len(chunk)

    def _add_chunk(self, number: int, documents: Tensor, full_documents: Tensor | None) -> None:
        queries = self._queries[number]
        scores = queries @ documents.T
        indices = torch.arange(self._seen, self._seen + scores.shape[1], device=scores.device)
        keys = torch.cat([self._keys[number], _pack(scores, indices)], dim=1)
        best = keys.topk(min(self._k, keys.shape[1]), dim=1)
        self._keys[number] = best.values
        if self._full_queries is not None:
            assert full_documents is not None
            full = torch.cat([self._full_scores[number], self._full_queries[number] @ full_documents.T], 1)
            self._full_scores[number] = full.gather(1, best.indices)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores [queries, min(k, documents)] float32 and indices int64, best first; in two stages, by full score."""
        scores, indices = _unpack(torch.cat(self._keys))
        if self._full_queries is None:
            return scores, indices
        return _unpack(_largest(_pack(torch.cat(self._full_scores), indices), self._k))


def _pack(scores: Tensor, indices: Tensor) -> Tensor:
    """[queries, n] int64 keys that sort by (score, index): the score's bits above the index's 32 bits."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 would sort below 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats: the larger the bits, the smaller
    return (ordered.long() << 32) | indices


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of `_pack`'s keys."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), keys & 0xFFFFFFFF


def _largest(keys: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, descending; all of them where there are fewer."""
    return keys.topk(min(k, keys.shape[1]), dim=1).values
