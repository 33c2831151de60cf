"""Communication of a loss over all data-parallel ranks: text ids, then embeddings, and their gradients back."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.parallel.collectives import gather_padded, scatter_sum


@dataclass(frozen=True, kw_only=True)
class GlobalBatchIds:
    """Numbers and text ids of the rows of all ranks of a group; equal on all of them, in the order of the ranks."""

    num_documents: Tensor
    """[ranks] int64."""
    num_queries: Tensor
    """[ranks] int64."""
    document_ids: Tensor
    """[candidates] int64, hashes of the documents' texts; empty if ids were not asked for."""
    query_ids: Tensor
    """[queries] int64, hashes of the queries' texts; empty likewise."""
    given: Tensor
    """[pairs, 2] int64, hashes of (query, a text given to it as positive) of all rows; empty likewise."""
    document_query: Tensor
    """[candidates] int64, index over all ranks of the query that a document was given for; empty if not asked for."""
    is_positive: Tensor
    """[candidates] bool; empty likewise."""


def gather_ids(batch: EmbedBatch, group: dist.ProcessGroup, device: torch.device, *, texts: bool,
               document_queries: bool) -> GlobalBatchIds:
    """Numbers of rows and, if asked for, text hashes and documents' queries of all ranks: one all-gather of one padded
    int64 message."""
    pairs = torch.stack([batch.query_ids[batch.positive_query], batch.positive_ids], dim=1)
    given_for = torch.stack([batch.document_query, batch.is_positive.to(torch.int64)], dim=1)
    capacity = batch.capacity
    fields = [(batch.document_ids, capacity.documents * texts), (batch.query_ids, capacity.queries * texts),
              (pairs.flatten(), 2 * capacity.positives * texts),
              (given_for.flatten(), 2 * capacity.documents * document_queries)]
    parts = [torch.tensor([batch.num_documents, batch.num_queries, len(pairs)])]
    for values, size in fields:
        parts.append(torch.zeros(size, dtype=torch.int64))
        parts[-1][: values.numel()] = values[:size]
    message = torch.cat(parts)
    gathered = gather_padded(message.to(device), len(message), group)
    counts, documents, queries, given, given_for = gathered.split([3, *(size for _, size in fields)], dim=1)
    num_documents, num_queries, num_pairs = counts.unbind(dim=1)
    given, given_for = given.unflatten(1, (-1, 2)), given_for.unflatten(1, (-1, 2))
    document_query = given_for[:, :, 0] + (num_queries.cumsum(0) - num_queries)[:, None]
    valid = valid_positions(document_query.shape[1], num_documents)
    return GlobalBatchIds(
        num_documents=num_documents, num_queries=num_queries,
        document_ids=documents[valid_positions(documents.shape[1], num_documents)],
        query_ids=queries[valid_positions(queries.shape[1], num_queries)],
        given=given[valid_positions(given.shape[1], num_pairs)], document_query=document_query[valid],
        is_positive=given_for[:, :, 1][valid].bool())


def valid_positions(capacity: int, counts: Tensor) -> Tensor:
    """[ranks, capacity] bool, true at the first counts[rank] positions of a rank."""
    return torch.arange(capacity, device=counts.device) < counts[:, None]


@dataclass(frozen=True, kw_only=True)
class GatheredEmbeddings:
    """The embeddings of all ranks of a group, with the return of their gradients."""

    document: Tensor
    """[candidates, dim]."""
    query: Tensor | None
    """[queries, dim]; None if they were not asked for."""
    valid: tuple[Tensor, Tensor | None]
    """[ranks, capacity] bool, true where documents and queries lie in the padded message."""
    group: dist.ProcessGroup

    def return_gradients(self, document: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of this rank's embeddings, summed over the ranks: one reduce-scatter.

        Args:
            document: [candidates, dim] gradient computed on this rank.
            query: [queries, dim]; None if they were not asked for.
        """
        padded = [_pad(document, self.valid[0])]
        if query is not None and self.valid[1] is not None:
            padded.append(_pad(query, self.valid[1]))
        own = scatter_sum(padded[0] if len(padded) == 1 else torch.cat(padded, dim=1), self.group)
        rank, capacity = self.group.rank(), self.valid[0].shape[1]
        own_query = None if self.valid[1] is None else own[capacity:][self.valid[1][rank]]
        return own[:capacity][self.valid[0][rank]], own_query


def gather_embeddings(document: Tensor, query: Tensor | None, capacity: Capacity, ids: GlobalBatchIds,
                      group: dist.ProcessGroup) -> GatheredEmbeddings:
    """The documents of all ranks, and the queries if given: one all-gather of one padded message.

    Args:
        document: [candidates/dp, dim].
        query: [queries/dp, dim], or None.
        capacity: of each rank, the same on all.
        ids: how many rows each rank has.
        group: the data-parallel ranks, without context parallelism.
    """
    valid = valid_positions(capacity.documents, ids.num_documents)
    if query is None:
        gathered = gather_padded(document, capacity.documents, group)
        return GatheredEmbeddings(document=_compact(gathered, valid), query=None, valid=(valid, None), group=group)
    valid_queries = valid_positions(capacity.queries, ids.num_queries)
    message = document.new_zeros(capacity.documents + capacity.queries, document.shape[1])
    message[: len(document)] = document
    message[capacity.documents : capacity.documents + len(query)] = query
    documents, queries = gather_padded(message, len(message), group).split(
        [capacity.documents, capacity.queries], dim=1)
    return GatheredEmbeddings(document=_compact(documents, valid), query=_compact(queries, valid_queries),
                              valid=(valid, valid_queries), group=group)


def _compact(padded: Tensor, valid: Tensor) -> Tensor:
    return padded.flatten(0, 1) if bool(valid.all()) else padded[valid]


def _pad(embeddings: Tensor, valid: Tensor) -> Tensor:
    if bool(valid.all()):
        return embeddings.view(*valid.shape, embeddings.shape[1])
    padded = embeddings.new_zeros(*valid.shape, embeddings.shape[1])
    padded[valid] = embeddings
    return padded
