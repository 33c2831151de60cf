"""Loss and gradients of one step: two passes with cached embeddings, or one where a loss needs no other micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from megatron_embed.models.encoder import AttentionKernel, DeviceMicroBatch, EmbeddingModel, to_device
from megatron_embed.models.passes import embed, run_schedule
from megatron_embed.objectives.base import Batch, LossGradient, Objective, Sums
from megatron_embed.parallel.collectives import send_from_last
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import get_all_rng_states, set_all_rng_states
from megatron_embed.training.scaling import surrogate_factor


@dataclass(frozen=True, kw_only=True)
class GradCache(Generic[Batch]):
    """Forward and backward passes of a step over Megatron's schedules (Gao et al. 2021, arXiv:2101.06983).

    `chunks` are this rank's model chunks in DistributedDataParallel; after `two_pass` or `one_pass` their gradient
    buffers hold the gradient of the mean loss over the global batch, reduced over all ranks.
    """

    chunks: Sequence[torch.nn.Module]
    models: Sequence[EmbeddingModel]
    topology: Topology
    objective: Objective[Batch]
    kernel: AttentionKernel
    has_dropout: bool

    def __call__(self, batch: Batch) -> Sums:
        """Gradients of one step, by two passes, or by one where no row's loss depends on other micro-batches."""
        batches = self._on_device(batch)
        if len(batches) == 1 or not self.objective.couples_batch:
            return self.one_pass(batch, batches)
        return self.two_pass(batch, batches)

    def two_pass(self, batch: Batch, batches: list[DeviceMicroBatch]) -> Sums:
        """A loss over the whole global batch; activations of one micro-batch at a time (1F1B: of one per stage)."""
        rng = get_all_rng_states() if self.has_dropout else None
        embeddings = embed(self.chunks, batches, self.topology)                 # pass 1: no graph, every micro-batch
        found = self._loss(embeddings, batch)                                    # the only step that sees other ranks
        if rng is not None:
            set_all_rng_states(*rng)                                             # pass 2 drops what pass 1 dropped
        factor = surrogate_factor(len(batches), self.topology.dp_size)

        def surrogate(number: int) -> Any:
            def loss(output: Tensor) -> tuple[Tensor, None]:
                assert found is not None, "the schedule asks the last stage alone for a loss"
                rows = batches[number].kept_rows
                return (found.rows[rows.to(output.device)] * output[: len(rows)]).sum() * factor, None

            return loss

        run_schedule(self.chunks, batches, self.topology, surrogate, forward_only=False)
        return self._told(None if found is None else found.sums.values)

    def one_pass(self, batch: Batch, batches: list[DeviceMicroBatch]) -> Sums:
        """A loss within each micro-batch (over the data-parallel ranks, if it likes): computed inside the schedule."""
        parts = [batch] if len(batches) == 1 else self.objective.split(batch)
        factor, total = surrogate_factor(len(batches), self.topology.dp_size), self.objective.total(batch)

        def objective(number: int) -> Any:
            # A part numbers its rows in the order that they have in the whole batch.
            part, order = parts[number], torch.argsort(batches[number].kept_rows)

            def loss(output: Tensor) -> tuple[Tensor, Tensor]:
                rows = output[order.to(output.device)]
                found = self.objective(rows.detach(), part, total=total)
                return (found.rows * rows).sum() * factor, found.sums.values

            return loss

        values = run_schedule(self.chunks, batches, self.topology, objective, forward_only=False)
        return self._told(torch.stack(values).sum(dim=0) if values else None)

    def evaluate(self, batch: Batch) -> Sums:
        """The objective's metrics over these rows: the first pass alone, no gradient."""
        batches = self._on_device(batch)
        rows = embed(self.chunks, batches, self.topology)
        if rows is None:
            return self._told(None)
        total = self.objective.total(batch)
        if self.objective.couples_batch:
            return self._told(self.objective(rows, batch, total=total).sums.values)
        parts = zip(self.objective.split(batch), batches, strict=True)
        values = [self.objective(rows[micro.kept_rows.sort().values.to(rows.device)], part, total=total).sums.values
                  for part, micro in parts]
        return self._told(torch.stack(values).sum(dim=0))

    def _on_device(self, batch: Batch) -> list[DeviceMicroBatch]:
        model = self.models[0]
        return [to_device(micro, self.topology, model.pooling, kernel=self.kernel, causal=model.causal,
                          shape=model.shape) for micro in batch.micro_batches]

    def _loss(self, embeddings: Tensor | None, batch: Batch) -> LossGradient | None:
        """The objective's answer on the last stage, nothing elsewhere."""
        if embeddings is None:
            return None
        return self.objective(embeddings, batch, total=self.objective.total(batch))

    def _told(self, values: Tensor | None) -> Sums:
        """The sums that the last stage has, on every stage."""
        names = self.objective.names
        if values is None:
            values = torch.zeros(len(names), 2, dtype=torch.float64, device=self.topology.device)
        return Sums(names=names, values=send_from_last(values, self.topology.groups.pp))
