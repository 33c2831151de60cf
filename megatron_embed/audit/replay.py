"""The steps of a run once more, from a checkpoint or the first weights, on the ranks at hand."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_embed.audit.plain_objective import plain_objective
from megatron_embed.audit.variation import NONE, Variation
from megatron_embed.batch import StepBatch
from megatron_embed.checkpoint.load import TrainingState, load_checkpoint
from megatron_embed.checkpoint.parameter_checksums import ParameterChecksum, ParameterChecksums, checksums_by_name
from megatron_embed.config.schema import RunConfig
from megatron_embed.loading.model_directory import error_context
from megatron_embed.models.auto_matmul import resolve_cpu_matmul
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.lost_rank import Start
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.preflight import read_inputs
from megatron_embed.run.task import Inputs, TaskParts
from megatron_embed.training.fingerprints import as_signed, fingerprint, named
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_embed.training.step import Trainer, gradient_step, seed_step, update_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """A run opened for its steps to be made again; nothing is written. Every method is called by all ranks."""

    inputs: Inputs
    topology: Topology
    trainer: Trainer
    state: TrainingState
    parts: TaskParts
    parameters: ParameterChecksums

    def batch(self, step: int) -> StepBatch:
        """This rank's share of optimizer step `step`, from 1, as the run's loader must have made it."""
        batch: StepBatch = self.parts.loader.batch(step - 1)
        if self.inputs.config.training.micro_batch_tokens is not None:
            batch = self.parts.agree(batch)
        return batch

    def fingerprint(self, batch: StepBatch) -> dict[str, Any]:
        """Hashes and counts of a step's rows, texts and labels, as audit.jsonl has them."""
        share = self.inputs.config.training.global_batch_size // self.topology.dp_size
        own = as_signed(fingerprint(batch, self.topology.dp_rank * share))
        return named(sum_over(own, self.topology.dp_group).tolist())

    def numbers(self, step: int, batch: StepBatch, variation: Variation = NONE) -> "Numbers":
        """Metrics and gradient of a step, which is left in the buffers; the parameters stay as they are."""
        objective = self.trainer.grad_cache.objective
        with varied(objective, variation):
            seed_step(self.inputs.config.training.seed, step - 1, self.topology)
            metrics, squares = gradient_step(batch, self.trainer)
        norm = sum(float(square) for square in squares) ** 0.5
        return Numbers(metrics={**metrics, "grad_norm": norm}, squares=squares)

    def update(self, numbers: "Numbers") -> dict[str, float]:
        """The parameters' update by the gradient in the buffers. Returns the metrics of a whole step."""
        metrics = {name: value for name, value in numbers.metrics.items() if name != "grad_norm"}
        result = update_step(metrics, numbers.squares, self.trainer)
        self.trainer.complete_parameters()
        return result

    def checksum(self) -> ParameterChecksum:
        return self.parameters()

    def checksums_by_name(self) -> Mapping[str, tuple[int, float]]:
        return checksums_by_name(self.state.models)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """Metrics of a step before its update, and the squares of its gradient's norm."""

    metrics: dict[str, float]
    squares: list[Any]


@contextmanager
def varied(objective: Any, variation: Variation) -> Iterator[None]:
    """Context in which a plain objective computes a variation."""
    if variation is NONE:
        yield
        return
    before, objective.variation = objective.variation, variation
    try:
        yield
    finally:
        objective.variation = before


@contextmanager
def opened(config: RunConfig, checkpoint: Path | None, start: Start) -> Iterator[Replay]:
    """The run of this configuration, which names no directory to write to, at a checkpoint or its first weights.

    Args:
        start: makes the process groups.
    Raises:
        UserError: rows, model or checkpoint cannot be read.
    """
    inputs = read_inputs(config)
    topology = start(config.parallel)
    inputs.task.config = resolve_cpu_matmul(inputs.config, inputs.task.model.shape)
    config, task = inputs.config, inputs.task
    with error_context("model.path", config.model.path):
        models = task.load_model_chunks(topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    scheduler = build_scheduler(optimizer, config.training, inputs.train_steps)
    objective = plain_objective(config, topology, task.build_objective(topology))
    state = TrainingState(models=models, optimizer=optimizer, scheduler=scheduler, learned=objective.learned)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology, objective=objective,
                          kernel=attention_kernel(config, task.model.shape), has_dropout=config.has_dropout)
    parts = task.build(inputs, topology, models, wrapped)
    for model in models:
        model.train()
    with parts.loader:
        yield Replay(inputs=inputs, topology=topology, state=state, parts=parts,
                     trainer=Trainer(chunks=wrapped, grad_cache=gradients, optimizer=optimizer, scheduler=scheduler),
                     parameters=ParameterChecksums(models, topology))
    dist.barrier()
