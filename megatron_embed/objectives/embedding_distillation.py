"""Distillation of vectors: every text's vector is brought close to a teacher's."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.triplet_and_distillation import teacher_distance
from megatron_embed.objectives.base import LossGradient, Objective, Sums
from megatron_embed.objectives.fixed_vectors import FixedVectors
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.device_copy import copy_to_device

NAMES = ("loss", "teacher_similarity")


class EmbeddingDistillation(Objective[EmbedBatch]):
    """The distance of each text's vector to the teacher's, a mean over the queries and documents of the global batch.
    `teacher_similarity` is their mean cosine.

    Args:
        dp_group: data-parallel ranks, without context parallelism.
        fixed: the teacher's vectors, and the projection if there is one.
    """

    couples_batch = False
    names = NAMES

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, fixed: FixedVectors) -> None:
        assert fixed.teacher_query is not None and fixed.teacher_document is not None
        self.distance, self.dp_group = config.objective.teacher_distance, dp_group
        self.learned = self.projection = fixed.projection
        self.lookups = (fixed.teacher_query, fixed.teacher_document)

    def total(self, batch: EmbedBatch) -> float:
        """Texts of all data-parallel ranks, by one all-reduce between their CPUs."""
        if self.projection is not None:
            self.projection.forget_gradient()
        return float(sum_over(torch.tensor(float(batch.num_rows), dtype=torch.float64), self.dp_group))

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are those of the queries, then of the documents. One all-reduce of the sums."""
        of_query, of_document = self.lookups
        teacher = torch.cat([of_query(batch.query_ids), of_document(batch.document_ids)])
        teacher = copy_to_device(teacher, embeddings.device).to(embeddings.dtype)
        leaves = [embeddings.detach().requires_grad_()]
        with torch.enable_grad():
            student = leaves[0]
            if self.projection is not None:
                leaves.append(self.projection.parameters.to(embeddings).detach().requires_grad_())
                student = self.projection(student, leaves[1])
            distances = teacher_distance(student, teacher, self.distance)
            gradient, *of_projection = torch.autograd.grad(distances.sum() / total, leaves)
        if self.projection is not None:
            self.projection.add_gradient(of_projection[0])
        cosines = torch.nn.functional.cosine_similarity(student.detach(), teacher, dim=1)
        sums = torch.stack([distances.detach().double().sum(), cosines.double().sum()])
        values = torch.stack([sums, torch.full_like(sums, len(teacher))], dim=1)
        return LossGradient(sums=Sums(names=self.names, values=sum_over(values, self.dp_group)), embeddings=gradient)
