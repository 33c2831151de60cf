"""Losses of labelled pairs (STS): each pair by itself, or all pairs of the global batch together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses import pairwise
from megatron_embed.losses.matryoshka import truncate_with_graph
from megatron_embed.objectives.base import (
    LossGradient,
    Objective,
    Sums,
    combine_dims,
    configured_dims,
    matryoshka_names,
)
from megatron_embed.objectives.gathering import PaddedRows
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import gather_padded, sum_over
from megatron_embed.parallel.device_copy import copy_to_device

NAMES = ("loss", "similarity", "positive_similarity", "negative_similarity")
MARGIN = 0.5
"""Sentence Transformers' default for both losses that have one."""


def metric_names(loss: str) -> tuple[str, ...]:
    """The metrics of a loss of pairs, apart from those at matryoshka dimensions."""
    return NAMES[:2] if loss in ("cosent", "angle") else NAMES


class LabelledPairs(Objective[EmbedBatch]):
    """A loss of the similarity of each pair to its label.

    `cosine_similarity` and `contrastive` are means over the pairs of the global batch. `cosent` and `angle` are one
    log-sum-exp over all of its pairs of pairs, `online_contrastive` a sum over its hard pairs: their total is 1.
    `positive_similarity` and `negative_similarity` are of the pairs whose label is above or below 0.5; `cosent` and
    `angle`, whose labels may have any range, do not have them.
    """

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup) -> None:
        self.settings = objective = config.objective
        self.dims = configured_dims(config)
        self.base_names = metric_names(objective.loss)
        self.names = self.base_names + matryoshka_names(self.dims)
        self.couples_batch = objective.couples_batch
        self.margin = MARGIN if objective.margin is None else objective.margin
        self.similarity: Callable[[Tensor, Tensor], Tensor] = (
            pairwise.angle_similarity if objective.loss == "angle" else pairwise.cosine)
        self.normalize = config.embedding.unit_length
        self.dp_group = dp_group

    def total(self, batch: EmbedBatch) -> float:
        """Pairs of the global batch, of which every data-parallel rank has as many; 1 if the loss is one of them all.
        """
        return 1.0 if self.couples_batch else float(batch.num_queries * self.dp_group.size())

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are those of the pairs' first texts, then of the second ones.

        One all-reduce of the sums and, for a loss of all pairs together, one all-gather of labels between the CPUs and
        one of similarities at all dimensions.
        """
        pairs = batch.num_queries
        labels = copy_to_device(self._labels(batch), embeddings.device)
        with torch.enable_grad():
            leaf = embeddings.detach().requires_grad_()
            sides = leaf[:pairs], leaf[pairs:][labels.document]
            similarity = torch.stack([
                self.similarity(*(truncate_with_graph(side, matryoshka, normalize=self.normalize) for side in sides))
                for matryoshka in self.dims])
        loss_of = self._over_all_pairs if self.couples_batch else self._per_pair
        losses, gradients = loss_of(similarity.detach().double(), labels)
        (gradient,) = torch.autograd.grad(similarity, leaf,
                                          (gradients.to(embeddings.dtype) * labels.weights[:, None]) / total)
        values = [_values(loss, row.detach().double(), labels)[: len(self.base_names)]
                  for loss, row in zip(losses, similarity, strict=True)]
        return LossGradient(
            sums=Sums(names=self.names, values=sum_over(combine_dims(values, self.dims), self.dp_group)),
            embeddings=gradient)

    def _labels(self, batch: EmbedBatch) -> "_Labels":
        """The labels of a batch, on the CPU; for a loss of all pairs together with those of the other ranks."""
        assert batch.scores is not None, "rows without scores are refused before training"
        label, group, of_all_ranks = batch.scores, self.dp_group, None
        terms = len(label)
        if self.couples_batch:
            real = torch.ones_like(label)
            gathered = gather_padded(torch.stack([real, label], dim=1), batch.capacity.queries, group)
            valid, terms = gathered[:, :, 0] > 0, int(group.rank() == 0)
            of_all_ranks = _LabelsOfAllRanks(label=gathered[:, :, 1][valid], first=int(valid[: group.rank()].sum()),
                                             padded=PaddedRows.of(valid.sum(dim=1), batch.capacity.queries))
        above, below = (selected.nonzero()[:, 0] for selected in (label > 0.5, label < 0.5))
        return _Labels(
            label=label, document=batch.positive_index, above=above, below=below,
            divisors=torch.tensor([terms, len(label), len(above), len(below)], dtype=torch.float64),
            weights=torch.tensor([matryoshka.weight for matryoshka in self.dims]), of_all_ranks=of_all_ranks)

    def _per_pair(self, similarity: Tensor, labels: "_Labels") -> tuple[Sequence[Tensor], Tensor]:
        """(per dimension: summed loss of these pairs, [dimensions, pairs] gradient of the sums)."""
        with torch.enable_grad():
            leaf = similarity.requires_grad_()
            terms = (pairwise.cosine_similarity(leaf, labels.label) if self.settings.loss == "cosine_similarity"
                     else pairwise.contrastive(leaf, labels.label, self.margin))
            (gradient,) = torch.autograd.grad(terms.sum(), leaf)
        return terms.detach().sum(dim=1).unbind(), gradient

    def _over_all_pairs(self, similarity: Tensor, labels: "_Labels") -> tuple[Sequence[Tensor], Tensor]:
        """The same for one loss over all ranks' pairs, which every rank computes and rank 0 of the group reports."""
        group, pairs, of_all_ranks = self.dp_group, len(labels.label), labels.of_all_ranks
        assert of_all_ranks is not None
        gathered = gather_padded(similarity.T.contiguous(), of_all_ranks.padded.capacity, group)
        with torch.enable_grad():
            leaf = of_all_ranks.padded.compact(gathered).clone().requires_grad_()
            losses = [self._loss_of_all(column, of_all_ranks.label) for column in leaf.unbind(dim=1)]
            (gradient,) = torch.autograd.grad(sum(losses), leaf)
        first, reports = of_all_ranks.first, group.rank() == 0
        return [loss.detach() * reports for loss in losses], gradient[first : first + pairs].T.contiguous()

    def _loss_of_all(self, similarity: Tensor, label: Tensor) -> Tensor:
        if self.settings.loss == "online_contrastive":
            return pairwise.online_contrastive(similarity, label, self.margin)[0]
        return pairwise.cosent(similarity, label, self.settings.temperature)


@dataclass(frozen=True, kw_only=True)
class _LabelsOfAllRanks:
    """The pairs of all ranks."""

    label: Tensor
    """[pairs of all ranks] float64."""
    first: int
    """Index of this rank's first pair."""
    padded: PaddedRows
    """The pairs in a message that gathers them."""


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """The labels of a batch."""

    label: Tensor
    """[pairs] float64."""
    document: Tensor
    """[pairs] int64, the second text of each."""
    above: Tensor
    """[pairs with a label above 0.5] int64."""
    below: Tensor
    """[pairs with a label below 0.5] int64."""
    divisors: Tensor
    """[4] float64, of the metrics in the order of NAMES."""
    weights: Tensor
    """[dimensions] float32, of each in the loss."""
    of_all_ranks: _LabelsOfAllRanks | None
    """Those of a loss of all pairs together; None: the loss is one of each pair."""


def _values(loss: Tensor, similarity: Tensor, labels: _Labels) -> Tensor:
    """[4, 2] float64: sums and divisors in the order of NAMES."""
    sums = [loss, similarity.sum(), similarity[labels.above].sum(), similarity[labels.below].sum()]
    return torch.stack([torch.stack(sums), labels.divisors], dim=1)
