"""The steps of a run once more, from a checkpoint or the first weights, on the ranks at hand."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.audit.plain_objective import PlainObjective
from megatron_embed.audit.variation import NONE, Variation
from megatron_embed.batch import StepBatch
from megatron_embed.checkpoint.load import TrainingState, load_checkpoint
from megatron_embed.checkpoint.parameter_checksums import (
    ParameterChecksum,
    ParameterChecksums,
    checksums_by_name,
    optimizer_bits,
)
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.loader import StepLoader
from megatron_embed.models.auto_matmul import resolve_cpu_matmul
from megatron_embed.models.encoder import attention_kernel, to_device
from megatron_embed.models.passes import embed
from megatron_embed.objectives.base import Objective
from megatron_embed.parallel.collectives import gather_objects, send_from_last, sum_over
from megatron_embed.parallel.lost_rank import Start
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.audit_facts import facts_of_objects
from megatron_embed.run.preflight import read_inputs
from megatron_embed.run.task import Inputs, TaskParts
from megatron_embed.run.training_state import build_training_state
from megatron_embed.training.fingerprints import as_signed, fingerprint, named
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.step import Trainer, gradient_step, seed_step, update_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """A run opened for its steps to be made again; nothing is written. Every method is called by all ranks."""

    inputs: Inputs
    topology: Topology
    trainer: Trainer
    state: TrainingState
    parts: TaskParts
    loader: StepLoader[Any]
    parameters: ParameterChecksums
    inner: Objective[Any]
    """The objective of training, which the replay does not compute with."""
    checkpoint: Path | None
    first_parameters: list[Tensor]
    """Copies of the parameters that the run began with, on the CPU; empty with a checkpoint."""
    first_learned: dict[str, Any]

    def restart(self) -> None:
        """Go back to the checkpoint, or to the first weights."""
        self.state.scheduler.num_steps = 0
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, self.state)
            return
        optimizer = self.trainer.optimizer
        with torch.no_grad():
            parameters = [parameter for model in self.state.models for parameter in model.parameters()]
            for parameter, first in zip(parameters, self.first_parameters, strict=True):
                parameter.copy_(first)
        optimizer.reload_model_params()
        for part in optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                group["step"] = 0
            for value in (value for values in part.optimizer.state.values() for value in values.values()):
                if isinstance(value, Tensor):
                    value.zero_()
        self.state.scheduler.step(increment=0)
        if self.state.learned is not None:
            self.state.learned.load_state_dict(self.first_learned)

    def batch(self, step: int) -> StepBatch:
        """This rank's share of optimizer step `step`, from 1, as the run's loader must have made it."""
        batch: StepBatch = self.loader.batch(step - 1)
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
            self._begin(step)
            metrics, squares = gradient_step(batch, self.trainer)
        norm = sum(float(square) for square in squares) ** 0.5
        return Numbers(metrics={**metrics, "grad_norm": norm}, squares=squares)

    def _begin(self, step: int) -> None:
        """Random numbers and schedules as they are in a step, from 1."""
        seed_step(self.inputs.config.training.seed, step - 1, self.topology)
        self.trainer.grad_cache.objective.step = step - 1

    def update(self, numbers: "Numbers") -> dict[str, float]:
        """The parameters' update by the gradient in the buffers. Returns the metrics of a whole step."""
        metrics = {name: value for name, value in numbers.metrics.items() if name != "grad_norm"}
        result = update_step(metrics, numbers.squares, self.trainer)
        self.trainer.complete_parameters()
        return result

    def optimizer_bits(self) -> str:
        """Checksum of the moments, as audit.jsonl has it."""
        return f"{optimizer_bits(self.trainer.optimizer, self.topology) % 2**64:016x}"

    def norm_weights(self) -> float:
        """L2 norm of the weights of the model's norms."""
        sample = torch.tensor(self.parameters.sample(), dtype=torch.int64)
        return self.parameters.of_sample(sum_over(sample, dist.group.WORLD).tolist())[0]

    def evaluated(self, step: int, batch: StepBatch) -> dict[str, float]:
        """Metrics of a step by its forward passes alone, in training mode."""
        self._begin(step)
        return self.trainer.grad_cache.evaluate(batch).metrics()

    def evaluated_across_texts(self, step: int, batch: StepBatch) -> dict[str, float]:
        """The same if all texts of a micro-batch were one for the attention. Empty for a loss within micro-batches."""
        gradients = self.trainer.grad_cache
        model, objective = gradients.models[0], gradients.objective
        if not objective.couples_batch:
            return {}
        self._begin(step)
        changed = []
        for micro in batch.micro_batches:
            one = dataclasses.replace(micro, cu_seqlens=micro.cu_seqlens[[0, -1]], rows=micro.rows[:1])
            device, merged = (to_device(each, self.topology, model.pooling, kernel=gradients.kernel,
                                        causal=model.causal, shape=model.shape, passes=model.passes)
                              for each in (micro, one))
            changed.append(dataclasses.replace(device, packed=merged.packed))
        embeddings = embed(gradients.chunks, changed, self.topology)
        if embeddings is None:
            return self.from_last_stage({})
        return self.from_last_stage(gradients.loss(embeddings, batch).sums.metrics())

    def from_last_stage(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics that the last pipeline stage has, on every stage."""
        if self.topology.pp_size == 1:
            return metrics
        names = [*self.trainer.grad_cache.objective.names]
        values = torch.tensor([metrics.get(name, math.nan) for name in names], dtype=torch.float64)
        values = send_from_last(values.to(self.topology.device), self.topology.groups.pp).cpu()
        return {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isnan(value)}

    def masked(self) -> dict[int, tuple[int, list[int]]]:
        """Negatives and masked documents of the last step's queries, see PlainContrastive; empty for other losses. One
        all-gather of objects over the world."""
        objective = self.trainer.grad_cache.objective
        assert isinstance(objective, PlainObjective)
        return next((part for part in gather_objects(objective.masked, dist.group.WORLD) if part), {})

    def gathered(self, values: list[int]) -> list[int]:
        """The values of all data-parallel ranks, in their order. One all-gather of objects."""
        return [value for part in gather_objects(values, self.topology.dp_group) for value in part]

    def objects(self) -> dict[str, Any]:
        """The settings of the objects that this replay is made of, as a run's starts note them."""
        return facts_of_objects(self.inner, self.trainer, self.loader, self.inputs)

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
    inner = task.build_objective(inputs, topology)
    objective = PlainObjective(config, topology, inner)
    wrapped, state = build_training_state(inputs, topology, objective.learned)
    models = state.models
    if checkpoint is not None:
        load_checkpoint(checkpoint, state)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology, objective=objective,
                          kernel=attention_kernel(config, task.model.shape), has_dropout=config.has_dropout)
    parts = task.build(inputs, topology, models, wrapped)
    first = [] if checkpoint is not None else [
        parameter.detach().cpu().clone() for model in models for parameter in model.parameters()]
    for model in models:
        model.train()
    with task.build_loader(inputs, topology.dp_rank, topology.dp_size) as loader:
        yield Replay(inputs=inputs, topology=topology, state=state, parts=parts, loader=loader,
                     trainer=Trainer(chunks=wrapped, grad_cache=gradients, optimizer=state.optimizer,
                                     scheduler=state.scheduler),
                     parameters=ParameterChecksums(models, topology), inner=inner, checkpoint=checkpoint,
                     first_parameters=first, first_learned={} if state.learned is None else state.learned.state_dict())
    dist.barrier()
