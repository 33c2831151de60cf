"""The loss of a replica's rows, split over the tensor- and context-parallel ranks that all hold their embeddings."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.objectives.base import LossGradient, Objective
from megatron_embed.objectives.splitting import part_of
from megatron_embed.parallel.collectives import gather_padded
from megatron_embed.parallel.device_copy import copy_to_device


class ReplicaSplit(Objective[EmbedBatch]):
    """An objective of which each tensor- and context-parallel rank computes an equal part of the replica's queries.

    If all of them computed the same, each would gather and scatter the embeddings of the global batch. So each brings
    its part of them into one all-gather over the ranks of all replicas, and one all-gather within the replica gives
    them the gradient of the others' parts: no embedding is sent twice, and the tiles of the loss are divided by the
    number of ranks.

    Args:
        inner: the objective over `tp_dp_cp_group`, the tensor-, context- and data-parallel ranks of a pipeline stage.
        tp_cp_group: the tensor- and context-parallel ranks of one replica.
        dp_size: number of replicas; each has equally many queries.
    """

    def __init__(self, inner: Objective[EmbedBatch], tp_cp_group: dist.ProcessGroup, dp_size: int) -> None:
        self.names = inner.names
        self.couples_batch = inner.couples_batch
        self.learned = inner.learned
        self.inner = inner
        self.tp_cp_group = tp_cp_group
        self.dp_size = dp_size

    def total(self, batch: EmbedBatch) -> float:
        return float(batch.num_queries * self.dp_size)

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return self.inner.split(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective. The inner objective's collectives, then one all-gather of the gradients over `tp_cp_group`."""
        size, capacity = self.tp_cp_group.size(), self._capacity(batch.capacity)
        parts = [_rows_of(batch, rank, size) for rank in range(size)]
        queries, documents = parts[self.tp_cp_group.rank()]
        part = part_of(batch, queries, documents, micro_batches=batch.micro_batches, capacity=capacity)
        rows = copy_to_device(tuple(batch.outputs_of(torch.cat([queries, documents + batch.num_queries])
                                                     if batch.embeds_documents else queries)
                                    for queries, documents in parts), embeddings.device)
        own = self.inner(embeddings[rows[self.tp_cp_group.rank()]], part, total=total)
        gathered = gather_padded(own.embeddings, max(map(len, rows)), self.tp_cp_group)
        gradient = torch.empty_like(embeddings)
        for part_gradient, part_rows in zip(gathered, rows, strict=True):
            gradient[part_rows] = part_gradient[: len(part_rows)]
        return LossGradient(sums=own.sums, embeddings=gradient)

    def _capacity(self, whole: Capacity) -> Capacity:
        """The most that a rank's part of any replica holds: as many documents per query as a replica may have."""
        queries = -(-whole.queries // self.tp_cp_group.size())
        return Capacity(queries, queries * -(-whole.documents // whole.queries),
                        queries * -(-whole.positives // whole.queries))


def _rows_of(batch: EmbedBatch, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """(indices of the queries, of their documents) of a rank's part; parts differ by one query at most."""
    first, last = (batch.num_queries * bound // size for bound in (rank, rank + 1))
    query = batch.document_query
    return torch.arange(first, last), ((query >= first) & (query < last)).nonzero().flatten()
