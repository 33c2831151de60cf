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
    one_vector = config.embedding.head != "multi_vector"
    if config.task == "embedding" and one_vector and config.objective.loss in CONTRASTIVE:
        return PlainContrastiveObjective(config, topology, inner)
    return inner


class PlainContrastiveObjective(Objective[EmbedBatch]):
    """Every data-parallel rank gathers all embeddings and computes the whole loss; its own rows' gradient is what it
    returns. No gradient is sent, no mask is divided.

    Attributes:
        variation: what is computed otherwise than configured.
        masked: of the last batch, the documents that are not negatives of each query.
    """

    def __init__(self, config: RunConfig, topology: Topology, inner: Objective[EmbedBatch]) -> None:
        self.names, self.couples_batch, self.learned = inner.names, inner.couples_batch, inner.learned
        self.variation: Variation = NONE
        self._config, self._group, self._inner = config, topology.dp_group, inner

    def total(self, batch: EmbedBatch) -> float:
        return float(batch.num_queries * self._group.size())

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return self._inner.split(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; one all-gather of objects over the data-parallel group."""
        parts = gather_objects(_Part.of(embeddings, batch), self._group)
        query = torch.cat([part.query for part in parts]).requires_grad_()
        document = torch.cat([part.document for part in parts]).requires_grad_()
        loss = PlainContrastive(
            self._config.objective, [(each.dim, each.weight) for each in configured_dims(self._config)],
            normalize=self._config.embedding.unit_length, variation=self.variation,
            temperature=self._config.objective.temperature if self.learned is None else self.learned.temperature,
            bias=self._bias)
        leaves = [leaf for leaf in (loss.log_scale, loss.bias) if leaf is not None and self.learned is not None]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            values = loss.values(query, document, global_batch(parts))
            gradients = torch.autograd.grad(values["loss"][0], [query, document, *leaves])
        if self.learned is not None:
            values |= _learned_values(loss, [float(gradient) for gradient in gradients[2:]], len(query))
        rank, queries, documents = self._group.rank(), *([len(part.query) for part in parts],
                                                         [len(part.document) for part in parts])
        own = torch.cat([gradients[0].split(queries)[rank], gradients[1].split(documents)[rank]]) / total
        sums = torch.stack([values[name].detach() for name in self.names])
        return LossGradient(sums=Sums(names=self.names, values=sums.to(embeddings.device)),
                            embeddings=own.to(embeddings))

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


def _learned_values(loss: PlainContrastive, gradients: list[float], queries: int) -> dict[str, Tensor]:
    """Metrics of a learned temperature and bias, per name sum and divisor."""
    named = {"temperature": float(1 / loss.scale) * queries, "log_scale_gradient": gradients[0]}
    if loss.bias is not None:
        named |= {"bias": float(loss.bias) * queries, "bias_gradient": gradients[1]}
    return {name: torch.tensor([value, float(queries)], dtype=torch.float64) for name, value in named.items()}
