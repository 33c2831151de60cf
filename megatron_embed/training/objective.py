"""The loss over the global batch: the only place that sees other ranks' documents."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import ObjectiveConfig
from megatron_embed.losses.duplicates import duplicate_mask
from megatron_embed.losses.info_nce import info_nce_gradients
from megatron_embed.parallel.collectives import gather_padded, scatter_sum, sum_over


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the global batch, from which the step's metrics are means. Fields as in losses.info_nce.InfoNCESums."""

    values: Tensor
    """[8] float64: InfoNCESums' seven fields, then the number of queries."""

    def metrics(self) -> dict[str, float]:
        loss, correct, positive, negative, margin, negatives, masked, queries = self.values.tolist()
        return {
            "loss": loss / queries, "in_batch_accuracy": correct / queries, "positive_similarity": positive / queries,
            "negative_similarity": negative / queries, "margin": margin / queries,
            "masked_fraction": masked / max(negatives + masked, 1.0), "negatives_per_query": negatives / queries}


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


class Objective:
    """InfoNCE of the local queries against the documents of all data-parallel ranks."""

    def __init__(self, config: ObjectiveConfig, dp_group: dist.ProcessGroup) -> None:
        self.temperature = config.temperature
        self.mask_duplicates = config.mask_duplicates
        self.dp_group = dp_group

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total_rows: int) -> tuple[Sums, Tensor]:
        """Loss of these rows' batch over all data-parallel ranks, and its gradient on this rank's embeddings.

        Args:
            embeddings: [rows/dp, dim] float32, queries first, as numbered in `batch`; detached.
            batch: ranks may differ in their numbers of rows, but not in `batch.capacity`.
            total_rows: queries over which the loss is a mean; those of the global batch.
        Returns:
            (sums over these queries of all ranks, [rows/dp, dim] gradient of their summed loss / total_rows).
            One all-gather of the documents and one reduce-scatter of their gradients over the data-parallel group, and
            two small collectives (counts and text hashes; sums), whatever the number of micro-batches.
        """
        group, device = self.dp_group, embeddings.device
        query, document = embeddings[: batch.num_queries], embeddings[batch.num_queries :]
        pool = gather_pool(batch, group, device, ids=self.mask_duplicates)
        gathered = gather_padded(document, batch.capacity.documents, group)
        valid = _filled(batch.capacity.documents, pool.num_documents)
        ragged = not bool(valid.all())
        candidates = gathered[valid] if ragged else gathered.flatten(0, 1)
        positive_index = batch.positive_index.to(device) + int(pool.num_documents[: group.rank()].sum())
        excluded = duplicate_mask(batch.query_ids.to(device), positive_index, pool.document_ids,
                                  pool.given).tile if self.mask_duplicates else None
        sums, grad_query, grad_candidates = info_nce_gradients(
            query, candidates, positive_index, self.temperature, total_rows=total_rows, excluded=excluded)
        grad_gathered = grad_candidates.view_as(gathered) if not ragged else torch.zeros_like(gathered)
        if ragged:
            grad_gathered[valid] = grad_candidates
        grad_document = scatter_sum(grad_gathered, group)[: batch.num_documents]
        local = torch.cat([sums.stacked(), torch.tensor([batch.num_queries], dtype=torch.float64, device=device)])
        return Sums(values=sum_over(local, group)), torch.cat([grad_query, grad_document])
