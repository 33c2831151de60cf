"""Losses of a query with its own positive and hard negatives: triplets, and what a teacher thinks of them."""

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.losses.distill import kl_distillation, margin_mse
from megatron_embed.losses.matryoshka import Width, cut
from megatron_embed.losses.pairwise import triplet
from megatron_embed.objectives.base import LossGradient, Objective, Sums, over_widths, width_names
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import sum_over

NAMES = ("loss", "accuracy", "positive_similarity", "negative_similarity", "margin", "negatives_per_query")
TRIPLET_MARGIN = 5.0
"""Sentence Transformers' default."""


class OwnDocuments(Objective[EmbedBatch]):
    """`triplet` and `margin_mse`, means over the hard negatives of the global batch, or `kl_distillation`, a mean over
    its queries. Similarities are dot products, of unit vectors cosines; `accuracy` counts queries whose positive is
    more similar than each of their hard negatives, and `margin` is by how much, on average over queries that have any.
    """

    couples_batch = False

    def __init__(self, config: ObjectiveConfig, widths: tuple[Width, ...], *, normalize: bool,
                 dp_group: dist.ProcessGroup, device: torch.device) -> None:
        self.names = NAMES + width_names(widths)
        self.loss = config.loss
        self.margin = TRIPLET_MARGIN if config.margin is None else config.margin
        self.temperature = config.temperature
        self.teacher_temperature = config.teacher_temperature or config.temperature
        self.widths = widths
        self.normalize = normalize
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

    def __call__(self, rows: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """As the base class says; `rows` are the queries, then the documents. One all-reduce of the sums."""
        values, leaf = [], rows.detach().requires_grad_()
        with torch.enable_grad():
            weighted = leaf.new_zeros(())
            for width in self.widths:
                part = cut(leaf, width, normalize=self.normalize)
                terms, similarity = self._terms(part[: batch.num_queries], part[batch.num_queries :], batch)
                weighted = weighted + terms.sum() * width.weight
                values.append(self._values(terms.detach(), similarity.detach(), batch))
            (gradient,) = torch.autograd.grad(weighted / total, leaf)
        return LossGradient(
            sums=Sums(names=self.names, values=sum_over(over_widths(values, self.widths), self.dp_group)),
            rows=gradient)

    def _terms(self, query: Tensor, document: Tensor, batch: EmbedBatch) -> tuple[Tensor, Tensor]:
        """([terms] losses, [documents] similarity of each to its query)."""
        owner, positive = batch.document_query.to(query.device), batch.positive_index.to(query.device)
        similarity = (query[owner] * document).sum(dim=1)
        negative = (~batch.is_positive).nonzero()[:, 0].to(query.device)
        asked = owner[negative]
        if self.loss == "triplet":
            return triplet(query[asked], document[positive[asked]], document[negative], self.margin), similarity
        assert batch.teacher_scores is not None, "rows without teacher scores are refused before training"
        teacher = batch.teacher_scores.to(query.device, query.dtype)
        if self.loss == "margin_mse":
            return margin_mse(similarity[positive[asked]], similarity[negative], teacher[positive[asked]],
                              teacher[negative]), similarity
        place = self._places(batch).to(query.device)
        valid = place >= 0
        student, wanted = (torch.where(valid, scores[place.clamp(min=0)], 0.0) for scores in (similarity, teacher))
        return kl_distillation(student, wanted, valid, self.temperature, self.teacher_temperature), similarity

    @staticmethod
    def _places(batch: EmbedBatch) -> Tensor:
        """[queries, most documents] int64, local numbers of each query's documents, its positive first; else -1."""
        sizes = torch.bincount(batch.document_query, minlength=batch.num_queries)
        column = torch.arange(int(sizes.max()) if len(sizes) else 1)
        return torch.where(column < sizes[:, None], batch.positive_index[:, None] + column, -1)

    def _values(self, terms: Tensor, similarity: Tensor, batch: EmbedBatch) -> Tensor:
        """[6, 2] float64: sums and divisors in the order of NAMES."""
        places = self._places(batch).to(similarity.device)
        scores = functional.pad(similarity, (0, 1), value=float("-inf"))[places]  # -1 is what was padded
        positive, negatives = scores[:, 0], scores[:, 1:]
        some = torch.isfinite(negatives).any(dim=1)
        count, queries = batch.num_documents - batch.num_queries, batch.num_queries
        hardest = negatives[some].amax(dim=1) if bool(some.any()) else positive[:0]
        rows = [(terms.sum(), len(terms)), ((positive[some] > hardest).sum(), len(hardest)), (positive.sum(), queries),
                (negatives[torch.isfinite(negatives)].sum(), count), ((positive[some] - hardest).sum(), len(hardest)),
                (torch.tensor(float(count)), queries)]
        return torch.tensor([[float(total), float(divisor)] for total, divisor in rows], dtype=torch.float64,
                            device=similarity.device)
