"""Loss and gradients of one step: two passes with cached embeddings, or one where a loss needs no other micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.models.encoder import AttentionKernel, DeviceMicroBatch, EmbeddingModel, to_device
from megatron_embed.models.passes import embed, run_schedule
from megatron_embed.parallel.collectives import send_from_last
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import get_all_rng_states, set_all_rng_states
from megatron_embed.training.objective import Objective, Sums
from megatron_embed.training.scaling import surrogate_factor


@dataclass(frozen=True, kw_only=True)
class GradCache:
    """Forward and backward passes of a step over Megatron's schedules (Gao et al. 2021, arXiv:2101.06983).

    `chunks` are this rank's model chunks in DistributedDataParallel; after `two_pass` or `one_pass` their gradient
    buffers hold the gradient of the mean loss over the global batch, reduced over all ranks.
    """

    chunks: Sequence[torch.nn.Module]
    models: Sequence[EmbeddingModel]
    topology: Topology
    objective: Objective
    negatives: Literal["global_batch", "micro_batch"]
    kernel: AttentionKernel
    has_dropout: bool

    def __call__(self, batch: EmbedBatch) -> Sums:
        """Gradients of one step, by two passes, or by one where every negative lies in the same micro-batch."""
        model = self.models[0]
        batches = [to_device(micro, self.topology, model.pooling, kernel=self.kernel, causal=model.causal)
                   for micro in batch.micro_batches]
        if len(batches) == 1 or self.negatives == "micro_batch":
            return self.one_pass(batch, batches)
        return self.two_pass(batch, batches)

    def two_pass(self, batch: EmbedBatch, batches: list[DeviceMicroBatch]) -> Sums:
        """Negatives of the whole global batch; activations of one micro-batch at a time (1F1B: of one per stage)."""
        rng = get_all_rng_states() if self.has_dropout else None
        embeddings = embed(self.chunks, batches, self.topology)                 # pass 1: no graph, every micro-batch
        sums, gradients = self._loss(embeddings, batch)                          # the only step that sees other ranks
        if rng is not None:
            set_all_rng_states(*rng)                                             # pass 2 drops what pass 1 dropped
        factor = surrogate_factor(len(batches), self.topology.dp_size)

        def surrogate(number: int) -> Any:
            def loss(output: Tensor) -> tuple[Tensor, None]:
                rows = batches[number].kept_rows
                return (gradients[rows.to(gradients.device)] * output[: len(rows)]).sum() * factor, None

            return loss

        run_schedule(self.chunks, batches, self.topology, surrogate, forward_only=False)
        return sums

    def one_pass(self, batch: EmbedBatch, batches: list[DeviceMicroBatch]) -> Sums:
        """Negatives of one micro-batch over the data-parallel ranks: the loss is computed inside the schedule."""
        parts = [batch] if len(batches) == 1 else split_by_micro_batch(batch)
        factor, total_rows = surrogate_factor(len(batches), self.topology.dp_size), self._total_rows(batch)

        def objective(number: int) -> Any:
            # Row numbers of a micro-batch in ascending order are its queries, then its documents.
            part, order = parts[number], torch.argsort(batches[number].kept_rows)

            def loss(output: Tensor) -> tuple[Tensor, Tensor]:
                rows = output[order.to(output.device)]
                sums, gradients = self.objective(rows.detach(), part, total_rows=total_rows)
                return (gradients * rows).sum() * factor, sums.values

            return loss

        values = run_schedule(self.chunks, batches, self.topology, objective, forward_only=False)
        total = torch.stack(values).sum(dim=0) if values else self._no_sums()
        return Sums(values=send_from_last(total, self.topology.groups.pp))

    def _loss(self, embeddings: Tensor | None, batch: EmbedBatch) -> tuple[Sums, Tensor]:
        """On the last stage the objective's answer; elsewhere its sums and an empty gradient that no one uses."""
        values, gradients = self._no_sums(), torch.empty(0)
        if embeddings is not None:
            sums, gradients = self.objective(embeddings, batch, total_rows=self._total_rows(batch))
            values = sums.values
        return Sums(values=send_from_last(values, self.topology.groups.pp)), gradients

    def _total_rows(self, batch: EmbedBatch) -> int:
        """Queries of the global batch: every data-parallel rank has as many."""
        return batch.num_queries * self.topology.dp_size

    def _no_sums(self) -> Tensor:
        return torch.zeros(8, dtype=torch.float64, device=self.topology.device)


def split_by_micro_batch(batch: EmbedBatch) -> list[EmbedBatch]:
    """One EmbedBatch per micro-batch, its rows renumbered: queries in order, then their documents."""
    parts = []
    for micro in batch.micro_batches:
        rows = micro.kept_rows.sort().values
        queries, documents = rows[rows < batch.num_queries], rows[rows >= batch.num_queries] - batch.num_queries
        given = torch.isin(batch.positive_query, queries)
        parts.append(EmbedBatch(
            micro_batches=(micro,), num_queries=len(queries), num_documents=len(documents),
            positive_index=torch.searchsorted(documents, batch.positive_index[queries]),
            document_query=torch.searchsorted(queries, batch.document_query[documents]),
            query_ids=batch.query_ids[queries],
            positive_query=torch.searchsorted(queries, batch.positive_query[given]),
            positive_ids=batch.positive_ids[given], document_ids=batch.document_ids[documents], num_truncated=0,
            capacity=batch.micro_capacity, micro_capacity=batch.micro_capacity))
    return parts
