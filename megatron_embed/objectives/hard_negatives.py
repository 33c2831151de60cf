"""Losses of a query with its own positive and hard negatives: triplet loss, and distillation from a teacher."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.matryoshka import MatryoshkaDim, truncate_with_graph
from megatron_embed.losses.triplet_and_distillation import kl_distillation, margin_mse, triplet
from megatron_embed.objectives.base import (
    LossGradient,
    Objective,
    Sums,
    combine_dims,
    configured_dims,
    matryoshka_names,
)
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.device_copy import copy_to_device

NAMES = ("loss", "accuracy", "positive_similarity", "negative_similarity", "margin", "negatives_per_query")
TRIPLET_MARGIN = 5.0
"""Sentence Transformers' default."""


class HardNegatives(Objective[EmbedBatch]):
    """`triplet` and `margin_mse`, means over the hard negatives of the global batch, or `kl_distillation`, a mean over
    its queries. Similarities are dot products, of unit vectors cosines; `accuracy` counts queries whose positive is
    more similar than each of their hard negatives, and `margin` is by how much, on average over queries that have any.
    """

    couples_batch = False

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup) -> None:
        objective = config.objective
        self.dims = configured_dims(config)
        self.names = NAMES + matryoshka_names(self.dims)
        self.loss = objective.loss
        self.margin = TRIPLET_MARGIN if objective.margin is None else objective.margin
        self.temperature = objective.temperature
        self.teacher_temperature = objective.teacher_temperature or objective.temperature
        self.normalize = config.embedding.unit_length
        self.dp_group = dp_group

    def total(self, batch: EmbedBatch) -> float:
        """Hard negatives of all data-parallel ranks, by one all-reduce between their CPUs; or queries, of which every
        rank has as many."""
        if self.loss == "kl_distillation":
            return float(batch.num_queries * self.dp_group.size())
        count = torch.tensor(float(batch.num_documents - batch.num_queries), dtype=torch.float64)
        return float(sum_over(count, self.dp_group))

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are those of the queries, then of the documents. One all-reduce of the sums."""
        values, leaf = [], embeddings.detach().requires_grad_()
        groups = copy_to_device(Groups.of(batch, one_term_per_query=self.loss == "kl_distillation"), embeddings.device)
        with torch.enable_grad():
            weighted = leaf.new_zeros(())
            for matryoshka in self.dims:
                similarity = self._similarity(leaf, batch, groups, matryoshka)
                terms = self._terms(similarity, leaf, batch, groups, matryoshka)
                weighted = weighted + terms.sum() * matryoshka.weight
                values.append(_values(terms.detach(), similarity.detach(), groups))
            (gradient,) = torch.autograd.grad(weighted / total, leaf)
        return LossGradient(
            sums=Sums(names=self.names, values=sum_over(combine_dims(values, self.dims), self.dp_group)),
            embeddings=gradient)

    def _similarity(self, leaf: Tensor, batch: EmbedBatch, groups: "Groups",
                    matryoshka: MatryoshkaDim) -> Tensor:
        """[documents] similarity of each to its query, differentiable."""
        query, document = self._vectors(leaf, batch, matryoshka)
        return (query[groups.document_query] * document).sum(dim=1)

    def _vectors(self, leaf: Tensor, batch: EmbedBatch, matryoshka: MatryoshkaDim) -> tuple[Tensor, Tensor]:
        """([queries, dim], [documents, dim]) at a dimension."""
        truncated = truncate_with_graph(leaf, matryoshka, normalize=self.normalize)
        return truncated[: batch.num_queries], truncated[batch.num_queries :]

    def _terms(self, similarity: Tensor, leaf: Tensor, batch: EmbedBatch, groups: "Groups",
               matryoshka: MatryoshkaDim) -> Tensor:
        """[terms] losses."""
        negative, positive = groups.negative, groups.positive[groups.negative_query]
        if self.loss == "triplet":
            query, document = self._vectors(leaf, batch, matryoshka)
            return triplet(query[groups.negative_query], document[positive], document[negative], self.margin)
        assert groups.teacher is not None, "rows without teacher scores are refused before training"
        teacher = groups.teacher.to(similarity.dtype)
        if self.loss == "margin_mse":
            return margin_mse(similarity[positive], similarity[negative], teacher[positive], teacher[negative])
        student, target = (torch.where(groups.valid, scores[groups.by_query], 0.0) for scores in (similarity, teacher))
        return kl_distillation(student, target, groups.valid, self.temperature, self.teacher_temperature)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Indices of the queries' positives and hard negatives."""

    document_query: Tensor
    """[documents] int64, the query of each."""
    positive: Tensor
    """[queries] int64, the document that is each query's positive."""
    negative: Tensor
    """[negatives] int64, the documents that are hard negatives."""
    negative_query: Tensor
    """[negatives] int64, the query of each."""
    by_query: Tensor
    """[queries, most documents] int64, each query's documents, its positive first; 0 in the padding."""
    valid: Tensor
    """[queries, most documents] bool, false in the padding."""
    with_negatives: Tensor
    """[queries with a hard negative] int64."""
    divisors: Tensor
    """[6] float64, of the metrics in the order of NAMES."""
    teacher: Tensor | None
    """[documents] float64, a teacher's scores."""

    @staticmethod
    def of(batch: EmbedBatch, *, one_term_per_query: bool) -> "Groups":
        """Those of a batch, on the CPU. `one_term_per_query`: the loss has one; else one per hard negative."""
        negative = (~batch.is_positive).nonzero()[:, 0]
        sizes = torch.bincount(batch.document_query, minlength=batch.num_queries)
        column = torch.arange(int(sizes.max()) if len(sizes) else 1)
        valid, with_negatives = column < sizes[:, None], (sizes > 1).nonzero()[:, 0]
        queries, count, some = batch.num_queries, len(negative), len(with_negatives)
        return Groups(
            document_query=batch.document_query, positive=batch.positive_index, negative=negative,
            negative_query=batch.document_query[negative],
            by_query=torch.where(valid, batch.positive_index[:, None] + column, 0), valid=valid,
            with_negatives=with_negatives, teacher=batch.teacher_scores, divisors=torch.tensor(
                [queries if one_term_per_query else count, some, queries, count, some, queries], dtype=torch.float64))


def _values(terms: Tensor, similarity: Tensor, groups: Groups) -> Tensor:
    """[6, 2] float64: sums and divisors in the order of NAMES."""
    scores = torch.where(groups.valid, similarity[groups.by_query], float("-inf"))
    positive = scores[:, 0]
    compared = positive[groups.with_negatives]
    hardest = scores[groups.with_negatives, 1:].amax(dim=1) if len(compared) else compared
    sums = [terms.sum(), (compared > hardest).sum(), positive.sum(), similarity[groups.negative].sum(),
            (compared - hardest).sum(), similarity.new_full((), len(groups.negative))]
    return torch.stack([torch.stack([total.double() for total in sums]), groups.divisors], dim=1)
