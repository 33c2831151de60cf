"""Exact search by MaxSim: each data-parallel rank holds the vectors of its documents, a block of them at a time.

Every query meets every document on the rank that embedded it, and only the best documents' scores travel: vectors of
documents, about a hundred each, never leave their rank.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import TextVectors
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.evaluation.encode import VECTOR_TEXTS_AT_ONCE, TextEncoder
from megatron_embed.evaluation.search import pack_keys, unpack_keys
from megatron_embed.losses.maxsim import maxsim, maxsim_pairs
from megatron_embed.parallel.collectives import gather_padded, send_from_last, sum_over
from megatron_embed.parallel.topology import Topology

QUERIES_AT_ONCE = 512
"""Queries whose best documents are exchanged together."""
LOWEST_KEY = torch.iinfo(torch.int64).min
"""Sorts below the key of any document: a place that no document takes."""

OnBlock = Callable[[TextVectors, Tensor], None]
"""(vectors of some documents on their rank, [documents] int64 their indices)."""


class MaxSimSearch:
    """The best documents of each query among those that this rank is shown.

    Of equal scores the larger index comes first, as in `search`. Memory: the queries' vectors, k keys for each, and the
    scores of one block.
    """

    def __init__(self, queries: TextVectors, k: int, *, excluded: Tensor | None = None) -> None:
        """`excluded`: [queries] int64, index of a document that must not be retrieved, -1: none."""
        self._queries, self._k = queries, k
        self._excluded = None if excluded is None else excluded.to(queries.vectors.device)
        self._keys = queries.vectors.new_empty((len(queries.counts), 0), dtype=torch.int64)

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Search further documents; `indices`: [documents] int64 of any order."""
        indices = indices.to(self._keys.device)
        with torch.no_grad():
            scores = maxsim(self._queries, documents)
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
            own = self._keys[first : first + QUERIES_AT_ONCE]
            padded = own.new_full((len(own), width), LOWEST_KEY)
            padded[:, : own.shape[1]] = own
            if topology.is_last_stage:
                gathered = gather_padded(padded, len(padded), topology.dp_group)
                padded = gathered.transpose(0, 1).flatten(1).topk(width, dim=1).values
            parts.append(send_from_last(padded, topology.groups.pp).cpu())
        keys = torch.cat(parts) if parts else torch.empty((0, width), dtype=torch.int64)
        return unpack_keys(keys)


class PairScores:
    """MaxSim of chosen pairs of query and document, each on the rank that has the document."""

    def __init__(self, queries: TextVectors, query_of: Tensor, document_of: Tensor) -> None:
        """`query_of`, `document_of`: [pairs] int64 on the CPU, the indices of each pair."""
        self._queries, self._query_of = queries, query_of
        self._order = document_of.argsort(stable=True)
        self._sorted = document_of[self._order]
        self._scores = torch.zeros(len(query_of))

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Score the pairs of further documents; see OnBlock."""
        first, last = (torch.searchsorted(self._sorted, indices, right=right) for right in (False, True))
        counts = last - first
        if not int(counts.sum()):
            return
        rows = torch.repeat_interleave(torch.arange(len(indices)), counts)
        within = torch.arange(len(rows)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        pairs = self._order[first[rows] + within]
        with torch.no_grad():
            self._scores[pairs] = maxsim_pairs(self._queries, documents.pick(rows), self._query_of[pairs]).cpu()

    def merged(self, topology: Topology) -> Tensor:
        """[pairs] float32 over all data-parallel ranks, on every rank's CPU. Called by all ranks: one all-reduce over
        the data-parallel group and one broadcast over the pipeline."""
        scores = self._scores.to(topology.device)
        if topology.is_last_stage:
            scores = sum_over(scores, topology.dp_group)
        return send_from_last(scores, topology.groups.pp).cpu()


def for_each_document(encoder: TextEncoder, texts: Sequence[str], on_blocks: Sequence[OnBlock], *,
                      instruction: str | None = None, show_progress: bool = False) -> None:
    """Hand the vectors of this rank's share of the documents to each function, block by block; they are not kept.

    Called by all ranks; `texts` may read each text on access, and is read on the rank that embeds it.

    Raises:
        EmptyTextError: a text without vectors, on every rank alike; its `row` counts through all texts.
    """
    topology = encoder.topology
    size = VECTOR_TEXTS_AT_ONCE * topology.dp_size
    with tqdm(total=len(texts), unit="text", desc="encode and search", disable=None if show_progress else True) as bar:
        for first in range(0, len(texts), size):
            block = texts[first : first + size]
            own = encoder.share(block, "document", first, instruction=instruction)
            if topology.is_last_stage and len(own.counts):
                indices = first + torch.arange(topology.dp_rank, len(block), topology.dp_size)
                for function in on_blocks:
                    function(own, indices)
            bar.update(len(block))


def queries_on_device(encoder: TextEncoder, texts: Sequence[str], *, instruction: str | None = None) -> TextVectors:
    """The vectors of all queries, on every rank's device. Called by all ranks."""
    queries = encoder.vectors(texts, "query", instruction=instruction)
    return TextVectors(vectors=queries.vectors.to(encoder.topology.device), counts=queries.counts)


def maxsim_of_lists(encoder: TextEncoder, pairs: Sequence[Pair]) -> Tensor:
    """[pairs] MaxSim of query and document, on every rank's CPU, so that a multi-vector model can rank lists. Encodes
    each text once. Called by all ranks."""
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    documents = list(dict.fromkeys(pair.document for pair in pairs))
    row_of_query = {text: row for row, text in enumerate(queries)}
    row_of_document = {text: row for row, text in enumerate(documents)}
    scores = PairScores(queries_on_device(encoder, queries), torch.tensor([row_of_query[pair.query] for pair in pairs]),
                        torch.tensor([row_of_document[pair.document] for pair in pairs]))
    for_each_document(encoder, documents, [scores.add])
    return scores.merged(encoder.topology)
