"""Joint heads (BGE-M3): the contrastive loss of a dense, a sparse and a multi-vector score and of their sum, each also
taught by the sum.

A text's outputs are rows of one width (see JointTexts), so that documents of other data-parallel ranks come in the same
tiles as those of late interaction, all three kinds at once.
"""

import torch
from torch import Tensor

from megatron_embed.batch import EmbedBatch, TextVectors
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.info_nce import Candidates, InfoNCESums
from megatron_embed.losses.joint import (
    JointTexts,
    JointWeights,
    columns_of,
    joint_loss_gradients,
    joint_score_gradients,
    joint_scores,
)
from megatron_embed.names import JOINT_SCORES
from megatron_embed.objectives.contrastive import Contrastive
from megatron_embed.objectives.multi_vector import BlockLoss, BlockTerms, MaxSimQueries, MultiVectorContrastive

_LOSSES = (*(f"{score}_loss" for score in JOINT_SCORES), "sum_loss")


def names(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Metrics besides those of the loss: InfoNCE of each score and of their sum, and what self-distillation adds."""
    return (*_LOSSES, "distillation_loss") if objective.self_distillation else _LOSSES


class JointQueries(MaxSimQueries):
    """Some queries of a joint model; scores are [3, queries, candidates]."""

    def __init__(self, queries: TextVectors, dense_rows: int, columns: Tensor) -> None:
        """`columns`: see `joint_scores`."""
        super().__init__(queries)
        self._texts, self._dense_rows, self._columns = JointTexts(queries, dense_rows), dense_rows, columns

    def empty_scores(self, num_candidates: int) -> Tensor:
        return self.queries.vectors.new_empty(len(JOINT_SCORES), len(self.queries.counts), num_candidates)

    def scores(self, documents: TextVectors) -> Tensor:
        return joint_scores(self._texts, JointTexts(documents, self._dense_rows), self._columns)

    def gradients(self, documents: TextVectors, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        return joint_score_gradients(self._texts, JointTexts(documents, self._dense_rows), self._columns, grad_scores)


class JointBlockLoss(BlockLoss):
    """The loss of blocks of queries by all scores."""

    def __init__(self, objective: Contrastive, candidates: Candidates, terms: BlockTerms, total: float) -> None:
        super().__init__(objective, candidates, terms, total)
        assert isinstance(objective, JointContrastive)
        self._joint = objective.joint
        self._losses = torch.zeros(len(JOINT_SCORES) + 2, dtype=torch.float64,
                                   device=candidates.positive_index.device)

    def gradients(self, scores: Tensor, first: int, weights: Tensor | None) -> InfoNCESums:
        result = joint_loss_gradients(scores, self._candidates, self._settings, self._joint, first=first,
                                      total=self._total, weights=weights)
        self._losses += result.losses
        return result.of_sum

    def further(self, batch: EmbedBatch) -> Tensor:
        losses = self._losses if self._joint.distils else self._losses[:-1]
        return torch.stack([losses, torch.full_like(losses, batch.num_queries)], dim=1)


class JointContrastive(MultiVectorContrastive):
    """InfoNCE of each local query's positives against the documents of all data-parallel ranks, by three scores and
    their weighted sum, with self-distillation; see losses/joint.py."""

    block_loss = JointBlockLoss

    def __init__(self, config: RunConfig, *arguments: object) -> None:
        """Arguments as those of Contrastive."""
        super().__init__(config, *arguments)  # type: ignore[arg-type]
        objective = config.objective
        self.joint = JointWeights(scores=objective.score_weights, losses=objective.score_loss_weights,
                                  distils=objective.self_distillation)
        self.names = self.names + names(objective)

    def on_host(self, batch: EmbedBatch) -> Tensor:
        """The columns of the matrices of weights. Of tokens of the queries, whose number the host knows, not of those
        that documents share with them, for which it would have to wait."""
        assert batch.query_token_ids is not None, "a joint model's batch says which tokens its queries contain"
        return columns_of(batch.query_token_ids)

    def compared(self, queries: TextVectors, batch: EmbedBatch, copied: Tensor | None) -> MaxSimQueries:
        assert copied is not None
        return JointQueries(queries, batch.dense_rows, copied)
