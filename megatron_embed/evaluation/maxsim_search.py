"""Exact search by MaxSim: each data-parallel rank holds the vectors of its documents, a block of them at a time.

Every query meets every document on the rank that embedded it, and only the best documents' scores travel: vectors of
documents, about a hundred each, never leave their rank.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.evaluation.search import pack_keys, unpack_keys
from megatron_embed.losses.maxsim import maxsim, maxsim_pairs
from megatron_embed.parallel.collectives import gather_padded, send_from_last, sum_over
from megatron_embed.parallel.topology import Topology

QUERIES_AT_ONCE = 512
"""Queries whose best documents are exchanged together."""
LOWEST_KEY = torch.iinfo(torch.int64).min
"""Sorts below the key of any document: a place that no document takes."""


class BlockSearch:
    """The best documents of each query among those whose scores this rank is shown.

    Of equal scores the larger index comes first, as in `search`. Memory: k keys for each query, and the scores of one
    block.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device, *, excluded: Tensor | None = None) -> None:
        """`excluded`: [queries] int64, index of a document that must not be retrieved, -1: none."""
        self._k = k
        self._excluded = None if excluded is None else excluded.to(device)
        self._keys = torch.empty((num_queries, 0), dtype=torch.int64, device=device)

    def add_scores(self, scores: Tensor, indices: Tensor) -> None:
        """Further documents: [queries, documents] scores, which are changed; `indices`: [documents] int64 of any
        order."""
        indices = indices.to(self._keys.device)
        if self._excluded is not None:
            scores.masked_fill_(indices == self._excluded[:, None], -torch.inf)
        keys = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
        pack_keys(scores, indices, out=keys, spare=torch.empty_like(scores, dtype=torch.int32))
        keys = torch.cat([self._keys, keys], dim=1)
        self._keys = keys.topk(min(self._k, keys.shape[1]), dim=1).values

    def merged(self, topology: Topology, num_documents: int) -> tuple[Tensor, Tensor]:
        """Scores [queries, min(k, documents)] float32 and indices int64 over all data-parallel ranks, best first, on
        every rank's CPU. Called by all ranks: an all-gather over the data-parallel group, and a broadcast over the
        pipeline, per QUERIES_AT_ONCE queries.

        `num_documents`: of all ranks together.
        """
        width, total = min(self._k, num_documents), len(self._keys)
        parts = []
        for first in range(0, total, QUERIES_AT_ONCE):
            own = self._keys[first : first + QUERIES_AT_ONCE].to(topology.device)
            padded = own.new_full((len(own), width), LOWEST_KEY)
            padded[:, : own.shape[1]] = own
            if topology.is_last_stage:
                gathered = gather_padded(padded, len(padded), topology.dp_group)
                padded = gathered.transpose(0, 1).flatten(1).topk(width, dim=1).values
            parts.append(send_from_last(padded, topology.groups.pp).cpu())
        keys = torch.cat(parts) if parts else torch.empty((0, width), dtype=torch.int64)
        return unpack_keys(keys)


class MaxSimSearch(BlockSearch):
    """By MaxSim; memory besides: the queries' vectors."""

    def __init__(self, queries: TextVectors, k: int, *, excluded: Tensor | None = None) -> None:
        super().__init__(len(queries.counts), k, queries.vectors.device, excluded=excluded)
        self._queries = queries

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Search further documents; `indices`: [documents] int64 of any order."""
        with torch.no_grad():
            scores = maxsim(self._queries, documents)
        self.add_scores(scores, indices)


class BlockPairs:
    """Scores of chosen pairs of query and document, each on the rank that has the document."""

    def __init__(self, query_of: Tensor, document_of: Tensor) -> None:
        """`query_of`, `document_of`: [pairs] int64 on the CPU, the indices of each pair."""
        self._query_of = query_of
        self._order = document_of.argsort(stable=True)
        self._sorted = document_of[self._order]
        self._scores = torch.zeros(len(query_of))

    def add(self, documents: Any, indices: Tensor) -> None:
        """Score the pairs of further documents; `indices`: [documents] int64."""
        raise NotImplementedError

    def pairs_with(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """([pairs] int64 positions of their documents among `indices`, int64 the pairs)."""
        first, last = (torch.searchsorted(self._sorted, indices, right=right) for right in (False, True))
        counts = last - first
        rows = torch.repeat_interleave(torch.arange(len(indices)), counts)
        within = torch.arange(len(rows)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return rows, self._order[first[rows] + within]

    def merged(self, topology: Topology) -> Tensor:
        """[pairs] float32 over all data-parallel ranks, on every rank's CPU. Called by all ranks: one all-reduce over
        the data-parallel group and one broadcast over the pipeline."""
        scores = self._scores.to(topology.device)
        if topology.is_last_stage:
            scores = sum_over(scores, topology.dp_group)
        return send_from_last(scores, topology.groups.pp).cpu()


class PairScores(BlockPairs):
    """By MaxSim."""

    def __init__(self, queries: TextVectors, query_of: Tensor, document_of: Tensor) -> None:
        super().__init__(query_of, document_of)
        self._queries = queries

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Score the pairs of further documents; `indices`: [documents] int64."""
        rows, pairs = self.pairs_with(indices)
        if len(pairs):
            with torch.no_grad():
                self._scores[pairs] = maxsim_pairs(self._queries, documents.pick(rows), self._query_of[pairs]).cpu()
