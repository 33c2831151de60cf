"""Communication of a loss over all data-parallel ranks: text ids, then embeddings, and their gradients back."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.parallel.collectives import gather_padded, scatter_sum


@dataclass(frozen=True, kw_only=True)
class GlobalBatchIds:
    """Numbers and text ids of the rows of all ranks of a group; equal on all of them, in the order of the ranks.

    On the CPU, also where the model is on a GPU: all that is derived from them (which rows a message holds, which
    columns are masked) has sizes that the host must know, and would wait for the device to tell.
    """

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


def gather_ids(batch: EmbedBatch, group: dist.ProcessGroup, *, texts: bool, document_queries: bool) -> GlobalBatchIds:
    """Numbers of rows and, if asked for, text hashes and documents' queries of all ranks: one all-gather of one padded
    int64 message, between the CPUs."""
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
    gathered = gather_padded(message, len(message), group)
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
    return torch.arange(capacity) < counts[:, None]


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """The real rows of all ranks in a message that is padded to as many rows of each."""

    capacity: int
    """Rows of a rank, padding included."""
    counts: list[int]
    """Real rows of each rank, its first ones."""
    positions: Tensor | None
    """[rows] int64, the real rows' positions in the message; None: all of them are real."""

    @classmethod
    def of(cls, counts: Tensor, capacity: int) -> "PaddedRows":
        """`counts`: [ranks] int64 on the CPU; so are the positions, until they are copied to the device."""
        valid = valid_positions(capacity, counts)
        return cls(capacity=capacity, counts=counts.tolist(),
                   positions=None if bool(valid.all()) else valid.flatten().nonzero().flatten())

    def compact(self, padded: Tensor) -> Tensor:
        """[ranks, capacity, ...] -> [rows, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.positions is None else rows.index_select(0, self.positions)

    def pad(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [ranks, capacity, ...], 0 in the padding."""
        if self.positions is not None:
            padded = rows.new_zeros(len(self.counts) * self.capacity, *rows.shape[1:])
            rows = padded.index_copy_(0, self.positions, rows)
        return rows.view(len(self.counts), self.capacity, *rows.shape[1:])


@dataclass(frozen=True, kw_only=True)
class GatheredEmbeddings:
    """The embeddings of all ranks of a group, with the return of their gradients."""

    document: Tensor
    """[candidates, dim]."""
    query: Tensor | None
    """[queries, dim]; None if they were not asked for."""
    padded: tuple[PaddedRows, PaddedRows | None]
    """Documents and queries in the message."""
    group: dist.ProcessGroup

    def split(self, widths: Sequence[int]) -> "list[GatheredEmbeddings]":
        """Each vector on its own, of rows that consist of several, one behind the other."""
        documents = self.document.split(list(widths), dim=1)
        queries = [None] * len(widths) if self.query is None else self.query.split(list(widths), dim=1)
        return [dataclasses.replace(self, document=document.contiguous(),
                                    query=None if query is None else query.contiguous())
                for document, query in zip(documents, queries, strict=True)]

    def return_gradients(self, document: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of this rank's embeddings, summed over the ranks: one reduce-scatter.

        Args:
            document: [candidates, dim] gradient computed on this rank.
            query: [queries, dim]; None if they were not asked for.
        """
        documents, queries = self.padded
        parts = [documents.pad(document)]
        if query is not None and queries is not None:
            parts.append(queries.pad(query))
        own = scatter_sum(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), self.group)
        rank, capacity = self.group.rank(), documents.capacity
        own_query = None if queries is None else own[capacity : capacity + queries.counts[rank]]
        return own[: documents.counts[rank]], own_query


def gather_embeddings(document: Tensor, query: Tensor | None, padded: tuple[PaddedRows, PaddedRows | None],
                      group: dist.ProcessGroup) -> GatheredEmbeddings:
    """The documents of all ranks, and the queries if given: one all-gather of one padded message.

    Args:
        document: [candidates/dp, dim].
        query: [queries/dp, dim], or None.
        padded: documents and, if they are given, queries in the message, on the embeddings' device.
        group: the data-parallel ranks, without context parallelism.
    """
    documents, queries = padded
    if query is None or queries is None:
        gathered = gather_padded(document, documents.capacity, group)
        return GatheredEmbeddings(document=documents.compact(gathered), query=None, padded=(documents, None),
                                  group=group)
    message = document.new_zeros(documents.capacity + queries.capacity, document.shape[1])
    message[: len(document)] = document
    message[documents.capacity : documents.capacity + len(query)] = query
    of_documents, of_queries = gather_padded(message, len(message), group).split(
        [documents.capacity, queries.capacity], dim=1)
    return GatheredEmbeddings(document=documents.compact(of_documents), query=queries.compact(of_queries),
                              padded=padded, group=group)
