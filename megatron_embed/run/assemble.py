"""Builds a run in order (topology, data, model, objective, optimizer, loop) and carries it out."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import make_marked, remove_unfinished, set_aside_after
from megatron_embed.checkpoint.lock import directory_lock
from megatron_embed.checkpoint.save import Saver, on_rank_0
from megatron_embed.checkpoint.state import TrainingState, load_checkpoint, load_model
from megatron_embed.config.load import save_resolved, to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import write_sidecar_files
from megatron_embed.data.dataset import validation_shares
from megatron_embed.evaluation.suite import best_metric
from megatron_embed.export.embedding import write_settings
from megatron_embed.export.sentence_transformers import cut_on_the_right
from megatron_embed.loading.model_directory import adapters_of, error_context, load_model_chunks
from megatron_embed.loading.reranker import load_reranker_chunks
from megatron_embed.models.auto_dtype import resolve_dtype
from megatron_embed.models.encoder import EmbeddingModel, attention_kernel
from megatron_embed.models.reranker_settings import RERANKER_FILE, write_reranker_settings
from megatron_embed.objectives.build import build_objective
from megatron_embed.parallel.collectives import raise_on_all_ranks, smallest
from megatron_embed.parallel.heartbeat import monitor_ranks
from megatron_embed.parallel.lost_rank import abort
from megatron_embed.parallel.topology import Topology, initialize
from megatron_embed.platform.stop_signal import finishing
from megatron_embed.run.preflight import Inputs, log_directory, output_directories, read_inputs
from megatron_embed.run.resume import (
    DATA_FILE,
    Standing,
    best_checkpoint,
    changed_since_check,
    describe_rows,
    standing,
    with_known_dtype,
)
from megatron_embed.run.task import Task, embedding_task, reranker_task
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.health import Health
from megatron_embed.training.loop import Hooks, train
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_embed.training.step import Trainer
from megatron_embed.training.stopping import StopRequest
from megatron_embed.training.validation import Validation

logger = logging.getLogger(__name__)

def run_training(config: RunConfig) -> dict[str, float]:
    """A whole run, resumed if `checkpoint.directory` holds a checkpoint. Returns the last step's metrics.

    Empty where there was no step left; a run that is complete, its export included, touches nothing.

    Raises:
        PreemptedError: a signal or the time budget ended the run, once its state was saved.
        LostRankError: another rank is gone.
    """
    stop = StopRequest(config.training.exit_duration_minutes)
    inputs = read_inputs(config)
    config = inputs.config
    topology = initialize(config.parallel)
    with monitor_ranks(topology, abort):
        config = resolve_dtype(with_known_dtype(config, inputs.standing.checkpoint))
        return guarded_run(config, inputs, topology, stop)


def guarded_run(config: RunConfig, inputs: Inputs, topology: Topology, stop: StopRequest) -> dict[str, float]:
    """The run, unless it is complete, as the sole writer of its directories."""
    if smallest(int(inputs.is_complete(config))):  # Agreed: the disk may answer one rank sooner than another.
        logger.info("%s has %d steps of %d%s: the run is complete%s; nothing to do", inputs.standing.checkpoint,
                    inputs.standing.steps, inputs.train_steps,
                    " and evaluation.patience ended it" if inputs.standing.ended_early else "",
                    f" and {config.checkpoint.export_at_end} is its export" if config.checkpoint.export_at_end else "")
        return {}
    with contextlib.ExitStack() as locks:
        for key, directory in output_directories(config).items():
            locks.enter_context(directory_lock(key, directory))
        raise_on_all_ranks(changed_since_check(config, inputs.standing))
        return run_training_task(config, inputs, topology, stop)


def run_training_task(config: RunConfig, inputs: Inputs, topology: Topology, stop: StopRequest) -> dict[str, float]:
    """The run itself, from the newest checkpoint on. Called by all ranks; returns the last step's metrics."""
    models = load_models(config, inputs, topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    scheduler = build_scheduler(optimizer, config.training, inputs.train_steps)
    objective = build_objective(config, topology.dp_group, topology.device, topology.model_parallel_groups)
    state = TrainingState(models=models, optimizer=optimizer, scheduler=scheduler, learned=objective.learned)
    first_step = resume(inputs.standing, state)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology, objective=objective,
                          kernel=attention_kernel(config), has_dropout=has_dropout(config))
    trainer = Trainer(chunks=wrapped, gradients=gradients, optimizer=optimizer, scheduler=scheduler)
    build_task = reranker_task if config.task == "reranker" else embedding_task
    task = build_task(config, inputs, topology, models, wrapped)
    assets = prepare_assets(config, inputs)
    best = best_checkpoint(config, first_step)
    writer = MetricsWriter(log_directory(config), tensorboard=config.logging.tensorboard,
                           train_steps=inputs.last_step, first_step=first_step, active=topology.rank == 0,
                           wandb_settings=to_dict(config) if config.logging.wandb else None,
                           main_metric=best_metric(config))
    saver = None
    if config.checkpoint.directory is not None and assets is not None:
        saver = Saver(config.checkpoint.directory, state, assets=assets, keep=config.checkpoint.keep,
                      background=config.checkpoint.async_save, on_complete=None if best is None else best.mark)
    hooks = Hooks(load_batch=task.loader.batch,
                  agree=None if config.training.micro_batch_tokens is None else task.agree,
                  evaluate=evaluation_of(config, inputs, topology, gradients, task),
                  is_best=None if best is None else best.improves,
                  is_over=lambda: best is not None and best.is_over, saver=saver, stop=stop)
    health = Health(config, functools.partial(sources_of_step, inputs), log_directory(config),
                    active=topology.rank == 0)
    for model in models:
        model.train()
    # Without checkpoints there is nothing to finish: the ranks then leave at once.
    with task.loader, contextlib.nullcontext() if saver is None else finishing():
        metrics = train(config, trainer, hooks, writer, topology, health, first_step=first_step,
                        train_steps=inputs.last_step, evaluation_owed=inputs.standing.evaluation_owed)
    if metrics and task.show is not None:
        task.show()
    if config.checkpoint.export_at_end is not None:
        steps = standing(config).steps
        task.export(checkpoint_to_export(config, best, models, steps), steps)
    return metrics


