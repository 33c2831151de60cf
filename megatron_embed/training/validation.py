"""The objective on rows that were held out of training, without gradient."""

from collections.abc import Callable, Sequence
from typing import Generic

import torch

from megatron_embed.errors import UserError
from megatron_embed.models.passes import evaluation_mode
from megatron_embed.objectives.base import Batch, Sums
from megatron_embed.parallel.collectives import leave_if_asked, raise_on_all_ranks
from megatron_embed.training.grad_cache import GradCache


class Validation(Generic[Batch]):
    """Means of the objective's metrics over the rows that were held out. Every method is called by all ranks together.

    Args:
        gradients: the passes of training, of which only the first is run.
        builders: one per batch, which returns this rank's share of it. All are called here.
        agree: gives all data-parallel ranks as many micro-batches.
    Raises:
        UserError: on every rank, the error of the lowest rank that has one.
    """

    def __init__(self, gradients: GradCache[Batch], builders: Sequence[Callable[[], Batch]],
                 agree: Callable[[Batch], Batch]) -> None:
        self.grad_cache = gradients
        batches: list[Batch] = []
        error = None
        try:
            batches = [build() for build in builders]
        except UserError as batch_error:
            error = batch_error
        raise_on_all_ranks(error)
        self.batches = [agree(batch) for batch in batches]

    def __call__(self) -> dict[str, float]:
        """The metrics by name; dropout is off meanwhile. Communicates as the first pass and the objective do.

        Raises:
            PreemptedError: on every rank, between two batches, if a run that saves itself is asked to stop.
        """
        parts = []
        with evaluation_mode(self.grad_cache.chunks):
            for batch in self.batches:
                leave_if_asked()
                parts.append(self.grad_cache.evaluate(batch))
        return Sums(names=parts[0].names, values=torch.stack([sums.values for sums in parts]).sum(dim=0)).metrics()
