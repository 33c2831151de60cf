"""The interface between a step and its loss: all that the step, its two passes and its metrics know of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megatron_embed.batch import StepBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.matryoshka import MatryoshkaDim, matryoshka_dims
from megatron_embed.objectives.learned_projection import LearnedProjection
from megatron_embed.objectives.learned_scale import LearnedScale

Batch = TypeVar("Batch", bound=StepBatch)
Learned = LearnedScale | LearnedProjection
"""What an objective trains itself."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the global batch, from which the step's metrics are means."""

    names: tuple[str, ...]
    """Names of the metrics, `loss` among them."""
    values: Tensor
    """[names, 2] float64: per metric, a sum and the number that it is divided by."""

    def metrics(self) -> dict[str, float]:
        """The means, and MARGINS; a metric that nothing contributed to is left out, but for the loss, which then is
        0."""
        means = {name: total / count if count else 0.0
                 for name, (total, count) in zip(self.names, self.values.tolist(), strict=True)
                 if count or name == "loss"}
        return means | margins(means)


MARGINS = ("margin_to_mean_negative", "margin_to_hardest_negative")
"""Metrics that follow from those of an objective: the positives' mean similarity (or score) minus the negatives', and
`margin`, which compares each positive with its most similar negative, under a name that says so."""


def margins(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of MARGINS that the metrics of an objective give; of their names too."""
    derived = {}
    for kind in ("similarity", "score"):
        if f"positive_{kind}" in metrics and f"negative_{kind}" in metrics:
            derived[MARGINS[0]] = metrics[f"positive_{kind}"] - metrics[f"negative_{kind}"]
    return derived | ({MARGINS[1]: metrics["margin"]} if "margin" in metrics else {})


def with_margins(names: Sequence[str]) -> tuple[str, ...]:
    """The names of an objective's metrics, those of MARGINS that it gives included."""
    return *names, *margins(dict.fromkeys(names, 0.0))


@dataclass(frozen=True, kw_only=True)
class LossGradient:
    """Loss sums, and the gradient of the loss with respect to this rank's embeddings."""

    sums: Sums
    """Over these rows of all data-parallel ranks."""
    embeddings: Tensor
    """[rows/dp, dim], gradient of (the summed loss of these rows of all ranks / total)."""


def configured_dims(config: RunConfig) -> tuple[MatryoshkaDim, ...]:
    """The dimensions and precisions over which a configuration takes its loss."""
    embedding, objective = config.embedding, config.objective
    return matryoshka_dims(embedding.matryoshka_dims, objective.matryoshka_weights, embedding.precision,
                           objective.precision_weights)


def matryoshka_names(dims: Sequence[MatryoshkaDim]) -> tuple[str, ...]:
    """Names of the losses at each dimension and precision: `loss@64`, `loss@64@binary`; none for whole embeddings in
    float32 alone."""
    return () if _is_plain(dims) else tuple(f"loss@{matryoshka.name}" for matryoshka in dims)


def _is_plain(dims: Sequence[MatryoshkaDim]) -> bool:
    """Whether a loss is taken of whole embeddings in float32 alone."""
    return [(matryoshka.dim, matryoshka.precision) for matryoshka in dims] == [(None, "float32")]


def combine_dims(values: Sequence[Tensor], dims: Sequence[MatryoshkaDim]) -> Tensor:
    """[names, 2] of a loss over several dimensions: the weighted sum of their losses, the other metrics of the first,
    the largest; then the losses themselves. `values` are [names, 2] each, `loss` first."""
    combined = values[0].clone()
    combined[0, 0] = sum(value[0, 0] * matryoshka.weight for value, matryoshka in zip(values, dims, strict=True))
    return torch.cat([combined, *([] if _is_plain(dims) else [value[:1] for value in values])])


class Objective(ABC, Generic[Batch]):
    """A loss over the rows of a batch, its gradient and its metrics.

    Attributes:
        names: of the metrics, in the order of `Sums.values`.
        couples_batch: whether a row's loss depends on rows of other micro-batches. Then a step of several micro-batches
            takes two passes; else one, in which `split` says what a micro-batch holds.
        learned: trained numbers of the loss; None: none.
    """

    names: tuple[str, ...]
    couples_batch: bool
    learned: Learned | None = None
    step = 0
    """The optimizer step, from 0, on which schedules of the loss depend; set before each."""

    @abstractmethod
    def total(self, batch: Batch) -> float:
        """Terms of the global batch over which the loss is a mean. Called by all data-parallel ranks once a step; may
        communicate over them."""

    @abstractmethod
    def split(self, batch: Batch) -> list[Batch]:
        """One batch per micro-batch, its rows renumbered from 0 in the order that they had. No communication."""

    @abstractmethod
    def __call__(self, embeddings: Tensor, batch: Batch, *, total: float) -> LossGradient:
        """Loss of the batch over all data-parallel ranks, which all call it, and its gradient.

        Args:
            embeddings: [rows/dp, dim] float32, the model's output for the rows as numbered in `batch`; detached.
            batch: a whole share of the step, or a part of it that `split` made.
            total: the return value of `total` for the whole batch.
        """
