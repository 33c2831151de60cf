"""InfoNCE over the global batch: the only place that sees other ranks' documents."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import ObjectiveConfig
from megatron_embed.losses.duplicates import duplicate_mask
from megatron_embed.losses.info_nce import InfoNCESums, info_nce_gradients
from megatron_embed.parallel.collectives import gather_padded, scatter_sum, sum_over
from megatron_embed.training.objective import LossGradient, Objective, Sums


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What the ranks of a group know of each other's rows; equal on all of them."""

    num_documents: Tensor
    """[ranks] int64."""
    document_ids: Tensor
    """[candidates] int64, hashes of the documents' texts in the order of the ranks; empty without a mask."""
    given: Tensor
    """[pairs, 2] int64, hashes of (query, a text given to it as positive) of all rows; empty without a mask."""


def gather_pool(batch: EmbedBatch, group: dist.ProcessGroup, device: torch.device, *, ids: bool) -> Pool:
    """Counts and, if `ids`, text hashes of all ranks' rows: one all-gather of one padded int64 message."""
    pairs = torch.stack([batch.query_ids[batch.positive_query], batch.positive_ids], dim=1)
    sizes = (batch.capacity.documents, 2 * batch.capacity.positives) if ids else (0, 0)
    message = torch.zeros(2 + sum(sizes), dtype=torch.int64)
    message[0], message[1] = batch.num_documents, len(pairs)
    if ids:
        message[2 : 2 + batch.num_documents] = batch.document_ids
        message[2 + sizes[0] : 2 + sizes[0] + pairs.numel()] = pairs.flatten()
    gathered = gather_padded(message.to(device), len(message), group)
    counts, documents, given = gathered.split([2, *sizes], dim=1)
    given = given.unflatten(1, (-1, 2))
    return Pool(num_documents=counts[:, 0], document_ids=documents[_filled(documents.shape[1], counts[:, 0])],
                given=given[_filled(given.shape[1], counts[:, 1])])


def _filled(capacity: int, counts: Tensor) -> Tensor:
    """[ranks, capacity] bool, true at the first counts[rank] places of a rank."""
    return torch.arange(capacity, device=counts.device) < counts[:, None]


class InfoNCE(Objective[EmbedBatch]):
    """InfoNCE of the local queries against the documents of all data-parallel ranks."""

    names = ("loss", "in_batch_accuracy", "positive_similarity", "negative_similarity", "margin", "masked_fraction",
             "negatives_per_query")

    def __init__(self, config: ObjectiveConfig, dp_group: dist.ProcessGroup) -> None:
        self.couples_batch = config.couples_batch
        self.temperature = config.temperature
        self.mask_duplicates = config.mask_duplicates
        self.dp_group = dp_group

    def total(self, batch: EmbedBatch) -> float:
        """Queries of the global batch: every data-parallel rank has as many."""
        return batch.num_queries * self.dp_group.size()

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, rows: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """As the base class says; `rows` are the queries, then the documents.

        Ranks may differ in their numbers of rows, but not in `batch.capacity`. One all-gather of the documents and one
        reduce-scatter of their gradients over the data-parallel group, and two small collectives (counts and text
        hashes; sums), whatever the number of micro-batches.
        """
        group, device = self.dp_group, rows.device
        query, document = rows[: batch.num_queries], rows[batch.num_queries :]
        pool = gather_pool(batch, group, device, ids=self.mask_duplicates)
        gathered = gather_padded(document, batch.capacity.documents, group)
        valid = _filled(batch.capacity.documents, pool.num_documents)
        ragged = not bool(valid.all())
        candidates = gathered[valid] if ragged else gathered.flatten(0, 1)
        positive_index = batch.positive_index.to(device) + int(pool.num_documents[: group.rank()].sum())
        excluded = duplicate_mask(batch.query_ids.to(device), positive_index, pool.document_ids,
                                  pool.given).tile if self.mask_duplicates else None
        sums, grad_query, grad_candidates = info_nce_gradients(
            query, candidates, positive_index, self.temperature, total=total, excluded=excluded)
        grad_gathered = grad_candidates.view_as(gathered) if not ragged else torch.zeros_like(gathered)
        if ragged:
            grad_gathered[valid] = grad_candidates
        grad_document = scatter_sum(grad_gathered, group)[: batch.num_documents]
        return LossGradient(sums=Sums(names=self.names, values=sum_over(_ratios(sums, batch.num_queries), group)),
                            rows=torch.cat([grad_query, grad_document]))


def _ratios(sums: InfoNCESums, queries: int) -> Tensor:
    """[7, 2] float64: sums and divisors in the order of InfoNCE.names."""
    per_query = torch.stack([sums.loss, sums.correct, sums.positive_similarity, sums.negative_similarity, sums.margin,
                             sums.masked, sums.negatives])
    divisors = torch.full_like(per_query, queries)
    divisors[InfoNCE.names.index("masked_fraction")] = sums.masked + sums.negatives
    return torch.stack([per_query, divisors], dim=1)


def split_by_micro_batch(batch: EmbedBatch) -> list[EmbedBatch]:
    """One EmbedBatch per micro-batch, its rows renumbered: queries in order, then their documents."""
    parts = []
    for micro in batch.micro_batches:
        rows = micro.kept_rows.sort().values
        queries, documents = rows[rows < batch.num_queries], rows[rows >= batch.num_queries] - batch.num_queries
        given = torch.isin(batch.positive_query, queries)
        parts.append(EmbedBatch(
            micro_batches=(micro,), num_queries=len(queries), num_documents=len(documents),
            positive_index=torch.searchsorted(documents, batch.positive_index[queries]),
            document_query=torch.searchsorted(queries, batch.document_query[documents]),
            query_ids=batch.query_ids[queries],
            positive_query=torch.searchsorted(queries, batch.positive_query[given]),
            positive_ids=batch.positive_ids[given], document_ids=batch.document_ids[documents], num_truncated=0,
            capacity=batch.micro_capacity, micro_capacity=batch.micro_capacity))
    return parts
