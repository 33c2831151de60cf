"""Sparse vectors (SPLADE): the contrastive loss and distillation with dot products over the vocabulary, and the
regularizers that keep the vectors sparse.

Each tensor-parallel rank has the weights of its share of the vocabulary: scores, and what is small, are summed over
these ranks; no rank ever holds whole vectors. Documents of other data-parallel ranks come in tiles, as those of late
interaction, of which a sparse vector is the case of one vector for a text.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.matryoshka import MatryoshkaDim
from megatron_embed.losses.sparsity import regularizer
from megatron_embed.objectives.base import LossGradient, Sums
from megatron_embed.objectives.hard_negatives import Groups, HardNegatives
from megatron_embed.objectives.multi_vector import MultiVectorContrastive
from megatron_embed.parallel.collectives import SumOverRanks, sum_over

NAMES = ("query_regularizer", "document_regularizer", "query_nonzeros", "document_nonzeros")
"""Metrics besides those of the loss: the regularizers without their weights, and tokens of the vocabulary with a
weight, per text."""


class SparseRegularizers:
    """The regularizers of queries and documents, over the global batch.

    Args:
        dp_group: data-parallel ranks, which have different texts.
        tp_group: tensor-parallel ranks, which have different shares of the vocabulary.
    """

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> None:
        self._objective, self._dp_group, self._tp_group = config.objective, dp_group, tp_group

    def add_to(self, loss: LossGradient, embeddings: Tensor, batch: EmbedBatch, step: int) -> LossGradient:
        """The loss with the regularizers' value, metrics and gradient, which is added in place.

        One all-reduce of [2, vocabulary/tp] over the data-parallel ranks, a small one over the tensor-parallel ranks.

        Args:
            embeddings: [rows/dp, vocabulary/tp], those of the queries, then of the documents.
            step: the optimizer step, from 0.
        """
        bounds = (slice(0, batch.num_queries), slice(batch.num_queries, len(embeddings)))
        own = torch.stack([torch.cat([
            embeddings[rows].sum(dim=0, dtype=torch.float64),
            embeddings.new_full((1,), float(rows.stop - rows.start), dtype=torch.float64),
            (embeddings[rows] > 0).sum(dtype=torch.float64)[None]]) for rows in bounds])
        sums, counts, nonzeros = sum_over(own, self._dp_group).split([embeddings.shape[1], 1, 1], dim=1)
        counts = counts[:, 0].clamp(min=1.0)
        kinds = (self._objective.query_regularizer, self._objective.document_regularizer)
        values = []
        for index, (kind, weight) in enumerate(zip(kinds, self._objective.regularizer_weights(step), strict=True)):
            value, gradient = regularizer(kind, sums[index], counts[index])
            values.append(value)
            loss.embeddings[bounds[index]] += (weight * gradient).to(embeddings.dtype)
        totals = sum_over(torch.cat([torch.stack(values), nonzeros[:, 0]]), self._tp_group)
        weighted = sum(weight * value for weight, value in zip(
            self._objective.regularizer_weights(step), totals[:2], strict=True))
        return LossGradient(sums=_with_regularizers(loss.sums, weighted, totals, counts), embeddings=loss.embeddings)


def _with_regularizers(sums: Sums, weighted: Tensor, totals: Tensor, counts: Tensor) -> Sums:
    """The metrics with those of the regularizers, whose weighted sum is added to the loss.

    Args:
        sums: with all names, and the values of the loss alone.
        totals: [4] float64, in the order of NAMES, the nonzeros of all texts.
        counts: [2] float64, queries and documents of the global batch.
    """
    values, count = sums.values.clone(), sums.values[0, 1]
    values[0, 0] += weighted * count
    ratios = torch.stack([totals, torch.cat([torch.ones_like(counts), counts])], dim=1)
    # Means over the queries of the global batch, so that parts of a validation set add up.
    ratios[:2] *= count
    return Sums(names=sums.names, values=torch.cat([values, ratios]))


class SparseContrastive(MultiVectorContrastive):
    """InfoNCE of each local query's positives against the documents of all data-parallel ranks, by dot products."""

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config, dp_group)
        self._tp_group = tp_group
        self._regularizers = SparseRegularizers(config, dp_group, tp_group)
        self.names = self.names + NAMES

    def counts(self, batch: EmbedBatch) -> Tensor:
        """One vector of each text."""
        return torch.ones(batch.num_rows, dtype=torch.int64)

    def whole(self, values: Tensor) -> Tensor:
        """Summed over the shares of the vocabulary: one all-reduce over the tensor-parallel ranks."""
        return sum_over(values, self._tp_group)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective and MultiVectorContrastive; `embeddings`: [rows/dp, vocabulary/tp]. Besides, one all-reduce of
        scores per block of queries over the tensor-parallel ranks, and those of SparseRegularizers."""
        loss = super().__call__(embeddings, batch, total=total)
        return self._regularizers.add_to(loss, embeddings, batch, self.step)


class SparseDistillation(HardNegatives):
    """`margin_mse` and `kl_distillation` with dot products over the vocabulary; over the global batch, as their
    regularizers are."""

    couples_batch = True

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config, dp_group)
        self._tp_group = tp_group
        self._regularizers = SparseRegularizers(config, dp_group, tp_group)
        self.names = self.names + NAMES

    def _similarity(self, leaf: Tensor, batch: EmbedBatch, groups: Groups, matryoshka: MatryoshkaDim) -> Tensor:
        own = super()._similarity(leaf, batch, groups, matryoshka)
        whole: Tensor = SumOverRanks.apply(own, self._tp_group)  # type: ignore[no-untyped-call]
        return whole

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings`: [rows/dp, vocabulary/tp]. Besides the all-reduce of the sums, one of the
        similarities over the tensor-parallel ranks, and those of SparseRegularizers."""
        loss = super().__call__(embeddings, batch, total=total)
        return self._regularizers.add_to(loss, embeddings, batch, self.step)
