"""Vectors of a batch's texts by other models than the one in training, which no step changes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.objectives.learned_projection import LearnedProjection

Lookup = Callable[[Tensor], Tensor]
"""[texts] int64 ids of texts -> [texts, dim] float32, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class FixedVectors:
    """Sources of the vectors that an objective needs besides those of the model in training."""

    old_document: Lookup | None = None
    """Documents in the index that is to be kept (objective.compatible_with, training.query_side_only)."""
    guide_query: Lookup | None = None
    guide_document: Lookup | None = None
    """Queries and documents by the guide that tells which are negatives (objective.guide_model)."""
    teacher_query: Lookup | None = None
    teacher_document: Lookup | None = None
    """Queries and documents by the teacher whose vectors are the target (objective.teacher_model)."""
    projection: LearnedProjection | None = None
    """From the model's vectors to the teacher's (objective.teacher_projection)."""

    def rows_of(self, batch: EmbedBatch) -> "FixedRows":
        """The vectors of a batch's rows."""
        return FixedRows(
            old_document=None if self.old_document is None else self.old_document(batch.document_ids),
            guide_query=None if self.guide_query is None else self.guide_query(batch.query_ids),
            guide_document=None if self.guide_document is None else self.guide_document(batch.document_ids))


@dataclass(frozen=True, kw_only=True)
class FixedRows:
    """The vectors of one rank's rows."""

    old_document: Tensor | None
    """[documents/dp, dim]."""
    guide_query: Tensor | None
    """[queries/dp, guide's dim]."""
    guide_document: Tensor | None
    """[documents/dp, guide's dim]."""
