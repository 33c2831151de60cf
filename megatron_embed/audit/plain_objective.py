"""The objective of a replayed step: the loss of the global batch in one piece, on every data-parallel rank alike."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_embed.audit.plain_contrastive import GlobalBatch, PlainContrastive
from megatron_embed.audit.variation import NONE, Variation
from megatron_embed.batch import EmbedBatch
from megatron_embed.config.objective import CONTRASTIVE
from megatron_embed.config.schema import RunConfig
from megatron_embed.objectives.base import LossGradient, Objective, Sums, configured_dims
from megatron_embed.parallel.collectives import gather_objects
from megatron_embed.parallel.topology import Topology


def plain_objective(config: RunConfig, topology: Topology, inner: Objective[Any]) -> Objective[Any]:
    """The plain objective of a configuration; where there is none, `inner`, the one of training."""
    if config.task == "embedding" and config.objective.loss in CONTRASTIVE:
        return PlainObjective(config, topology, inner)
    return inner


class PlainObjective(Objective[EmbedBatch]):
    """Every data-parallel rank gathers all embeddings and computes the whole loss; its own rows' gradient is what it
    returns. No gradient is sent, no mask is divided.

    Attributes:
        variation: what is computed otherwise than configured.
        kept: a list that every call adds its embeddings to; None: they are not kept.
    """

    def __init__(self, config: RunConfig, topology: Topology, inner: Objective[EmbedBatch]) -> None:
        self.names, self.couples_batch, self.learned = inner.names, inner.couples_batch, inner.learned
        self.variation: Variation = NONE
        self.kept: list[list[_Part]] | None = None
        self._config, self._group, self._inner = config, topology.dp_group, inner

    def total(self, batch: EmbedBatch) -> float:
        return float(batch.num_queries * self._group.size())

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return self._inner.split(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; one all-gather of objects over the data-parallel group."""
        parts = gather_objects(_Part.of(embeddings, batch), self._group)
        if self.kept is not None:
            self.kept.append(parts)
        query = torch.cat([part.query for part in parts]).requires_grad_()
        document = torch.cat([part.document for part in parts]).requires_grad_()
        loss, joined = self._loss(self.variation), global_batch(parts)
        leaves = [leaf for leaf in (loss.log_scale, loss.bias) if leaf is not None and self.learned is not None]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            values = loss.values(query, document, joined)
            of_query, of_document, *of_leaves = torch.autograd.grad(values["loss"][0], [query, document, *leaves])
        if self.learned is not None:
            values |= _learned_values(loss, [float(gradient) for gradient in of_leaves], len(query))
        factors, rank = _factors(self.variation, joined), self._group.rank()
        own = torch.cat([(gradient * factor[:, None]).split(sizes)[rank] for gradient, factor, sizes in (
            (of_query, factors[0], [len(part.query) for part in parts]),
            (of_document, factors[1], [len(part.document) for part in parts]))]) / total
        sums = torch.stack([values[name].detach() for name in self.names])
        return LossGradient(sums=Sums(names=self.names, values=sums.to(embeddings.device)),
                            embeddings=own.to(embeddings))

    def metrics_of_kept(self, variation: Variation, *, joined: bool = False) -> dict[str, float]:
        """Metrics of the kept embeddings under a variation; empty where none were kept. No communication.

        `joined`: the calls were made for parts of one global batch.
        """
        totals: dict[str, Tensor] = {}
        calls = self.kept or []
        for parts in [[part for call in calls for part in call]] if joined and calls else calls:
            query, document = torch.cat([part.query for part in parts]), torch.cat([part.document for part in parts])
            for name, value in self._loss(variation).values(query, document, global_batch(parts)).items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        return {name: float(value[0] / value[1]) for name, value in totals.items() if float(value[1])}

    def _loss(self, variation: Variation) -> PlainContrastive:
        config = self._config
        return PlainContrastive(
            config.objective, [(each.dim, each.weight) for each in configured_dims(config)],
            normalize=config.embedding.unit_length, variation=variation,
            temperature=config.objective.temperature if self.learned is None else self.learned.temperature,
            bias=self._bias)

    @property
    def _bias(self) -> float | None:
        if self._config.objective.loss != "sigmoid":
            return None
        return self._config.objective.bias if self.learned is None else self.learned.bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """What one data-parallel rank brings, on the CPU."""

    query: Tensor
    document: Tensor
    batch: EmbedBatch

    @classmethod
    def of(cls, embeddings: Tensor, batch: EmbedBatch) -> "_Part":
        vectors = embeddings.detach().double().cpu()
        return cls(query=vectors[: batch.num_queries], document=vectors[batch.num_queries :],
                   batch=dataclasses.replace(batch, micro_batches=()))


def global_batch(parts: list[_Part]) -> GlobalBatch:
    """The batches of all ranks as one."""
    batches, first, of = [part.batch for part in parts], 0, []
    for batch in batches:
        of.append(batch.document_query + first)
        first += batch.num_queries
    given = {pair for batch in batches for pair in zip(batch.query_ids[batch.positive_query].tolist(),
                                                       batch.positive_ids.tolist(), strict=True)}
    in_batch = [torch.ones(batch.num_queries, dtype=torch.bool) if batch.in_batch is None else batch.in_batch
                for batch in batches]
    return GlobalBatch(
        query_texts=torch.cat([batch.query_ids for batch in batches]),
        document_texts=torch.cat([batch.document_ids for batch in batches]), document_query=torch.cat(of),
        is_positive=torch.cat([batch.is_positive for batch in batches]), given=frozenset(given),
        in_batch=None if all(batch.in_batch is None for batch in batches) else torch.cat(in_batch))


def _factors(variation: Variation, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """([queries], [documents]) factors of the gradient."""
    queries = torch.ones(len(batch.query_texts), dtype=torch.float64)
    for first, last, factor in variation.factors:
        queries[first:last] *= factor
    documents = queries[batch.document_query]
    if "queries" in variation.detached:
        queries = torch.zeros_like(queries)
    if "positives" in variation.detached:
        documents = documents * ~batch.is_positive
    if "hard_negatives" in variation.detached:
        documents = documents * batch.is_positive
    return queries, documents


def _learned_values(loss: PlainContrastive, gradients: list[float], queries: int) -> dict[str, Tensor]:
    """Metrics of a learned temperature and bias, per name sum and divisor."""
    named = {"temperature": float(1 / loss.scale) * queries, "log_scale_gradient": gradients[0]}
    if loss.bias is not None:
        named |= {"bias": float(loss.bias) * queries, "bias_gradient": gradients[1]}
    return {name: torch.tensor([value, float(queries)], dtype=torch.float64) for name, value in named.items()}
