"""Builds a run in order (topology, data, model, objective, optimizer, loop) and runs it."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import make_marked, remove_unfinished, set_aside_after
from megatron_embed.checkpoint.load import TrainingState, load_checkpoint, load_model
from megatron_embed.checkpoint.lock import directory_lock
from megatron_embed.checkpoint.save import Saver, on_rank_0
from megatron_embed.config.load import save_resolved, to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import write_sidecar_files
from megatron_embed.data.batch_workers import ForkServer
from megatron_embed.data.dataset import validation_shares
from megatron_embed.data.loader import StepLoader
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.suite import best_metric
from megatron_embed.export.sentence_transformers import set_right_truncation
from megatron_embed.loading.model_directory import adapters_of
from megatron_embed.loading.quantized import base_of_run
from megatron_embed.models.auto_dtype import resolve_dtype
from megatron_embed.models.auto_matmul import resolve_cpu_matmul
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel
from megatron_embed.parallel.collectives import raise_on_all_ranks, smallest
from megatron_embed.parallel.heartbeat import monitor_ranks
from megatron_embed.parallel.lost_rank import abort
from megatron_embed.parallel.topology import Topology, initialize
from megatron_embed.planning.advice import with_adapters
from megatron_embed.platform.determinism import deterministic_algorithms
from megatron_embed.platform.stop_signal import finishing
from megatron_embed.run.audit_facts import facts_of_objects, facts_of_start
from megatron_embed.run.batch_sharing import fork_server, receive_batches
from megatron_embed.run.introduction import introduction, summary
from megatron_embed.run.preflight import completed_run, output_directories, read_inputs
from megatron_embed.run.run_directory import (
    DATA_FILE,
    ResumeState,
    best_checkpoint,
    changed_since_check,
    data_stamps,
    describe_rows,
    resume_state,
    with_known_choices,
)
from megatron_embed.run.task import Inputs, Task, TaskParts
from megatron_embed.run.training_state import build_training_state
from megatron_embed.training.audit_log import AuditLog
from megatron_embed.training.first_pass import build_first_pass
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.health import Health
from megatron_embed.training.kept_activations import build_kept_activations
from megatron_embed.training.loop import Hooks, train
from megatron_embed.training.metrics import MetricsWriter, OnStep
from megatron_embed.training.progress import Progress, epochs_done
from megatron_embed.training.step import Trainer
from megatron_embed.training.stopping import StopRequest
from megatron_embed.training.validation import Validation

logger = logging.getLogger(__name__)


def run_training(config: RunConfig, on_step: OnStep | None = None) -> dict[str, float]:
    """A whole run, resumed if `checkpoint.directory` holds a checkpoint. Returns the last step's metrics.

    Empty where there was no step left; a run that is complete, its export included, touches nothing.

    Args:
        on_step: called on every rank after each step and each evaluation; an error in it ends the run.
    Raises:
        PreemptedError: a signal or the time budget ended the run, once its state was saved.
        LostRankError: another rank is gone.
    """
    stop = StopRequest(config.training.exit_duration_minutes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(config.training.deterministic))
        completed = completed_run(config)
        inputs = None if completed is not None else read_inputs(config)
        server = stack.enter_context(fork_server(inputs))
        topology = initialize(config.parallel)
        stack.enter_context(monitor_ranks(topology, abort))
        if smallest(int(completed is not None)):  # Agreed: the disk may answer one rank sooner than another.
            assert completed is not None
            return nothing_to_do(config, completed.resume_state, completed.train_steps)
        if inputs is None:
            inputs = read_inputs(config)
        # The ranks agree on the dtype and the libraries, so these are settled after the process groups.
        config = resolve_dtype(with_known_choices(inputs.config, inputs.resume_state.checkpoint))
        inputs.task.config = resolve_cpu_matmul(config, inputs.task.model.shape)
        return run_unless_complete(inputs, topology, stop, on_step, server)


def run_unless_complete(inputs: Inputs, topology: Topology, stop: StopRequest, on_step: OnStep | None,
                        server: ForkServer | None) -> dict[str, float]:
    """The run, unless it is complete, as the only writer of its directories."""
    config, state = inputs.config, inputs.resume_state
    if smallest(int(inputs.is_complete)):  # Agreed: the disk may answer one rank sooner than another.
        return nothing_to_do(config, state, inputs.train_steps)
    with contextlib.ExitStack() as locks:
        for key, directory in output_directories(config).items():
            locks.enter_context(directory_lock(key, directory))
        raise_on_all_ranks(changed_since_check(config, state))
        with inputs.task.build_loader(inputs, topology.dp_rank, topology.dp_size) as loader:
            receive_batches(loader, inputs, topology, server)
            return run_training_task(inputs, topology, stop, on_step, loader)


def nothing_to_do(config: RunConfig, state: ResumeState, train_steps: int) -> dict[str, float]:
    """Say that the run is complete."""
    logger.info("%s has %d steps of %d%s: the run is complete%s; nothing to do", state.checkpoint, state.steps,
                train_steps, " and evaluation.patience ended it" if state.ended_early else "",
                f" and {config.checkpoint.export_at_end} is its export" if config.checkpoint.export_at_end else "")
    return {}


def run_training_task(inputs: Inputs, topology: Topology, stop: StopRequest, on_step: OnStep | None,
                      loader: StepLoader[Any]) -> dict[str, float]:
    """The run itself, from the newest checkpoint on. Called by all ranks; returns the last step's metrics."""
    config, task, started = inputs.config, inputs.task, time.monotonic()
    if topology.rank == 0:
        logger.info("%s", introduction(inputs, topology.world_size))
    objective = task.build_objective(inputs, topology)
    wrapped, state = build_training_state(inputs, topology, objective.learned)
    models = state.models
    first_step = resume(inputs.resume_state, state)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology, objective=objective,
                          kernel=attention_kernel(config, task.model.shape), has_dropout=config.has_dropout,
                          first_pass=build_first_pass(config, task.model.shape, topology),
                          kept=build_kept_activations(with_trained_adapters(config, task), task.model.shape, topology))
    trainer = Trainer(chunks=wrapped, grad_cache=gradients, optimizer=state.optimizer, scheduler=state.scheduler)
    parts = task.build(inputs, topology, models, wrapped)
    best = best_checkpoint(config, first_step)
    writer = build_writer(inputs, first_step, on_step, active=topology.rank == 0)
    saver = build_saver(inputs, state, best)
    evaluate = build_evaluation(inputs, topology, gradients, parts, loader)
    hooks = build_hooks(inputs, loader, parts, evaluate, best, saver, stop, writer,
                        build_audit_log(inputs, trainer, loader, topology, first_step))
    for model in models:
        model.train()
    # Without checkpoints there is nothing to finish: the ranks then leave at once.
    with contextlib.nullcontext() if saver is None else finishing():
        metrics = train(config, trainer, hooks, topology, first_step=first_step,
                        train_steps=inputs.last_step, evaluation_owed=inputs.resume_state.evaluation_owed)
    if metrics and parts.show_vectors is not None:
        parts.show_vectors()
    if config.checkpoint.export_at_end is not None:
        steps = resume_state(config).steps
        parts.export(load_checkpoint_to_export(config, best, models, steps), steps)
    if topology.rank == 0:
        logger.info("%s", summary(inputs, metrics, best, seconds=time.monotonic() - started))
    return metrics