def checkpoint_to_export(config: RunConfig, best: BestCheckpoint | None, models: Sequence[EmbeddingModel],
                         steps: int) -> str:
    """The checkpoint that `checkpoint.export` names, whose weights the model now holds. Called by all ranks.

    `steps`: of the newest checkpoint, whose weights it holds before.
    """
    if config.checkpoint.export == "last" or best is None:
        return config.checkpoint.directory or ""
    checkpoint, best_step = best.checkpoint
    logger.info("the export is of %s", checkpoint)
    if best_step != steps:
        load_model(checkpoint, models)
    return str(checkpoint)


def evaluation_of(config: RunConfig, inputs: Inputs, topology: Topology, gradients: GradCache[Any],
                  task: Task) -> Callable[[], dict[str, float]] | None:
    """The task's evaluation, with the objective over the rows that are held out; null where there is neither.

    Called by all ranks.
    """
    records = inputs.validation
    if records is None:
        return task.evaluate
    shares = validation_shares(records, global_batch_size=config.training.global_batch_size, dp_rank=topology.dp_rank,
                               dp_size=topology.dp_size)
    validation = Validation(gradients, [functools.partial(task.loader.build, records, rows, 0) for rows in shares],
                            task.agree_on_shares)
    logger.info("%d rows are held out for validation, %d are trained on", len(records), len(inputs.records))

    def evaluate() -> dict[str, float]:
        return {**validation(), **({} if task.evaluate is None else task.evaluate())}

    return evaluate


def load_models(config: RunConfig, inputs: Inputs, topology: Topology) -> list[EmbeddingModel]:
    """This rank's model chunks with their weights, a reranker's with its head."""
    with error_context("model.path", config.model.path):
        if inputs.head is None:
            return load_model_chunks(inputs.model, config, topology)
        return load_reranker_chunks(inputs.model, config, topology, inputs.head)


def has_dropout(config: RunConfig) -> bool:
    """Whether anything in the model draws random numbers in a step."""
    training = config.training
    return training.hidden_dropout > 0 or training.attention_dropout > 0 or config.lora.dropout > 0


def sources_of_step(inputs: Inputs, step: int) -> list[str]:
    """FILE:LINE of every row of a step, from 0."""
    return [inputs.records[row].source for row in inputs.sampler.rows_of_step(step)]


def resume(standing: Standing, state: TrainingState) -> int:
    """Loads the newest checkpoint, if any. Returns the optimizer steps it has done (0 without one)."""
    if standing.checkpoint is None:
        return 0
    step = load_checkpoint(standing.checkpoint, state)
    logger.info("resumed %s after %d steps", standing.checkpoint, step)
    return step


def prepare_assets(config: RunConfig, inputs: Inputs) -> Path | None:
    """Rank 0 lays the files that every checkpoint carries beside its tensors; written anew at each start. Checkpoints
    that the run leaves behind, because it goes back to one before them, are put aside."""
    if config.checkpoint.directory is None:
        return None
    assets = Path(config.checkpoint.directory) / ".assets"

    def write() -> None:
        remove_unfinished(assets.parent)
        abandoned = set_aside_after(assets.parent, inputs.standing.steps)
        if abandoned:
            logger.warning("the run goes back to %d steps: checkpoints of more are put aside as %s in %s, for you to "
                           "delete", inputs.standing.steps, ", ".join(abandoned), assets.parent)
        write_assets(assets, config, inputs)

    on_rank_0(write, assets)
    return assets


def write_assets(assets: Path, config: RunConfig, inputs: Inputs) -> None:
    """megatron_embed.json, the resolved config.yaml, and hf/ with files that say how this run pools and prompts.

    A resumed run takes its model's files from its checkpoint: those of model.path may be others by now.
    """
    make_marked(assets)
    source = inputs.standing.checkpoint or inputs.model.checkpoint or inputs.model.path
    write_sidecar_files(source, assets, dtype=config.model.dtype, max_lengths={
        "query": config.data.max_length("query"), "document": config.data.max_length("document")},
        head=None if inputs.head is None else inputs.head.kind,
        adapters=adapters_of(config.lora, inputs.model))
    if inputs.settings is not None:
        write_reranker_settings(assets / "hf", inputs.settings)
    else:
        (assets / "hf" / RERANKER_FILE).unlink(missing_ok=True)
        with error_context("model.path", config.model.path):
            write_settings(assets / "hf", config, inputs.model)
    cut_on_the_right(assets / "hf")
    save_resolved(config, assets / "config.yaml")
    (assets / DATA_FILE).write_text(json.dumps(describe_rows(inputs.records)), encoding="utf-8")
