"""Mine hard negatives by vectors: each rank searches for its share of the queries in blocks of documents."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_embed.evaluation.search import StreamedSearch
from megatron_embed.mining.filters import MiningOptions, select_negatives
from megatron_embed.mining.task import Mined, MinedRows
from megatron_embed.parallel.collectives import gather_objects, rank_and_size


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
    search = StreamedSearch(queries[rank::size], last_rank + max(map(len, excluded)))
    pairs = _PositivePairs(queries[rank::size], [positives[query] for query in own])
    with tqdm(total=num_documents, unit="document", desc="search", disable=None if show_progress else True) as bar:
        for block in documents:
            search.add(block)
            pairs.add(block)
            bar.update(len(block))
    return selected(*search.result(), pairs.result(), positives, options, excluded=excluded, group=group)


def selected(scores: Tensor, indices: Tensor, positive_scores: Sequence[Sequence[float]],
             positives: Sequence[Sequence[int]], options: MiningOptions, *, excluded: Sequence[Sequence[int]],
             group: dist.ProcessGroup | None) -> MinedRows | None:
    """The negatives of every query from what was found for it; arguments and result as of `mine_vectors`.

    Args:
        scores, indices: [this rank's queries, candidates], best first; rank r of n has queries r, r + n, ...
        positive_scores: of the positives of this rank's queries.
    """
    rank, size = rank_and_size(group)
    last_rank, mined = options.last_rank(max(map(len, positives))), MinedRows()
    for row, query in enumerate(range(rank, len(positives), size)):
        candidates = list(zip(indices[row].tolist(), scores[row].tolist(), strict=True))
        selection = select_negatives(candidates, frozenset(excluded[query]), positive_scores[row], options,
                                     last_rank=last_rank, query=query)
        mined.append(Mined(positive_scores=list(positive_scores[row]), negatives=selection.negatives,
                           skipped=selection.skipped))
    return _gathered(mined, len(positives), group, on_all_ranks=options.reranked)


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
    if on_all_ranks:
        shares = gather_objects(mined, group)
    else:
        first, shares = group.rank() == 0, [mined] * group.size()
        dist.gather_object(mined, shares if first else None, dst=dist.get_global_rank(group, 0), group=group)
        if not first:
            return None
    whole = MinedRows()
    for query in range(queries):
        whole.append(shares[query % len(shares)][query // len(shares)])
    for share in shares:
        whole.skipped.update(share.skipped)
    return whole
