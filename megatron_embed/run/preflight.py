"""What a run reads and checks before its first collective, on every rank alike."""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_embed.config.evaluation import EvaluationSet
from megatron_embed.config.schema import RunConfig, TrainingConfig
from megatron_embed.data.dataset import RecordSet, hold_out, validation_shares
from megatron_embed.data.mixture import build_sampler
from megatron_embed.data.sampler import ORDER_VERSION, Sampler, steps_of_epochs
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.beir import BeirData, load_beir
from megatron_embed.evaluation.reranking import RerankData, load_rerank_file
from megatron_embed.evaluation.sts import StsData, load_sts
from megatron_embed.evaluation.suite import EvaluationSuite
from megatron_embed.export.embedding import stock_runs_causally
from megatron_embed.export.engines.limits import LIMITS, NAMES, ServedModel
from megatron_embed.loading.model_directory import ModelDirectory, adapters_of, find_model
from megatron_embed.loading.quantized import check_quantized_model
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.models.families import read_hf_config
from megatron_embed.models.layer_backend import check_layer_backend
from megatron_embed.names import EXPORT_PACKAGES, JOINT_SCORES, EngineName, FurtherExport
from megatron_embed.parallel.topology import check_batch_sizes, check_token_budget, check_world_size
from megatron_embed.platform.launcher import launched_rank
from megatron_embed.run.embedding_task import EmbeddingTask
from megatron_embed.run.rerank_task import RerankTask
from megatron_embed.run.resume_check import check_resumable, is_unchanged
from megatron_embed.run.run_directory import (
    data_stamps,
    known_rows,
    known_stamps,
    pending_exports,
    resume_state,
)
from megatron_embed.run.task import CompletedRun, Inputs, Task, is_complete
from megatron_embed.training.optimizer import check_optimizer

TASKS: dict[str, type[Task]] = {"embedding": EmbeddingTask, "reranker": RerankTask}
"""By the value of `task`."""

Set = TypeVar("Set", BeirData, StsData)


def read_inputs(config: RunConfig) -> Inputs:
    """Checks all that can be wrong with a run. No communication.

    Raises:
        UserError: with file, key, value and remedy.
    """
    if not config.data.train:
        raise ConfigError("data.train = []: training needs at least one file of rows; add `train: [FILE.jsonl]` under "
                          "data", key="data.train")
    model, state = find_model(config.model.path), resume_state(config)
    task = TASKS[config.task](config, model, state.checkpoint)
    config = task.config
    dp_size = check_layout(config, model)
    task.check_sizes()
    check_outputs(config)
    all_records = task.open()
    check_optimizer(config, has_adapters=adapters_of(config.lora, model) is not None,
                    has_tied_head=task.has_tied_head,
                    has_bias=model.shape.has_position_bias)
    known = known_rows(state.checkpoint)
    order = ORDER_VERSION if known is None else known["order"]
    records, validation = split_train_validation(config, all_records, dp_size, order)
    sampler = build_sampler(records, config.data, global_batch_size=config.training.global_batch_size,
                            seed=config.training.seed, order=order)
    steps = number_of_steps(config, sampler)
    check_schedule(config.training, steps)
    suite = open_suite(task)
    if state.checkpoint is not None:
        check_resumable(task, state.checkpoint, records, steps)
    inputs = Inputs(task=task, records=records, validation=validation, sampler=sampler, order=order, suite=suite,
                    train_steps=steps, resume_state=state)
    if not inputs.is_complete:
        check_exports(config, model, pending_exports(config, steps))
    return inputs


def completed_run(config: RunConfig) -> CompletedRun | None:
    """The run, if nothing is left to do, its configuration is what it was, and so are its files of rows by size and
    time; None otherwise: then `read_inputs` decides. Reads no row, and no communication.

    Raises:
        UserError: the model or a checkpoint cannot be read.
    """
    state = resume_state(config)
    known = known_rows(state.checkpoint)
    if state.checkpoint is None or known is None or not config.data.train:
        return None
    train_steps = config.training.train_steps or 1000
    if config.training.epochs is not None:
        train_steps = steps_of_epochs(config.training.epochs, known["rows"], config.training.global_batch_size)
    if not is_complete(config, state, train_steps):
        return None
    stamps = known_stamps(state.checkpoint)
    if stamps is None or stamps != data_stamps(config):
        return None
    task = TASKS[config.task](config, find_model(config.model.path), state.checkpoint)
    if not is_unchanged(task.config, state.checkpoint):
        return None
    return CompletedRun(resume_state=state, train_steps=train_steps)


