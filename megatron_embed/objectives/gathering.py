"""What data-parallel ranks tell each other for a loss over all of their rows: numbers, then vectors, and back."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.parallel.collectives import gather_padded, scatter_sum


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What the ranks of a group know of each other's rows; equal on all of them, in the order of the ranks."""

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
    owner: Tensor
    """[candidates] int64, number over all ranks of the query that a document was given for; empty if not asked for."""
    is_positive: Tensor
    """[candidates] bool; empty likewise."""


def gather_pool(batch: EmbedBatch, group: dist.ProcessGroup, device: torch.device, *, ids: bool,
                owners: bool) -> Pool:
    """Counts and, if asked for, text hashes and owners of all ranks' rows: one all-gather of one padded int64 message.
    """
    pairs = torch.stack([batch.query_ids[batch.positive_query], batch.positive_ids], dim=1)
    owned = torch.stack([batch.document_query, batch.is_positive.to(torch.int64)], dim=1)
    capacity = batch.capacity
    fields = [(batch.document_ids, capacity.documents * ids), (batch.query_ids, capacity.queries * ids),
              (pairs.flatten(), 2 * capacity.positives * ids), (owned.flatten(), 2 * capacity.documents * owners)]
    counts = torch.tensor([batch.num_documents, batch.num_queries, len(pairs)])
    parts = [counts]
    for values, size in fields:
        parts.append(torch.zeros(size, dtype=torch.int64))
        parts[-1][: values.numel()] = values[:size]
    message = torch.cat(parts)
    gathered = gather_padded(message.to(device), len(message), group)
    numbers, documents, queries, given, owned = gathered.split([3, *(size for _, size in fields)], dim=1)
    num_documents, num_queries, num_pairs = numbers.unbind(dim=1)
    given, owned = given.unflatten(1, (-1, 2)), owned.unflatten(1, (-1, 2))
    owner = owned[:, :, 0] + (num_queries.cumsum(0) - num_queries)[:, None]
    held = filled(owner.shape[1], num_documents)
    return Pool(num_documents=num_documents, num_queries=num_queries,
                document_ids=documents[filled(documents.shape[1], num_documents)],
                query_ids=queries[filled(queries.shape[1], num_queries)],
                given=given[filled(given.shape[1], num_pairs)], owner=owner[held],
                is_positive=owned[:, :, 1][held].bool())


def filled(capacity: int, counts: Tensor) -> Tensor:
    """[ranks, capacity] bool, true at the first counts[rank] places of a rank."""
    return torch.arange(capacity, device=counts.device) < counts[:, None]


@dataclass(frozen=True, kw_only=True)
class GatheredRows:
    """The rows of all ranks of a group, and the way back for their gradients."""

    document: Tensor
    """[candidates, dim]."""
    query: Tensor | None
    """[queries, dim]; null if they were not asked for."""
    valid: tuple[Tensor, Tensor | None]
    """[ranks, capacity] bool, where documents and queries lie in the padded message."""
    group: dist.ProcessGroup

    def return_gradients(self, document: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of what this rank gave, summed over the ranks: one reduce-scatter.

        Args:
            document: [candidates, dim] gradient that this rank found.
            query: [queries, dim]; null if they were not asked for.
        """
        padded = [_pad(document, self.valid[0])]
        if query is not None and self.valid[1] is not None:
            padded.append(_pad(query, self.valid[1]))
        mine = scatter_sum(padded[0] if len(padded) == 1 else torch.cat(padded, dim=1), self.group)
        rank, places = self.group.rank(), self.valid[0].shape[1]
        own_query = None if self.valid[1] is None else mine[places:][self.valid[1][rank]]
        return mine[:places][self.valid[0][rank]], own_query


def gather_rows(document: Tensor, query: Tensor | None, capacity: Capacity, pool: Pool,
                group: dist.ProcessGroup) -> GatheredRows:
    """The documents of all ranks, and the queries if given: one all-gather of one padded message.

    Args:
        document: [candidates/dp, dim].
        query: [queries/dp, dim], or null.
        capacity: of each rank, the same on all.
        pool: how many each rank has.
        group: of the data-parallel ranks, without context parallelism.
    """
    valid = filled(capacity.documents, pool.num_documents)
    if query is None:
        gathered = gather_padded(document, capacity.documents, group)
        return GatheredRows(document=_compact(gathered, valid), query=None, valid=(valid, None), group=group)
    valid_queries = filled(capacity.queries, pool.num_queries)
    message = document.new_zeros(capacity.documents + capacity.queries, document.shape[1])
    message[: len(document)] = document
    message[capacity.documents : capacity.documents + len(query)] = query
    documents, queries = gather_padded(message, len(message), group).split(
        [capacity.documents, capacity.queries], dim=1)
    return GatheredRows(document=_compact(documents, valid), query=_compact(queries, valid_queries),
                        valid=(valid, valid_queries), group=group)


def _compact(padded: Tensor, valid: Tensor) -> Tensor:
    return padded.flatten(0, 1) if bool(valid.all()) else padded[valid]


def _pad(rows: Tensor, valid: Tensor) -> Tensor:
    if bool(valid.all()):
        return rows.view(*valid.shape, rows.shape[1])
    padded = rows.new_zeros(*valid.shape, rows.shape[1])
    padded[valid] = rows
    return padded
