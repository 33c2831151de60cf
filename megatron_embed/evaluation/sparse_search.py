"""Exact search over sparse vectors: an inverted index of a block of documents at a time, on the rank that embeds them.

The index of a block is its matrix in compressed columns: for each token of the vocabulary the documents that have it,
with their weights. scipy's product of sparse matrices follows, for each query, the lists of the query's tokens.
"""

import numpy as np
import scipy.sparse
import torch
from scipy.sparse import csr_array
from torch import Tensor

from megatron_embed.evaluation.maxsim_search import QUERIES_AT_ONCE, BlockPairs, BlockSearch
from megatron_embed.parallel.topology import Topology

DOCUMENTS_AT_ONCE = 8192
"""Documents of an index, at most."""
SCORES_AT_ONCE = 1 << 24
"""Scores of all queries with the documents of an index, about: 64 MiB."""


class SparseSearch(BlockSearch):
    """By dot products; memory besides: the queries' vectors, and an index of DOCUMENTS_AT_ONCE documents."""

    def __init__(self, queries: csr_array, k: int, *, excluded: Tensor | None = None) -> None:
        super().__init__(queries.shape[0], k, torch.device("cpu"), excluded=excluded)
        self._queries = queries
        self._most = min(DOCUMENTS_AT_ONCE, SCORES_AT_ONCE // max(1, queries.shape[0]))
        self._waiting: list[tuple[csr_array, Tensor]] = []

    def add(self, documents: csr_array, indices: Tensor) -> None:
        """Search further documents; `indices`: [documents] int64 of any order."""
        self._waiting.append((documents, indices))
        if sum(len(own) for _, own in self._waiting) >= self._most:
            self._search()

    def _search(self) -> None:
        if not self._waiting:
            return
        index = scipy.sparse.vstack([documents for documents, _ in self._waiting], format="csr").T.tocsr()
        indices = torch.cat([own for _, own in self._waiting])
        self._waiting = []
        scores = np.empty((self._queries.shape[0], len(indices)), dtype=np.float32)
        for first in range(0, len(scores), QUERIES_AT_ONCE):
            rows = slice(first, first + QUERIES_AT_ONCE)
            scores[rows] = (self._queries[rows] @ index).toarray()
        self.add_scores(torch.from_numpy(scores), indices)

    def merged(self, topology: Topology, num_documents: int) -> tuple[Tensor, Tensor]:
        """See BlockSearch."""
        self._search()
        return super().merged(topology, num_documents)


class SparsePairs(BlockPairs):
    """By dot products."""

    def __init__(self, queries: csr_array, query_of: Tensor, document_of: Tensor) -> None:
        super().__init__(query_of, document_of)
        self._queries = queries

    def add(self, documents: csr_array, indices: Tensor) -> None:
        """Score the pairs of further documents; `indices`: [documents] int64."""
        rows, pairs = self.pairs_with(indices)
        if len(pairs):
            products = self._queries[self._query_of[pairs].numpy()].multiply(documents[rows.numpy()])
            self._scores[pairs] = torch.from_numpy(np.asarray(products.sum(axis=1), dtype=np.float32))
