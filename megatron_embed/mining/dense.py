"""Hard negatives by vectors: every rank searches for its share of the queries while the documents pass by in blocks."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_embed.evaluation.search import StreamedSearch
from megatron_embed.mining.filters import MiningOptions, choose
from megatron_embed.mining.task import Mined, MinedRows


def mine_vectors(queries: Tensor, documents: Iterable[Tensor], positives: Sequence[Sequence[int]],
                 options: MiningOptions, *, excluded: Sequence[Sequence[int]] | None = None,
                 group: dist.ProcessGroup | None = None, chunk: int = 8192, num_documents: int | None = None,
                 show_progress: bool = False) -> MinedRows | None:
    """Negatives of every query by largest dot product, exact; null on all ranks of the group but the first, unless a
    reranker shall judge them.

    Memory: the queries' vectors, one block of documents, scores of 512 queries with `chunk` documents, and 12 bytes for
    each candidate that is passed on.

    Args:
        queries: [queries, dim], on the device that shall search.
        documents: blocks [any number, dim]; document numbers count through them. The same on all ranks.
        positives: documents of each query that are its positives, at least one.
        options: which candidates pass.
        excluded: documents of each query that are never its negatives, its positives among them; None: only these.
        group: ranks that divide the queries among them; one gather of the results over it. null: none do.
        num_documents: of all blocks together, for the progress bar.
        show_progress: a bar, if stderr is a terminal.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    own = range(rank, len(queries), size)
    excluded = positives if excluded is None else excluded
    last_rank = options.last_rank(max(len(numbers) for numbers in positives))
    search = StreamedSearch(queries[rank::size], last_rank + max(len(numbers) for numbers in excluded), chunk=chunk)
    pairs = _PositivePairs(queries[rank::size], [positives[number] for number in own])
    with tqdm(total=num_documents, unit="document", desc="search", disable=None if show_progress else True) as bar:
        for block in documents:
            search.add(block)
            pairs.add(block)
            bar.update(len(block))
    scores, indices = search.result()
    positive_scores = pairs.result()
    mined = MinedRows()
    for place, number in enumerate(own):
        candidates = list(zip(indices[place].tolist(), scores[place].tolist(), strict=True))
        chosen = choose(candidates, frozenset(excluded[number]), positive_scores[place], options, last_rank=last_rank,
                        query=number)
        mined.append(Mined(positive_scores=positive_scores[place], negatives=chosen))
    return _gathered(mined, len(queries), group, everywhere=options.judged)


class _PositivePairs:
    """Scores of each query with its own positives, as the blocks that hold them pass by."""

    def __init__(self, queries: Tensor, positives: Sequence[Sequence[int]]) -> None:
        self._queries = queries
        self._counts = np.array([len(numbers) for numbers in positives], dtype=np.int64)
        self._rows = np.repeat(np.arange(len(positives)), self._counts)
        self._columns = np.fromiter((number for numbers in positives for number in numbers), dtype=np.int64)
        self._order = np.argsort(self._columns, kind="stable")
        self._sorted = self._columns[self._order]
        self._scores = np.zeros(len(self._columns), dtype=np.float32)
        self._seen = 0

    def add(self, documents: Tensor) -> None:
        first, last = np.searchsorted(self._sorted, [self._seen, self._seen + len(documents)])
        for start in range(first, last, 8192):  # as many rows are copied at once
            pairs = self._order[start:min(start + 8192, last)]
            rows = self._queries[torch.from_numpy(self._rows[pairs])]
            columns = documents[torch.from_numpy(self._columns[pairs] - self._seen)].to(rows)
            self._scores[pairs] = (rows * columns).sum(dim=-1).cpu().numpy()
        self._seen += len(documents)

    def result(self) -> list[list[float]]:
        """By query."""
        values = self._scores.tolist()
        ends = np.cumsum(self._counts).tolist()
        return [values[end - count:end] for end, count in zip(ends, self._counts.tolist(), strict=True)]


def _gathered(mined: MinedRows, queries: int, group: dist.ProcessGroup | None, *,
              everywhere: bool) -> MinedRows | None:
    """Every query's, on the first rank of the group, or on all of them."""
    if group is None or group.size() == 1:
        return mined
    shares = [MinedRows() for _ in range(group.size())]
    if everywhere:
        dist.all_gather_object(shares, mined, group=group)
    else:
        first = group.rank() == 0
        dist.gather_object(mined, shares if first else None, dst=dist.get_global_rank(group, 0), group=group)
        if not first:
            return None
    whole = MinedRows()
    for number in range(queries):
        whole.append(shares[number % len(shares)][number // len(shares)])
    return whole
