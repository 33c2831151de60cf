"""Loss and gradients of one step by two passes with cached embeddings (GradCache).

InfoNCE needs the embeddings of the whole global batch, and memory holds the activations of one micro-batch. So a step
(Gao et al. 2021, arXiv:2101.06983)
  1. embeds every micro-batch without a graph and keeps only the embeddings (several as one, see first_pass.py);
  2. gathers them over the data-parallel ranks and computes the loss and its gradient g with respect to each embedding;
  3. runs every micro-batch again, with a graph, dropout as in the first pass, and the surrogate loss <g, e>. By the
     chain rule its gradient with respect to the parameters is that of the loss over the global batch.
Where memory allows, the first micro-batches keep their activations from 1 to 3, which then has only their backward
passes left (see kept_activations.py). Both passes run Megatron's pipeline schedules. If a step is one micro-batch, or
the loss needs no other micro-batch, one ordinary forward and backward pass is enough.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from megatron_embed.batch import MicroBatch
from megatron_embed.models.encoder import AttentionKernel, DeviceMicroBatch, EmbeddingModel, to_device
from megatron_embed.models.passes import embed, forward, run_schedule
from megatron_embed.objectives.base import Batch, LossGradient, Objective, Sums
from megatron_embed.parallel.collectives import send_from_last
from megatron_embed.parallel.device_copy import copy_to_device
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import forget_router_losses, get_all_rng_states, set_all_rng_states
from megatron_embed.training.first_pass import FirstPass
from megatron_embed.training.kept_activations import KeptActivations
from megatron_embed.training.scaling import surrogate_factor


@dataclass(frozen=True, kw_only=True)
class GradCache(Generic[Batch]):
    """Forward and backward passes of a step.

    `chunks` are this rank's model chunks in DistributedDataParallel; after `two_pass` or `one_pass` their gradient
    buffers hold the gradient of the mean loss over the global batch, reduced over all ranks.
    """

    chunks: Sequence[torch.nn.Module]
    models: Sequence[EmbeddingModel]
    topology: Topology
    objective: Objective[Batch]
    kernel: AttentionKernel
    has_dropout: bool
    first_pass: FirstPass | None = None
    """Makes larger micro-batches for the first pass; None: it has those of the second. None with dropout, whose random
    numbers follow the micro-batches."""
    kept: KeptActivations | None = None
    """Chooses the micro-batches whose activations are kept for the second pass; None: none are."""

    def __call__(self, batch: Batch) -> Sums:
        """Fill the gradient buffers and return the sums for the metrics.

        By two passes, or by one if no row's loss depends on other micro-batches.
        """
        forget_router_losses()
        batches = self._on_device(batch.micro_batches)
        if len(batches) == 1 or not self.objective.couples_batch:
            return self.one_pass(batch, batches)
        return self.two_pass(batch, batches)

    def two_pass(self, batch: Batch, batches: list[DeviceMicroBatch]) -> Sums:
        """A loss over the global batch.

        Holds the activations of one micro-batch at a time (1F1B: of one per stage), or of those that are kept.
        """
        assert self.first_pass is None or not self.has_dropout, "pass 2 could not drop what pass 1 dropped"
        kept = 0 if self.kept is None else self.kept.count(batch.micro_batches, self.topology.dp_group)
        outputs = deque(forward(self.chunks, batches[:kept], self.topology))    # pass 1, with activations
        rng = get_all_rng_states() if self.has_dropout else None
        rest = batches[kept:] if self.first_pass is None else self._merged(batch.micro_batches[kept:])
        embeddings = embed(self.chunks, rest, self.topology, before=list(zip(batches, outputs, strict=False)))
        grad = None if embeddings is None else self.loss(embeddings, batch)      # needs other data-parallel ranks' rows
        if rng is not None:
            set_all_rng_states(*rng)                                             # pass 2 drops what pass 1 dropped
        factor = surrogate_factor(len(batches), self.topology.dp_size)

        def surrogate(index: int) -> Any:
            def loss(output: Tensor) -> tuple[Tensor, None]:
                assert grad is not None, "the schedule asks only the last stage for a loss"
                row_ids = batches[index].valid_rows
                return (grad.embeddings[row_ids] * output[: len(row_ids)]).sum() * factor, None

            return loss

        run_schedule(self.chunks, batches, self.topology, surrogate, forward_only=False, computed=outputs)   # pass 2
        return self._broadcast_from_last_stage(None if grad is None else grad.sums.values)

    def one_pass(self, batch: Batch, batches: list[DeviceMicroBatch]) -> Sums:
        """A loss within each micro-batch, inside the schedule; it may communicate over the data-parallel ranks."""
        parts = [batch] if len(batches) == 1 else self.objective.split(batch)
        assert len(batches) == 1 or batch.encoded_outputs is None, "a part may lack the row of its text"
        factor, total = surrogate_factor(len(batches), self.topology.dp_size), self.objective.total(batch)

        def micro_batch_loss(index: int) -> Any:
            # The rows of a part have the order that they have in the whole batch.
            part, (rows, order) = parts[index], batches[index].valid_rows.sort()
            if part.encoded_outputs is not None:
                order = order[torch.searchsorted(rows, copy_to_device(part.encoded_outputs, rows.device))]

            def loss(output: Tensor) -> tuple[Tensor, Tensor]:
                embeddings = output[order]
                grad = self.objective(embeddings.detach(), part, total=total)
                return (grad.embeddings * embeddings).sum() * factor, grad.sums.values

            return loss

        values = run_schedule(self.chunks, batches, self.topology, micro_batch_loss, forward_only=False)
        return self._broadcast_from_last_stage(torch.stack(values).sum(dim=0) if values else None)

    def evaluate(self, batch: Batch) -> Sums:
        """The objective's metrics over these rows: the first pass alone, no gradient."""
        prepare = self._merged if self.objective.couples_batch else self._on_device
        batches = prepare(batch.micro_batches)
        embeddings = embed(self.chunks, batches, self.topology)
        if embeddings is None:
            return self._broadcast_from_last_stage(None)
        if self.objective.couples_batch:
            return self._broadcast_from_last_stage(self.loss(embeddings, batch).sums.values)
        total = self.objective.total(batch)
        values = []
        for part, micro in zip(self.objective.split(batch), batches, strict=True):
            values.append(self.objective(embeddings[micro.valid_rows.sort().values], part, total=total).sums.values)
        return self._broadcast_from_last_stage(torch.stack(values).sum(dim=0))

    def _merged(self, micro_batches: Sequence[MicroBatch]) -> list[DeviceMicroBatch]:
        """These micro-batches as a pass without gradients embeds them."""
        return self._on_device(micro_batches if self.first_pass is None else self.first_pass(micro_batches))

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> list[DeviceMicroBatch]:
        model = self.models[0]
        return [to_device(micro, self.topology, model.pooling, kernel=self.kernel, causal=model.causal,
                          shape=model.shape, passes=model.passes) for micro in micro_batches]

    def loss(self, embeddings: Tensor, batch: Batch) -> LossGradient:
        """The objective's result for what the model gave for the rows of the micro-batches. Called on the last stage;
        communicates over the data-parallel group, as the objective does.

        Rows that share the outputs of another row (`StepBatch.encoded_row`) add their gradients to that row's.
        """
        total, shared = self.objective.total(batch), batch.encoded_outputs
        if shared is None:
            return self.objective(embeddings, batch, total=total)
        shared = copy_to_device(shared, embeddings.device)
        of_rows = self.objective(embeddings[shared], batch, total=total)
        added = torch.zeros_like(of_rows.embeddings).index_add_(0, shared, of_rows.embeddings)
        return replace(of_rows, embeddings=added)

    def _broadcast_from_last_stage(self, values: Tensor | None) -> Sums:
        """The last stage's sums on every stage."""
        names = self.objective.names
        if values is None:
            values = torch.zeros(len(names), 2, dtype=torch.float64, device=self.topology.device)
        return Sums(names=names, values=send_from_last(values, self.topology.groups.pp))
