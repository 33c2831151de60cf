"""The loss of a replica's rows, shared out among the ranks that all hold them."""

import torch
from torch import Tensor

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.objectives.base import LossGradient, Objective
from megatron_embed.objectives.splitting import part_of
from megatron_embed.parallel.collectives import gather_padded
from megatron_embed.parallel.topology import Twins


class Shared(Objective[EmbedBatch]):
    """An objective of which each twin computes an equal part of the queries, with their documents.

    Twins that all computed the same would gather and scatter the rows of the global batch once each. So each brings its
    part of them into one all-gather over `everyone`, and one all-gather among the twins tells them the gradient of the
    others' parts: no row travels twice, and the tiles of the loss are divided by the number of twins.

    Args:
        inner: over the ranks of `twins.everyone`.
        replicas: data-parallel size, by which each rank has as many queries.
    """

    def __init__(self, inner: Objective[EmbedBatch], twins: Twins, replicas: int) -> None:
        self.names = inner.names
        self.couples_batch = inner.couples_batch
        self.learned = inner.learned
        self.inner = inner
        self.twins = twins
        self.replicas = replicas

    def total(self, batch: EmbedBatch) -> float:
        return float(batch.num_queries * self.replicas)

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return self.inner.split(batch)

    def __call__(self, rows: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """As the base class says. The inner objective's collectives, then one all-gather of rows/twins rows among the
        twins."""
        number, capacity = self.twins.group.size(), self._capacity(batch.capacity)
        held = [_rows_of(batch, twin, number) for twin in range(number)]
        queries, documents = held[self.twins.group.rank()]
        part = part_of(batch, queries, documents, micro_batches=batch.micro_batches, capacity=capacity)
        mine = torch.cat([queries, documents + batch.num_queries]).to(rows.device)
        found = self.inner(rows[mine], part, total=total)
        gathered = gather_padded(found.rows, capacity.queries + capacity.documents, self.twins.group)
        gradient = torch.empty_like(rows)
        for share, (queries, documents) in zip(gathered, held, strict=True):
            places = torch.cat([queries, documents + batch.num_queries]).to(rows.device)
            gradient[places] = share[: len(places)]
        return LossGradient(sums=found.sums, rows=gradient)

    def _capacity(self, whole: Capacity) -> Capacity:
        """The most that a twin's part of any replica holds: as many documents per query as a replica may have."""
        queries = -(-whole.queries // self.twins.group.size())
        return Capacity(queries, queries * -(-whole.documents // whole.queries),
                        queries * -(-whole.positives // whole.queries))


def _rows_of(batch: EmbedBatch, twin: int, twins: int) -> tuple[Tensor, Tensor]:
    """(numbers of the queries, of their documents) of a twin's part; parts differ by one query at most."""
    first, last = (batch.num_queries * number // twins for number in (twin, twin + 1))
    owner = batch.document_query
    return torch.arange(first, last), ((owner >= first) & (owner < last)).nonzero().flatten()