def check_layout(config: RunConfig, model: ModelDirectory) -> int:
    """The data-parallel size. Raises ConfigError for sizes that do not fit the ranks, the batch or the model."""
    _, world_size, _ = launched_rank()
    dp_size = check_world_size(config.parallel, world_size)
    check_batch_sizes(config, dp_size)
    check_divisible(model.shape, config.parallel)
    check_quantized_model(config, model, has_adapters=adapters_of(config.lora, model) is not None)
    check_token_budget(config, documents=1)  # that much it must hold whatever the rows are
    attention_kernel(config, model.shape)
    check_layer_backend(config, model.shape)
    return dp_size


def check_schedule(training: TrainingConfig, train_steps: int) -> None:
    """Raises ConfigError if warmup and decay of the learning rate are longer than so many steps."""
    warmup, decay = training.warmup(train_steps), training.final_decay(train_steps)
    if warmup >= train_steps:
        key, value = ("warmup_ratio", training.warmup_ratio) if training.warmup_ratio else ("warmup_steps", warmup)
        raise ConfigError(f"training.{key} = {value}: the {warmup} steps of warmup must be fewer than the "
                          f"{train_steps} training steps", key=f"training.{key}")
    if warmup + decay > train_steps:
        raise ConfigError(f"training.wsd_decay_ratio = {training.wsd_decay_ratio}: {decay} steps of decay and {warmup} "
                          f"of warmup are more than the {train_steps} training steps; lower one of them",
                          key="training.wsd_decay_ratio")


def split_train_validation(config: RunConfig, records: RecordSet, dp_size: int,
                           order: int) -> tuple[RecordSet, RecordSet | None]:
    """The rows to train on, and those held out, if any, which the ranks can share."""
    if config.data.validation:
        count = len(config.data.train)
        trained, held = RecordSet(records.files[:count]), RecordSet(records.files[count:])
    else:
        trained, held = hold_out(records, config.data.validation_fraction, config.training.seed, order)
    if held is not None:
        validation_shares(held, global_batch_size=config.training.global_batch_size, dp_rank=0, dp_size=dp_size)
    return trained, held


def open_suite(task: Task) -> EvaluationSuite:
    """The evaluation sets, every text of which the tokenizer can take, and a metric to compare checkpoints by."""
    config, evaluation = task.config, task.config.evaluation
    suite = EvaluationSuite(
        retrieval=[with_overrides(load_beir(item.path, evaluation.split, drop_own_id=evaluation.drop_own_id), item)
                   for item in evaluation.retrieval],
        sts=[with_overrides(load_sts(item.path), item) for item in evaluation.sts],
        reranking=[load_rerank_file(file, "evaluation.reranking") for file in evaluation.reranking],
        dims=config.embedding.matryoshka_dims, precisions=config.embedding.precision,
        scores=JOINT_SCORES if config.embedding.head == "joint" else ())
    task.check_evaluations(suite)
    refuse_equal_names("evaluation.retrieval", suite.retrieval)
    refuse_equal_names("evaluation.sts", suite.sts)
    refuse_equal_names("evaluation.reranking", suite.reranking, remedy="name each file once, or rename one of them")
    suite.require_metric(evaluation.best_metric, task.metric_names if config.data.validates else ())
    return suite


def with_overrides(data: Set, item: EvaluationSet) -> Set:
    """The set with the instruction and the name of its entry in the configuration."""
    return dataclasses.replace(data, instruction=item.instruction, name=item.name or data.name)


def refuse_equal_names(key: str, sets: Sequence[BeirData | StsData | RerankData], *,
                       remedy: str = "give one another name: {path: ..., name: ...}") -> None:
    """Raises ConfigError where one set's metrics would hide another's."""
    names = [data.name for data in sets]
    for name in (name for name in names if names.count(name) > 1):
        raise ConfigError(f"{key} = {names}: two sets are called {name!r}; {remedy}", key=key)


