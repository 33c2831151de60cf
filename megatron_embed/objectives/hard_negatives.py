"""Losses of a query with its own positive and hard negatives: triplet loss, and distillation from a teacher."""

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.matryoshka import truncate_with_graph
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

NAMES = ("loss", "accuracy", "positive_similarity", "negative_similarity", "margin", "negatives_per_query")
TRIPLET_MARGIN = 5.0
"""Sentence Transformers' default."""


class HardNegatives(Objective[EmbedBatch]):
    """`triplet` and `margin_mse`, means over the hard negatives of the global batch, or `kl_distillation`, a mean over
    its queries. Similarities are dot products, of unit vectors cosines; `accuracy` counts queries whose positive is
    more similar than each of their hard negatives, and `margin` is by how much, on average over queries that have any.
    """

    couples_batch = False

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, device: torch.device) -> None:
        objective = config.objective
        self.dims = configured_dims(config)
        self.names = NAMES + matryoshka_names(self.dims)
        self.loss = objective.loss
        self.margin = TRIPLET_MARGIN if objective.margin is None else objective.margin
        self.temperature = objective.temperature
        self.teacher_temperature = objective.teacher_temperature or objective.temperature
        self.normalize = config.embedding.unit_length
        self.dp_group = dp_group
        self.device = device

    def total(self, batch: EmbedBatch) -> float:
        """Hard negatives of all data-parallel ranks, by one all-reduce over them; or queries, of which every rank has
        as many."""
        if self.loss == "kl_distillation":
            return float(batch.num_queries * self.dp_group.size())
        count = torch.tensor(float(batch.num_documents - batch.num_queries), dtype=torch.float64, device=self.device)
        return float(sum_over(count, self.dp_group))

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are those of the queries, then of the documents. One all-reduce of the sums."""
        values, leaf = [], embeddings.detach().requires_grad_()
        with torch.enable_grad():
            weighted = leaf.new_zeros(())
            for matryoshka in self.dims:
                truncated = truncate_with_graph(leaf, matryoshka, normalize=self.normalize)
                terms, similarity = self._terms(truncated[: batch.num_queries], truncated[batch.num_queries :], batch)
                weighted = weighted + terms.sum() * matryoshka.weight
                values.append(self._values(terms.detach(), similarity.detach(), batch))
            (gradient,) = torch.autograd.grad(weighted / total, leaf)
        return LossGradient(
            sums=Sums(names=self.names, values=sum_over(combine_dims(values, self.dims), self.dp_group)),
            embeddings=gradient)

    def _terms(self, query: Tensor, document: Tensor, batch: EmbedBatch) -> tuple[Tensor, Tensor]:
        """([terms] losses, [documents] similarity of each to its query)."""
        document_query, positive = batch.document_query.to(query.device), batch.positive_index.to(query.device)
        similarity = (query[document_query] * document).sum(dim=1)
        negative = (~batch.is_positive).nonzero()[:, 0].to(query.device)
        queries = document_query[negative]
        if self.loss == "triplet":
            return triplet(query[queries], document[positive[queries]], document[negative], self.margin), similarity
        assert batch.teacher_scores is not None, "rows without teacher scores are refused before training"
        teacher = batch.teacher_scores.to(query.device, query.dtype)
        if self.loss == "margin_mse":
            return margin_mse(similarity[positive[queries]], similarity[negative], teacher[positive[queries]],
                              teacher[negative]), similarity
        documents = self._documents_by_query(batch).to(query.device)
        valid = documents >= 0
        student, target = (torch.where(valid, scores[documents.clamp(min=0)], 0.0) for scores in (similarity, teacher))
        return kl_distillation(student, target, valid, self.temperature, self.teacher_temperature), similarity

    @staticmethod
    def _documents_by_query(batch: EmbedBatch) -> Tensor:
        """[queries, most documents] int64, each query's documents, its positive first; padded with -1."""
        sizes = torch.bincount(batch.document_query, minlength=batch.num_queries)
        column = torch.arange(int(sizes.max()) if len(sizes) else 1)
        return torch.where(column < sizes[:, None], batch.positive_index[:, None] + column, -1)

    def _values(self, terms: Tensor, similarity: Tensor, batch: EmbedBatch) -> Tensor:
        """[6, 2] float64: sums and divisors in the order of NAMES."""
        documents = self._documents_by_query(batch).to(similarity.device)
        scores = functional.pad(similarity, (0, 1), value=float("-inf"))[documents]  # -1 is the padding
        positive, negatives = scores[:, 0], scores[:, 1:]
        some = torch.isfinite(negatives).any(dim=1)
        count, queries = batch.num_documents - batch.num_queries, batch.num_queries
        hardest = negatives[some].amax(dim=1) if bool(some.any()) else positive[:0]
        rows = [(terms.sum(), len(terms)), ((positive[some] > hardest).sum(), len(hardest)), (positive.sum(), queries),
                (negatives[torch.isfinite(negatives)].sum(), count), ((positive[some] - hardest).sum(), len(hardest)),
                (torch.tensor(float(count)), queries)]
        return torch.tensor([[float(total), float(divisor)] for total, divisor in rows], dtype=torch.float64,
                            device=similarity.device)
