"""The loss over the global batch: the only place that sees other ranks' documents."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import ObjectiveConfig
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


class Objective:
    """InfoNCE of the local queries against the documents of all data-parallel ranks."""

    def __init__(self, config: ObjectiveConfig, dp_group: dist.ProcessGroup, *, documents_per_query: int) -> None:
        """`documents_per_query`: the most any row can have (its positive and its hard negatives); equal on all
        ranks."""
        self.temperature = config.temperature
        self.dp_group = dp_group
        self.documents_per_query = documents_per_query

    def __call__(self, embeddings: Tensor, batch: EmbedBatch) -> tuple[Sums, Tensor]:
        """Loss of these rows' batch over all data-parallel ranks, and its gradient on this rank's embeddings.

        Args:
            embeddings: [rows/dp, dim] float32, queries first, as numbered in `batch`; detached.
            batch: of the same number of queries on every rank; documents may differ in number.
        Returns:
            (sums over the global batch, [rows/dp, dim] gradient of the global mean loss).
            One all-gather of the documents and one reduce-scatter of their gradients over the data-parallel group, and
            two small collectives (counts; sums), whatever the number of micro-batches.
        """
        group, device = self.dp_group, embeddings.device
        query, document = embeddings[: batch.num_queries], embeddings[batch.num_queries :]
        capacity = batch.num_queries * self.documents_per_query
        counts = gather_padded(torch.tensor([batch.num_documents], device=device), 1, group).flatten()
        gathered = gather_padded(document, capacity, group)
        valid = torch.arange(capacity, device=device) < counts[:, None]
        ragged = not bool(valid.all())
        candidates = gathered[valid] if ragged else gathered.flatten(0, 1)
        before = int(counts[: group.rank()].sum())
        total_rows = batch.num_queries * group.size()
        sums, grad_query, grad_candidates = info_nce_gradients(
            query, candidates, batch.positive_index.to(device) + before, self.temperature, total_rows=total_rows)
        grad_gathered = grad_candidates.view_as(gathered) if not ragged else torch.zeros_like(gathered)
        if ragged:
            grad_gathered[valid] = grad_candidates
        grad_document = scatter_sum(grad_gathered, group)[: batch.num_documents]
        local = torch.cat([sums.stacked(), torch.tensor([batch.num_queries], dtype=torch.float64, device=device)])
        return Sums(values=sum_over(local, group)), torch.cat([grad_query, grad_document])
