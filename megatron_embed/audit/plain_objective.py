"""The objective of a replayed step: the loss of the global batch in one piece, on every data-parallel rank alike."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_embed.audit.global_batch import GlobalBatch, Part, factors, joined
from megatron_embed.audit.plain_contrastive import PlainContrastive
from megatron_embed.audit.plain_own_documents import PlainHardNegatives, PlainPairs, PlainReranking, over_dimensions
from megatron_embed.audit.variation import NONE, Variation
from megatron_embed.batch import EmbedBatch, RerankBatch
from megatron_embed.config.objective import CONTRASTIVE, LABELLED_PAIRS
from megatron_embed.config.schema import RunConfig
from megatron_embed.objectives.base import LossGradient, Objective, Sums, configured_dims
from megatron_embed.objectives.learned_scale import LearnedScale
from megatron_embed.parallel.collectives import gather_objects
from megatron_embed.parallel.topology import Topology

Values = Callable[[Tensor, Tensor, GlobalBatch], dict[str, Tensor]]
"""(queries, documents, batch) -> metric -> [2] sum and divisor, the loss with a graph."""
AnyBatch = EmbedBatch | RerankBatch


class PlainObjective(Objective[AnyBatch]):
    """Every data-parallel rank gathers all embeddings and computes the whole loss; its own rows' gradient is what it
    returns. No gradient is sent, no mask is divided. The loss of a multi-vector or sparse model is computed as in
    training.

    Attributes:
        variation: what is computed otherwise than configured.
        masked: of the last whole batch, see PlainContrastive.
        is_plain: False for vectors per token, sparse vectors and vectors by other models, whose loss is that of
            training.
        kept: a list that every call adds its embeddings to; None: they are not kept.

    Args:
        inner: the objective of training, for the names of its metrics, its micro-batches and what it trains itself.
    """

    def __init__(self, config: RunConfig, topology: Topology, inner: Objective[Any]) -> None:
        self.names, self.couples_batch, self.learned = inner.names, inner.couples_batch, inner.learned
        self.variation: Variation = NONE
        self.kept: list[list[Part]] | None = None
        self.masked: dict[int, tuple[int, list[int]]] = {}
        self._config, self._group, self._inner = config, topology.dp_group, inner
        self.is_plain = config.task == "reranker" or not (
            config.embedding.head in ("multi_vector", "sparse", "joint") or config.training.query_side_only
            or any((config.objective.compatible_with, config.objective.guide_model, config.objective.teacher_model)))

    def total(self, batch: AnyBatch) -> float:
        return self._inner.total(batch)

    def split(self, batch: AnyBatch) -> list[AnyBatch]:
        return self._inner.split(batch)

    def __call__(self, embeddings: Tensor, batch: AnyBatch, *, total: float) -> LossGradient:
        """See Objective; one all-gather of objects over the data-parallel group."""
        self._inner.step = self.step
        if not self.is_plain:
            return self._inner(embeddings, batch, total=total)
        parts = gather_objects(Part.of(embeddings, batch), self._group)
        if self.kept is not None:
            self.kept.append(parts)
        query, document = (values.requires_grad_() for values in _vectors(parts, self.variation))
        values_of, loss = self._values(self.variation)
        leaves = [] if loss is None or self._scale is None else [
            leaf for leaf in (loss.log_scale, loss.bias) if leaf is not None]
        whole = joined(parts)
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            values = values_of(query, document, whole)
            total_loss = values["loss"][0] + 0.0 * (query.sum() + document.sum())  # which may have no term
            of_query, of_document, *of_leaves = torch.autograd.grad(total_loss, [query, document, *leaves])
        if loss is not None and self._scale is not None:
            values |= _learned_values(loss, [float(gradient) for gradient in of_leaves], len(query))
        self.masked = {} if loss is None or not self.couples_batch else loss.masked
        scaled, rank = factors(self.variation, whole), self._group.rank()
        own = torch.cat([(gradient * factor[:, None]).split(sizes)[rank] for gradient, factor, sizes in (
            (of_query, scaled[0], [len(part.query) for part in parts]),
            (of_document, scaled[1], [len(part.document) for part in parts]))]) / total
        own = own.bfloat16() if self.variation.rounded == "gradient" else own
        sums = torch.stack([values[name].detach() for name in self.names])
        return LossGradient(sums=Sums(names=self.names, values=sums.to(embeddings.device)),
                            embeddings=own.to(embeddings))

    def metrics_of_kept(self, variation: Variation, *, as_one: bool = False) -> dict[str, float]:
        """Metrics of the kept embeddings under a variation; empty where none were kept. No communication.

        `as_one`: the calls were made for parts of one global batch.
        """
        totals: dict[str, Tensor] = {}
        calls = self.kept or []
        for parts in [[part for call in calls for part in call]] if as_one and calls else calls:
            query, document = _vectors(parts, variation)
            for name, value in self._values(variation)[0](query, document, joined(parts)).items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        return {name: float(value[0] / value[1]) for name, value in totals.items() if float(value[1])}

    def _values(self, variation: Variation) -> tuple[Values, PlainContrastive | None]:
        """The loss under a variation, and the object that has its temperature if that may be trained."""
        config = self._config
        if variation.settings:
            config = replace(config, objective=replace(config.objective, **dict(variation.settings)))  # type: ignore
        objective = config.objective
        if config.task == "reranker":
            lists = PlainReranking(objective.loss, config.reranker, variation)
            return functools.partial(over_dimensions, lists.sums, weights=[(None, "float32", 1.0)],
                                     normalize=False), None
        weights = [(each.dim, each.precision, each.weight) for each in configured_dims(config)]
        weights = weights[:1] if variation.first_dimension_only else weights
        unit_length = config.embedding.unit_length
        if objective.loss in CONTRASTIVE:
            temperature = objective.temperature if self._scale is None else self._scale.temperature
            loss = PlainContrastive(objective, weights, normalize=unit_length, variation=variation,
                                    temperature=temperature, bias=self._bias)
            return loss.values, loss
        kind = PlainPairs if objective.loss in LABELLED_PAIRS else PlainHardNegatives
        return functools.partial(over_dimensions, kind(objective, variation).sums, weights=weights,
                                 normalize=unit_length), None

    @property
    def _bias(self) -> float | None:
        if self._config.objective.loss != "sigmoid":
            return None
        return self._config.objective.bias if self._scale is None else self._scale.bias

    @property
    def _scale(self) -> LearnedScale | None:
        """The trained temperature."""
        return self.learned if isinstance(self.learned, LearnedScale) else None


def _vectors(parts: Sequence[Part], variation: Variation) -> tuple[Tensor, Tensor]:
    """Queries and documents of all ranks."""
    values = torch.cat([part.query for part in parts]), torch.cat([part.document for part in parts])
    if variation.rounded != "vectors":
        return values
    return values[0].bfloat16().double(), values[1].bfloat16().double()


def _learned_values(loss: PlainContrastive, gradients: list[float], queries: int) -> dict[str, Tensor]:
    """Metrics of a learned temperature and bias, per name sum and divisor."""
    named = {"temperature": float(1 / loss.scale.detach()) * queries, "log_scale_gradient": gradients[0]}
    if loss.bias is not None:
        named |= {"bias": float(loss.bias.detach()) * queries, "bias_gradient": gradients[1]}
    return {name: torch.tensor([value, float(queries)], dtype=torch.float64) for name, value in named.items()}
