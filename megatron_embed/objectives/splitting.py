"""Parts of an embedding batch: its micro-batches, for losses that need no other, or some of its queries."""

import torch
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch


def split_by_micro_batch(batch: EmbedBatch) -> list[EmbedBatch]:
    """One EmbedBatch per micro-batch, its rows renumbered: queries in order, then their documents."""
    parts = []
    for micro in batch.micro_batches:
        rows = micro.kept_rows.sort().values
        queries, documents = rows[rows < batch.num_queries], rows[rows >= batch.num_queries] - batch.num_queries
        parts.append(part_of(batch, queries, documents, micro_batches=(micro,), capacity=batch.micro_capacity))
    return parts


def part_of(batch: EmbedBatch, queries: Tensor, documents: Tensor, *, micro_batches: tuple[MicroBatch, ...],
            capacity: Capacity) -> EmbedBatch:
    """The rows of some queries, renumbered from 0.

    Args:
        queries: [queries of the part] int64, their numbers, ascending.
        documents: [documents of the part] int64, the numbers of all of their documents, ascending.
        micro_batches: that the part's rows come from.
        capacity: the most that any rank's part holds.
    """
    given = torch.isin(batch.positive_query, queries)
    return EmbedBatch(
        micro_batches=micro_batches, num_queries=len(queries), num_documents=len(documents),
        positive_index=torch.searchsorted(documents, batch.positive_index[queries]),
        document_query=torch.searchsorted(queries, batch.document_query[documents]),
        is_positive=batch.is_positive[documents], query_ids=batch.query_ids[queries],
        positive_query=torch.searchsorted(queries, batch.positive_query[given]),
        positive_ids=batch.positive_ids[given], document_ids=batch.document_ids[documents], num_truncated=0,
        in_batch=_of(batch.in_batch, queries), scores=_of(batch.scores, queries),
        teacher_scores=_of(batch.teacher_scores, documents), capacity=capacity, micro_capacity=batch.micro_capacity)


def _of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
