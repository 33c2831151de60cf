"""One optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_embed.batch import StepBatch
from megatron_embed.models.passes import unwrapped
from megatron_embed.parallel.device_copy import copy_to_host
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import (
    MegatronOptimizer,
    OptimizerParamScheduler,
    model_parallel_cuda_manual_seed,
    router_losses,
)
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.optimizer import squared_norms, update
from megatron_embed.training.overlap import complete_parameters


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Model, gradient cache, optimizer and schedule of a run; built once, in run/assemble.py."""

    chunks: Sequence[torch.nn.Module]
    grad_cache: GradCache
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def complete_parameters(self) -> None:
        """Bring all parameters up to date on every rank. Called by all ranks; see training/overlap.py."""
        complete_parameters(self.chunks)


def seed_step(seed: int, step: int, topology: Topology, *, dp_rank: int | None = None) -> None:
    """Make dropout a function of seed, step and position in the layout, so that a resumed run repeats it.

    Tensor-parallel ranks of a replica share the seed; Megatron's tracker lets them differ where their shards do.

    Args:
        dp_rank: the data-parallel rank whose random numbers these are; None: this one.
    """
    rank = topology.dp_rank if dp_rank is None else dp_rank
    sequence = np.random.SeedSequence([seed, step, topology.pp_rank, rank, topology.cp_rank])
    model_parallel_cuda_manual_seed(int(sequence.generate_state(1)[0]) >> 1)


def train_step(batch: StepBatch, trainer: Trainer) -> dict[str, float]:
    """One optimizer step over the global batch.

    Returns:
        The objective's metrics (`Objective.names`) as means over the global batch, those of a mixture of experts'
        auxiliary loss (see `router_losses`) if its coefficient is not 0, `grad_norm` of the whole model before
        clipping, the `learning_rate` used, and `skipped`: 1 if loss or gradient was not finite and nothing was updated,
        else 0. Equal on all ranks.
    """
    metrics, squares = gradient_step(batch, trainer)
    return update_step(metrics, squares, trainer)


def gradient_step(batch: StepBatch, trainer: Trainer) -> tuple[dict[str, float], list[Tensor]]:
    """The first half of a step: (metrics of objective and routers, squared norms of the gradient, on the CPU), with the
    gradient in the buffers, reduced over all ranks."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    sums = trainer.grad_cache(batch)                                 # forward and backward; reduced over all ranks
    routers = router_losses(unwrapped(trainer.chunks[0]).config.num_layers, len(batch.micro_batches))
    squares = squared_norms(trainer.optimizer)
    learned = trainer.grad_cache.objective.learned
    of_learned = () if learned is None else learned.complete_gradient()
    # The step's one wait for the device: whether to update depends on these numbers.
    values, *parts = copy_to_host(sums.values, *squares, *routers.values(), *of_learned)
    squares, parts = parts[: len(squares)], parts[len(squares) :]
    metrics = replace(sums, values=values).metrics()
    metrics |= {name: float(value) for name, value in zip(routers, parts, strict=False)}
    if learned is not None:
        learned.receive(parts[len(routers) :])
    return metrics, squares


def update_step(metrics: dict[str, float], squares: list[Tensor], trainer: Trainer) -> dict[str, float]:
    """The second half: clip, update, gather. Takes what `gradient_step` returned; returns what `train_step` does."""
    learning_rate = trainer.optimizer.param_groups[0]["lr"]
    grad_norm, updated = update(trainer.optimizer, squares, metrics["loss"])
    learned = trainer.grad_cache.objective.learned
    if learned is not None and updated:
        learned.step(metrics, learning_rate)
    trainer.scheduler.step(increment=1)                              # a function of the step, skipped or not
    return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate, "skipped": float(not updated)}