def require_writable(key: str, directory: str) -> None:
    """Makes the directory and tries a file in it. Raises ConfigError naming the key."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError(f"{key} = {directory!r}: cannot be written ({error.strerror}); choose a directory that "
                          "can", key=key) from error


def check_outputs(config: RunConfig) -> None:
    """Raises ConfigError unless checkpoints and metrics can be written, and a run that is to be resumed saves some."""
    minutes = config.training.exit_duration_minutes
    if minutes is not None and config.checkpoint.directory is None:
        raise ConfigError(f"training.exit_duration_minutes = {minutes:g}: the run could not be resumed; set "
                          "checkpoint.directory", key="training.exit_duration_minutes")
    if config.logging.wandb and config.log_directory is None:
        raise ConfigError("logging.wandb = True: the run has no directory; set logging.directory", key="logging.wandb")
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb = True: the package wandb is not installed; pip install wandb, or set it to "
                          "false", key="logging.wandb")
    for key, directory in output_directories(config).items():
        require_writable(key, directory)


def check_exports(config: RunConfig, model: ModelDirectory, pending: Mapping[FurtherExport | None, str]) -> None:
    """Raises ConfigError if a directory that the run exports to, by format, is taken, or its library or engine does not
    run such a model."""
    for kind, directory in pending.items():
        key = "checkpoint.export_at_end" if kind is None else "checkpoint.export_formats"
        _check_export_directory(config, key, directory)
        if kind is not None:
            _check_format(config, model, kind)
    if pending and stock_runs_causally(model.shape, config.model.bidirectional):
        raise ConfigError(f"checkpoint.export_at_end = {config.checkpoint.export_at_end!r}: Sentence Transformers runs "
                          f"{model.shape.family} models causally on transformers before 5.2, so a bidirectional one "
                          "differs there; upgrade it, or set it to null", key="checkpoint.export_at_end")


def _check_export_directory(config: RunConfig, key: str, name: str) -> None:
    target, directory = Path(name), Path(config.checkpoint.directory or ".")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{key} = {name!r}: exists already, and not as the export of this run's "
                          f"{config.checkpoint.export} step; remove it or choose another name", key=key)
    if target.resolve() == directory.resolve() or directory.resolve() in target.resolve().parents:
        raise ConfigError(f"{key} = {name!r}: lies in checkpoint.directory, whose folders come and go; choose a "
                          "directory beside it", key=key)
    require_writable(key, str(target.parent))


def _check_format(config: RunConfig, model: ModelDirectory, kind: FurtherExport) -> None:
    """Raises ConfigError if the format's packages are missing, or its engine has no such model."""
    key = "checkpoint.export_formats"
    for package in EXPORT_PACKAGES[kind.partition("-")[0]]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} = {kind!r}: the package {package} is not installed; pip install "
                              "'megatron_embed[export]', or remove the format", key=key)
    engine: EngineName = "llama.cpp" if kind.startswith("gguf") else "onnxruntime"
    if config.task == "embedding":
        served = ServedModel(
            architecture=str((read_hf_config(model.hf).get("architectures") or [""])[0]), shape=model.shape,
            saved=model.saved, pooling=model.pooling(config.embedding.pooling), reranker=None)
        lacks = [limit.cannot for limit in LIMITS[engine] if limit.concerns(served)]
        if engine == "llama.cpp" and not config.embedding.unit_length:
            lacks.append("always returns vectors of unit length")
        for cannot in lacks:
            raise ConfigError(f"{key} = {kind!r}: {NAMES[engine]} {cannot}; take another format, or remove it", key=key)


def number_of_steps(config: RunConfig, sampler: Sampler) -> int:
    """`train_steps`, or the steps of `epochs` passes over the rows, or 1000.

    Raises:
        ConfigError: there are not rows for so many.
    """
    steps = config.training.train_steps or 1000
    if config.training.epochs is not None:
        steps = sampler.steps_of_epochs(config.training.epochs)
    if sampler.num_steps is not None and steps > sampler.num_steps:
        raise ConfigError(f"data.train.max_epochs: every data set has one, and together they have rows for "
                          f"{sampler.num_steps} steps, fewer than the {steps} of the run; remove it from one of them, "
                          "or train for fewer steps", key="data.train.max_epochs")
    return steps


def output_directories(config: RunConfig) -> dict[str, str]:
    """The directories that the run writes, each once, by the key that names it."""
    directories = {"checkpoint.directory": config.checkpoint.directory, "logging.directory": config.logging.directory}
    distinct: dict[str, str] = {}
    for key, directory in directories.items():
        others = [Path(other).resolve() for other in distinct.values()]
        if directory is not None and Path(directory).resolve() not in others:
            distinct[key] = directory
    return distinct
