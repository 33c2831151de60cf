"""Mine hard negatives by vectors: each rank searches for its share of the queries in blocks of documents."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_embed.evaluation.given_vectors import GivenVectors, Index
from megatron_embed.evaluation.search import StreamedSearch, search
from megatron_embed.mining.filters import Candidate, MiningOptions, select_negatives
from megatron_embed.mining.task import Mined, MinedRows
from megatron_embed.parallel.collectives import gather_objects, gather_to_first, rank_and_size

_QUERIES_AT_ONCE = 4096
"""Queries that an index is searched for together."""
_POSITIVES_AT_ONCE = 65536
"""Vectors of positives that are read together."""


def mine_vectors(queries: Tensor, documents: Iterable[Tensor], positives: Sequence[Sequence[int]],
                 options: MiningOptions, *, excluded: Sequence[Sequence[int]] | None = None,
                 group: dist.ProcessGroup | None = None, num_documents: int | None = None,
                 show_progress: bool = False) -> MinedRows | None:
    """Negatives of every query by largest dot product, by exact search.

    Memory: the queries' vectors, one block of documents, the work memory of StreamedSearch, and 12 bytes for each
    negative.

    Args:
        queries: [queries, dim], on the device of the search.
        documents: blocks [any number, dim]; document indices count through them. The same on all ranks.
        positives: each query's positive documents, at least one.
        options: filters of the candidates.
        excluded: each query's documents that are never its negatives, including its positives; None: its positives.
        group: ranks that split the queries; one gather of the results over it. None: no split.
        num_documents: of all blocks together, for the progress bar.
        show_progress: shows a bar if stderr is a terminal.
    Returns:
        On the group's first rank, and with `options.reranked` on all ranks; None on the others.
    """
    rank, size = rank_and_size(group)
    own = range(rank, len(queries), size)
    excluded = positives if excluded is None else excluded
    last_rank = options.last_rank(max(map(len, positives)))
    stream = StreamedSearch(queries[rank::size], last_rank + max(map(len, excluded)))
    pairs = _PositivePairs(queries[rank::size], [positives[query] for query in own])
    with tqdm(total=num_documents, unit="document", desc="search", disable=None if show_progress else True) as bar:
        for block in documents:
            stream.add(block)
            pairs.add(block)
            bar.update(len(block))
    return selected(*stream.result(), pairs.result(), positives, options, excluded=excluded, group=group)


def selected(scores: Tensor, indices: Tensor, positive_scores: Sequence[list[float]],
             positives: Sequence[Sequence[int]], options: MiningOptions, *, excluded: Sequence[Sequence[int]],
             group: dist.ProcessGroup | None) -> MinedRows | None:
    """The negatives of every query from what was found for it; arguments and result as of `mine_vectors`.

    Args:
        scores, indices: [this rank's queries, candidates], best first; rank r of n has queries r, r + n, ...
        positive_scores: of the positives of this rank's queries.
    """
    rank, size = rank_and_size(group)
    candidates = (list(zip(found.tolist(), values.tolist(), strict=True))
                  for found, values in zip(indices, scores, strict=True))
    mined = _selected(range(rank, len(positives), size), candidates, positive_scores, excluded, options,
                      options.last_rank(max(map(len, positives))))
    return _gathered(mined, len(positives), group, on_all_ranks=options.reranked)


def mine_by_index(queries: Tensor, given: GivenVectors, document_of_row: NDArray[np.int64], further: Tensor,
                  positives: Sequence[Sequence[int]], options: MiningOptions, *, excluded: Sequence[Sequence[int]],
                  group: dist.ProcessGroup | None = None) -> MinedRows | None:
    """`mine_vectors` by an approximate search over vectors on the disk.

    Args:
        queries: [queries, dim], scaled.
        document_of_row: [rows] the document of each given vector; several rows may be one document.
        further: [documents, dim] vectors, scaled, of the documents behind those of the rows; searched exactly.
    """
    index = given.index
    assert index is not None
    rank, size = rank_and_size(group)
    num_queries, own = len(queries), range(rank, len(queries), size)
    queries = queries[rank::size].cpu()
    last_rank = options.last_rank(max(map(len, positives)))
    depth = last_rank + max(map(len, excluded))
    given.report_recall(queries, depth, group)
    positive_scores = _scores_of_positives(queries, given, document_of_row, further,
                                           [positives[query] for query in own])
    candidates = _candidates(queries, index, document_of_row, further, depth, show_progress=rank == 0)
    mined = _selected(own, candidates, positive_scores, excluded, options, last_rank)
    return _gathered(mined, num_queries, group, on_all_ranks=options.reranked)


def _candidates(queries: Tensor, index: Index, document_of_row: NDArray[np.int64], further: Tensor, depth: int, *,
                show_progress: bool) -> Iterator[list[Candidate]]:
    """The best `depth` documents of each query, best first: those of an index's rows, and further ones."""
    num_given = int(document_of_row.max()) + 1
    width = min(2 * depth, len(document_of_row))  # rows that are one document take several places
    for start in tqdm(range(0, len(queries), _QUERIES_AT_ONCE), desc="search", unit="block",
                      disable=None if show_progress else True):
        block = queries[start:start + _QUERIES_AT_ONCE]
        scores, rows = index.search(block, width)
        exact_scores, exact_rows = search(block, further, depth) if len(further) else (block[:, :0], block[:, :0])
        for query in range(len(block)):
            best: dict[int, float] = {}
            for row, score in zip(rows[query].tolist(), scores[query].tolist(), strict=True):
                if row >= 0:
                    best.setdefault(int(document_of_row[row]), score)
            best |= zip((exact_rows[query].long() + num_given).tolist(), exact_scores[query].tolist(), strict=True)
            yield sorted(best.items(), key=lambda candidate: (-candidate[1], -candidate[0]))[:depth]


def _scores_of_positives(queries: Tensor, given: GivenVectors, document_of_row: NDArray[np.int64], further: Tensor,
                         positives: Sequence[Sequence[int]]) -> list[list[float]]:
    """Scores of each query with its positives, whose vectors alone are read."""
    wanted = np.unique(np.fromiter(chain.from_iterable(positives), dtype=np.int64))
    num_given = int(document_of_row.max()) + 1
    _, first_rows = np.unique(document_of_row, return_index=True)
    pairs = _PositivePairs(queries, [np.searchsorted(wanted, documents).tolist() for documents in positives])
    known = wanted[wanted < num_given]
    for start in range(0, len(known), _POSITIVES_AT_ONCE):
        pairs.add(given.vectors.scaled(given.vectors.gather(first_rows[known[start:start + _POSITIVES_AT_ONCE]])))
    pairs.add(further[torch.from_numpy(wanted[wanted >= num_given] - num_given)].cpu())
    return pairs.result()


def _selected(own: Sequence[int], candidates: Iterable[list[Candidate]], positive_scores: Sequence[list[float]],
              excluded: Sequence[Sequence[int]], options: MiningOptions, last_rank: int) -> MinedRows:
    """The negatives of a rank's queries, from each one's candidates, best first."""
    mined = MinedRows()
    for query, ranked, scores in zip(own, candidates, positive_scores, strict=True):
        selection = select_negatives(ranked, frozenset(excluded[query]), scores, options, last_rank=last_rank,
                                     query=query)
        mined.append(Mined(positive_scores=scores, negatives=selection.negatives, skipped=selection.skipped))
    return mined


class _PositivePairs:
    """Scores of each query with its own positives, computed block by block."""

    def __init__(self, queries: Tensor, positives: Sequence[Sequence[int]]) -> None:
        self._queries = queries
        self._counts = np.array([len(documents) for documents in positives], dtype=np.int64)
        self._rows = np.repeat(np.arange(len(positives)), self._counts)
        self._columns = np.fromiter(chain.from_iterable(positives), dtype=np.int64)
        self._order = np.argsort(self._columns, kind="stable")
        self._sorted = self._columns[self._order]
        self._scores = np.zeros(len(self._columns), dtype=np.float32)
        self._seen = 0

    def add(self, documents: Tensor) -> None:
        first, last = np.searchsorted(self._sorted, [self._seen, self._seen + len(documents)])
        for start in range(first, last, 8192):  # rows copied at once
            pairs = self._order[start:min(start + 8192, last)]
            rows = self._queries[torch.from_numpy(self._rows[pairs])]
            columns = documents[torch.from_numpy(self._columns[pairs] - self._seen)].to(rows)
            self._scores[pairs] = (rows * columns).sum(dim=-1).cpu().numpy()
        self._seen += len(documents)

    def result(self) -> list[list[float]]:
        """Scores of the positives by query."""
        values = self._scores.tolist()
        ends = np.cumsum(self._counts).tolist()
        return [values[end - count:end] for end, count in zip(ends, self._counts.tolist(), strict=True)]


def _gathered(mined: MinedRows, queries: int, group: dist.ProcessGroup | None, *,
              on_all_ranks: bool) -> MinedRows | None:
    """Results of all queries, on the group's first rank or on all ranks."""
    if group is None or group.size() == 1:
        return mined
    shares = gather_objects(mined, group) if on_all_ranks else gather_to_first(mined, group)
    if shares is None:
        return None
    whole = MinedRows()
    for query in range(queries):
        whole.append(shares[query % len(shares)][query // len(shares)])
    for share in shares:
        whole.skipped.update(share.skipped)
    return whole
