"""The batches of all data-parallel ranks as one, on the CPU, in the order of the global batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_embed.audit.variation import Variation
from megatron_embed.batch import EmbedBatch, RerankBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """Queries and documents of all data-parallel ranks."""

    query_texts: Tensor
    """[queries] int64, hashes; of a reranker 0."""
    document_texts: Tensor
    """[documents] int64, hashes."""
    document_query: Tensor
    """[documents] int64, ascending."""
    is_positive: Tensor
    """[documents] bool."""
    given: frozenset[tuple[int, int]]
    """Hashes of (query, a text that some row gives it as positive)."""
    in_batch: Tensor | None
    """[queries] bool."""
    scores: Tensor | None = None
    """[queries] float64, labels of pairs."""
    teacher: Tensor | None = None
    """[documents] float64."""
    labels: Tensor | None = None
    """[documents] float32, of a reranker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one data-parallel rank brings."""

    query: Tensor
    """[queries/dp, dim] float64; of a reranker none."""
    document: Tensor
    """[documents/dp, dim] float64; of a reranker [documents/dp, 1], scores."""
    batch: EmbedBatch | RerankBatch

    @classmethod
    def of(cls, embeddings: Tensor, batch: EmbedBatch | RerankBatch) -> "Part":
        vectors = embeddings.detach().double().cpu()
        queries = batch.num_queries if isinstance(batch, EmbedBatch) else 0
        return cls(query=vectors[:queries], document=vectors[queries:],
                   batch=dataclasses.replace(batch, micro_batches=()))


def joined(parts: Sequence[Part]) -> GlobalBatch:
    """The batches of all ranks as one."""
    if isinstance(parts[0].batch, RerankBatch):
        return _joined_lists([part.batch for part in parts if isinstance(part.batch, RerankBatch)])
    batches, first, of = [part.batch for part in parts if isinstance(part.batch, EmbedBatch)], 0, []
    for batch in batches:
        of.append(batch.document_query + first)
        first += batch.num_queries
    given = {pair for batch in batches for pair in zip(batch.query_ids[batch.positive_query].tolist(),
                                                       batch.positive_ids.tolist(), strict=True)}
    in_batch = [torch.ones(batch.num_queries, dtype=torch.bool) if batch.in_batch is None else batch.in_batch
                for batch in batches]
    return GlobalBatch(
        query_texts=torch.cat([batch.query_ids for batch in batches]),
        document_texts=torch.cat([batch.document_ids for batch in batches]), document_query=torch.cat(of),
        is_positive=torch.cat([batch.is_positive for batch in batches]), given=frozenset(given),
        in_batch=None if all(batch.in_batch is None for batch in batches) else torch.cat(in_batch),
        scores=_cat([batch.scores for batch in batches]), teacher=_cat([batch.teacher_scores for batch in batches]))


def _joined_lists(batches: Sequence[RerankBatch]) -> GlobalBatch:
    sizes = np.array([size for batch in batches for size in batch.group_sizes], dtype=np.int64)
    labels = torch.cat([batch.labels for batch in batches])
    return GlobalBatch(
        query_texts=torch.zeros(len(sizes), dtype=torch.int64), document_texts=torch.zeros(len(labels)),
        document_query=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)), is_positive=labels > 0,
        given=frozenset(), in_batch=None, labels=labels, teacher=_cat([batch.teacher_scores for batch in batches]))


def factors(variation: Variation, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """([queries], [documents]) factors of the gradient."""
    queries = torch.ones(len(batch.query_texts), dtype=torch.float64)
    for first, last, factor in variation.factors:
        queries[first:last] *= factor
    documents = queries[batch.document_query]
    if "queries" in variation.detached:
        queries = queries * variation.detached_factor
    for role, rows in (("positives", batch.is_positive), ("hard_negatives", ~batch.is_positive)):
        if role in variation.detached:
            documents = torch.where(rows, documents * variation.detached_factor, documents)
    return (queries if batch.labels is None else queries[:0]), documents


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    """All values, None if a part has none."""
    known = [value for value in values if value is not None]
    return torch.cat(known).double() if len(known) == len(values) else None
