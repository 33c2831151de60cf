"""Parts of an embedding batch: one per micro-batch, for losses within a micro-batch, or some of its queries."""

import torch
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch


def split_by_micro_batch(batch: EmbedBatch) -> list[EmbedBatch]:
    """One EmbedBatch per micro-batch, its rows renumbered: queries in order, then their documents."""
    parts = []
    for micro in batch.micro_batches:
        rows = micro.valid_rows.sort().values
        queries, documents = rows[rows < batch.num_queries], rows[rows >= batch.num_queries] - batch.num_queries
        parts.append(part_of(batch, queries, documents, micro_batches=(micro,), capacity=batch.micro_capacity))
    return parts


def part_of(batch: EmbedBatch, queries: Tensor, documents: Tensor, *, micro_batches: tuple[MicroBatch, ...],
            capacity: Capacity) -> EmbedBatch:
    """The rows of some queries, renumbered from 0.

    Args:
        queries: [queries of the part] int64, their indices, ascending.
        documents: [documents of the part] int64, the indices of all of their documents, ascending.
        micro_batches: those that hold the part's rows.
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
        in_batch=_select(batch.in_batch, queries), scores=_select(batch.scores, queries),
        teacher_scores=_select(batch.teacher_scores, documents),
        vector_counts=_select(batch.vector_counts, torch.cat([queries, documents + batch.num_queries])),
        dense_rows=batch.dense_rows, query_token_ids=batch.query_token_ids, embeds_documents=batch.embeds_documents,
        capacity=capacity, micro_capacity=batch.micro_capacity)


def _select(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