def with_trained_adapters(config: RunConfig, task: Task) -> RunConfig:
    """The configuration with the adapters that the run trains in section `lora`, also if its model has them."""
    adapters = adapters_of(config.lora, task.model)
    return config if adapters is None else with_adapters(config, adapters)


def build_writer(inputs: Inputs, first_step: int, on_step: OnStep | None, *, active: bool) -> MetricsWriter:
    """The writer of the run's metrics."""
    config = inputs.config
    progress = Progress(train_steps=inputs.last_step, first_step=first_step,
                        steps_per_epoch=inputs.sampler.steps_per_epoch)
    writer = MetricsWriter(config.log_directory, settings=config.logging, progress=progress,
                           active=active, main_metric=best_metric(config), on_step=on_step,
                           wandb_settings=to_dict(config) if config.logging.wandb else None)
    if active and config.log_directory not in (None, config.checkpoint.directory) and writer.error is None:
        try:
            save_resolved(config, Path(config.log_directory or "") / "config.yaml")  # beside checkpoints it is in them
        except ConfigError as error:
            writer.error = error
    return writer


def build_audit_log(inputs: Inputs, trainer: Trainer, loader: StepLoader[Any], topology: Topology,
                    first_step: int) -> AuditLog:
    """The log of every step for a later audit, with a record of this start. Called by all ranks."""
    config = inputs.config
    log = AuditLog(config.log_directory, trainer, topology, first_step=first_step,
                   every=config.logging.parameter_checksum_every,
                   share=config.training.global_batch_size // topology.dp_size, max_mib=config.logging.max_file_mib)
    log.start(first_step, {**facts_of_start(inputs, topology), "objects": facts_of_objects(
        trainer.grad_cache.objective, trainer, loader, inputs)})
    return log


def is_save_due(inputs: Inputs, done: int) -> bool:
    """Whether the configuration asks for a checkpoint after `done` steps."""
    checkpoint = inputs.config.checkpoint
    if checkpoint.save_every_epochs is None:
        return done % checkpoint.save_every_steps == 0
    period = inputs.sampler.steps_per_epoch * checkpoint.save_every_epochs
    return epochs_done(done, period) > epochs_done(done - 1, period)


def build_saver(inputs: Inputs, state: TrainingState, best: BestCheckpoint | None) -> Saver | None:
    """The writer of the run's checkpoints; None: it has none. Called by all ranks."""
    config, assets = inputs.config.checkpoint, prepare_assets(inputs)
    if config.directory is None or assets is None:
        return None
    return Saver(config.directory, state, assets=assets, keep=config.keep,
                 keep_every=config.keep_every_steps, background=config.async_save,
                 on_complete=None if best is None else best.mark)


def build_hooks(inputs: Inputs, loader: StepLoader[Any], parts: TaskParts,
                evaluate: Callable[[], dict[str, float]] | None, best: BestCheckpoint | None, saver: Saver | None,
                stop: StopRequest, writer: MetricsWriter, audit_log: AuditLog) -> Hooks:
    """The functions and objects that the training loop calls."""
    health = Health(inputs.config, functools.partial(sources_of_step, inputs), inputs.config.log_directory,
                    active=dist.get_rank() == 0)
    return Hooks(load_batch=loader.batch,
                 agree=None if inputs.config.training.micro_batch_tokens is None else parts.agree, evaluate=evaluate,
                 is_best=None if best is None else best.improves, is_over=lambda: best is not None and best.is_over,
                 saver=saver, save_due=functools.partial(is_save_due, inputs), stop=stop, writer=writer, health=health,
                 audit_log=audit_log)


def load_checkpoint_to_export(config: RunConfig, best: BestCheckpoint | None, models: Sequence[EmbeddingModel],
                         steps: int) -> str:
    """The checkpoint that `checkpoint.export` names, whose weights the model now holds. Called by all ranks.

    `steps`: optimizer steps of the newest checkpoint, whose weights the model holds before.
    """
    if config.checkpoint.export == "last" or best is None:
        return config.checkpoint.directory or ""
    checkpoint, best_step = best.checkpoint
    logger.info("the export is of %s", checkpoint)
    if best_step != steps:
        load_model(checkpoint, models)
    return str(checkpoint)


def build_evaluation(inputs: Inputs, topology: Topology, gradients: GradCache[Any],
                     parts: TaskParts, loader: StepLoader[Any]) -> Callable[[], dict[str, float]] | None:
    """The task's evaluation, with the objective over the rows that are held out; None where there is neither.

    Called by all ranks.
    """
    records = inputs.validation
    if records is None:
        return parts.evaluate
    shares = validation_shares(records, global_batch_size=inputs.config.training.global_batch_size,
                               dp_rank=topology.dp_rank, dp_size=topology.dp_size)
    validation = Validation(gradients, [functools.partial(loader.build, records, rows, 0) for rows in shares],
                            parts.agree_on_shares)
    logger.info("%d rows are held out for validation, %d are trained on", len(records), len(inputs.records))

    def evaluate() -> dict[str, float]:
        return {**validation(), **({} if parts.evaluate is None else parts.evaluate())}

    return evaluate


def sources_of_step(inputs: Inputs, step: int) -> list[str]:
    """FILE:LINE of every row of a step, from 0."""
    return [inputs.records[row].source for row in inputs.sampler.rows_of_step(step)]


def resume(progress: ResumeState, state: TrainingState) -> int:
    """Loads the newest checkpoint, if any. Returns the optimizer steps it has done (0 without one)."""
    if progress.checkpoint is None:
        return 0
    step = load_checkpoint(progress.checkpoint, state)
    logger.info("resumed %s after %d steps", progress.checkpoint, step)
    return step


def prepare_assets(inputs: Inputs) -> Path | None:
    """Writes, on rank 0, the files that every checkpoint carries beside its tensors, again at each start.

    Checkpoints that the run leaves behind, because it resumes from one before them, are put aside.
    """
    if inputs.config.checkpoint.directory is None:
        return None
    assets, steps = Path(inputs.config.checkpoint.directory) / ".assets", inputs.resume_state.steps

    def write() -> None:
        remove_unfinished(assets.parent)
        abandoned = set_aside_after(assets.parent, steps)
        if abandoned:
            logger.warning("the run goes back to %d steps: checkpoints of more are put aside as %s in %s, for you to "
                           "delete", steps, ", ".join(abandoned), assets.parent)
        write_assets(assets, inputs)

    on_rank_0(write, assets)
    return assets


def write_assets(assets: Path, inputs: Inputs) -> None:
    """megatron_embed.json, the resolved config.yaml, and hf/ with files that say how this run pools and prompts.

    A resumed run takes its model's files from its checkpoint: those of model.path may be others by now.
    """
    make_marked(assets)
    config, task = inputs.config, inputs.task
    source = inputs.resume_state.checkpoint or task.model.checkpoint or task.model.path
    write_sidecar_files(source, assets, dtype=config.model.dtype, max_lengths={
        "query": config.data.max_length("query"), "document": config.data.max_length("document")},
        head=None if task.head is None else task.head.kind, adapters=adapters_of(config.lora, task.model),
        base=base_of_run(config, task.model))
    task.write_settings(assets / "hf")
    set_right_truncation(assets / "hf")
    save_resolved(config, assets / "config.yaml")
    (assets / DATA_FILE).write_text(json.dumps({
        **describe_rows(inputs.records, inputs.order), "files": data_stamps(config)}), encoding="utf-8")
