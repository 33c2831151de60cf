"""The objective on rows that were held out of training, without gradient."""

from collections.abc import Callable, Sequence
from typing import Generic

import torch

from megatron_embed.errors import UserError
from megatron_embed.objectives.base import Batch, Sums
from megatron_embed.parallel.collectives import leave_if_asked, raise_on_all_ranks
from megatron_embed.training.grad_cache import GradCache


class Validation(Generic[Batch]):
    """Means of the objective's metrics over the rows that were held out. Every method is called by all ranks together.

    Args:
        gradients: the passes of training; only the first of them is made.
        builders: one per batch: makes this rank's share of it. All are called at once, here.
        agree: gives all data-parallel ranks as many micro-batches.
    Raises:
        UserError: on every rank, what the lowest rank met that cannot make its share.
    """

    def __init__(self, gradients: GradCache[Batch], builders: Sequence[Callable[[], Batch]],
                 agree: Callable[[Batch], Batch]) -> None:
        self.gradients = gradients
        batches: list[Batch] = []
        error = None
        try:
            batches = [build() for build in builders]
        except UserError as found:
            error = found
        raise_on_all_ranks(error)
        self.batches = [agree(batch) for batch in batches]

    def __call__(self) -> dict[str, float]:
        """The metrics by name; dropout is off meanwhile. Communicates as the first pass and the objective do.

        Raises:
            PreemptedError: on every rank, between two batches, if a run that saves itself is asked to stop.
        """
        chunks = self.gradients.chunks
        was_training = [chunk.training for chunk in chunks]
        for chunk in chunks:
            chunk.eval()
        try:
            found = []
            for batch in self.batches:
                leave_if_asked()
                found.append(self.gradients.evaluate(batch))
        finally:
            for chunk, training in zip(chunks, was_training, strict=True):
                chunk.train(training)
        return Sums(names=found[0].names, values=torch.stack([sums.values for sums in found]).sum(dim=0)).metrics()
