"""What a run says of itself: before its first step, and after its last."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_embed import __version__
from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import BEST
from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.evaluation.suite import best_metric
from megatron_embed.export.model_card import evaluation_after
from megatron_embed.loading.model_directory import ModelDirectory, adapters_of
from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.layouts import describe
from megatron_embed.planning.memory import grid_of
from megatron_embed.planning.parameters import Held, held_parameters
from megatron_embed.platform.bf16_support import has_native_bf16
from megatron_embed.platform.compat import MEGATRON_VERSION
from megatron_embed.platform.doctor import cpu_features
from megatron_embed.platform.launcher import launched_rank
from megatron_embed.platform.terminal_text import counted
from megatron_embed.run.preflight import output_directories, read_inputs
from megatron_embed.run.task import Inputs
from megatron_embed.training.progress import duration

WIDTH = 9
"""Columns of the words at the beginning of the lines."""


def dry_run(config: RunConfig) -> str:
    """The introduction of the run that would start, after all checks that come before its first collective.

    Loads no weights and leaves no directory behind. Called by one rank: another one might need what is removed.

    Raises:
        UserError: the error that would end the run.
    """
    wanted = [*output_directories(config).values()]
    wanted += [str(Path(directory).parent) for directory in config.checkpoint.exports.values()]
    new = {folder for path in map(Path, wanted) for folder in (path, *path.parents) if not folder.exists()}
    try:
        inputs = read_inputs(config)
    finally:
        for folder in sorted(new, key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # something was put there meanwhile
                folder.rmdir()
    text = introduction(inputs, launched_rank()[1])
    return f"{text}\nthe run is complete: there is nothing to do" if inputs.is_complete else text


def introduction(inputs: Inputs, ranks: int) -> str:
    """The run in lines of text: versions, device, model, layout, batch, rows, steps, lengths, evaluations, files.

    No communication, no weights.
    """
    config = inputs.config
    lines = {"device": _device(ranks), "model": _model(inputs), "layout": _layout(config, ranks),
             "batch": _batch(config, ranks), "rows": _rows(inputs), "steps": _steps(inputs),
             "lengths": inputs.task.lengths, "evaluates": _evaluations(inputs), "writes": _writes(config)}
    versions = f"megatron_embed {__version__}, Megatron-Core {MEGATRON_VERSION}, PyTorch {torch.__version__}"
    return "\n".join([f"task {config.task}; {versions}", *(f"{name:<{WIDTH}} {text}" for name, text in lines.items())])


def summary(inputs: Inputs, metrics: Mapping[str, float], best: BestCheckpoint | None, *, seconds: float) -> str:
    """The end of a run in lines of text: its last step, the best checkpoint, the export, and how to use the model.

    Args:
        metrics: of the last step; empty if there was none left, but an evaluation or the export.
        seconds: since this start began.
    """
    config = inputs.config
    end = f"loss {metrics['loss']:.4f} in the last step" if metrics else "no step was left"
    lines = [f"finished in {duration(seconds)}: {end}"]
    if best is not None and best.so_far is not None:
        metric, step, value = best.so_far
        before = evaluation_after(config, 0).get(metric)
        lines.append(f"{'best':<{WIDTH}} {config.checkpoint.directory}/{BEST} (step {step}): {metric} {value:.4f}"
                     + ("" if before is None else f"; before training {before:.4f}"))
    if config.checkpoint.export_at_end is not None:
        lines.append(f"{'export':<{WIDTH}} {', '.join(config.checkpoint.exports.values())}, of the "
                     f"{config.checkpoint.export} checkpoint")
    directory = config.checkpoint.export_at_end or (
        config.checkpoint.directory if best is None or best.so_far is None else f"{config.checkpoint.directory}/{BEST}")
    if directory is None:
        return "\n".join([*lines, "no checkpoint was saved: checkpoint.directory is not set"])
    return "\n".join([*lines, "use it: import megatron_embed", f"  model = megatron_embed.load({directory!r})",
                      f"  {inputs.task.example}"])


def count_parameters(inputs: Inputs) -> Held:
    """Parameters of the whole model, frozen and trained, its adapters and head included."""
    config, model, head = inputs.config, inputs.task.model, inputs.task.head
    adapters = adapters_of(config.lora, model)
    config = dataclasses.replace(config, parallel=ParallelConfig())
    if head is not None:
        config = dataclasses.replace(config, reranker=dataclasses.replace(config.reranker, head=head.kind))
    if adapters is None:
        return held_parameters(config, model.shape, 0)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=adapters.rank,
                                                                  target_modules=adapters.modules))
    return held_parameters(config, model.shape, 0, adapted_linears(config, model.shape))


def _device(ranks: int) -> str:
    if torch.cuda.is_available():
        return f"{counted(ranks, 'rank')}, {torch.cuda.get_device_name()}"
    threads = counted(torch.get_num_threads(), "thread")
    return f"{counted(ranks, 'rank')} on the CPU ({cpu_features()[1]}), {threads} each"


def _model(inputs: Inputs) -> str:
    config, model, held = inputs.config, inputs.task.model, count_parameters(inputs)
    trained = "all trained"
    if held.frozen.total:
        trained = f"{held.trained.total:,} trained ({held.trained.total / held.total:.2%}) by adapters"
    head = inputs.task.head
    if held.frozen.total and head is not None and head.kind == "score":
        trained += " and in the head"
    output = _output(config, model) if head is None else f"head {head.kind}"
    dtype = str(config.model.dtype)
    if dtype == "auto":  # resolved by all ranks together once they have met
        dtype += ", here bfloat16" if has_native_bf16() else ", here float32"
    layers = f"{counted(model.shape.num_layers, 'layer')} of {model.shape.hidden_size}"
    return (f"{config.model.path}: {model.shape.family}, {layers}, {output}; "
            f"{held.total:,} parameters, {trained}; dtype {dtype}")


def _output(config: RunConfig, model: ModelDirectory) -> str:
    """The pooling and the Dense layers, in words."""
    dense = model.dense(config.embedding)
    sizes = [dense[0].in_features, *(settings.out_features for settings in dense)] if dense else []
    return f"pooling {model.pooling(config.embedding.pooling)}" + (
        f", Dense {' -> '.join(map(str, sizes))}" if sizes else "")


def _layout(config: RunConfig, ranks: int) -> str:
    return f"{describe(config.parallel)}; {counted(grid_of(config, ranks).dp, 'data-parallel rank')}"


def _batch(config: RunConfig, ranks: int) -> str:
    training, dp = config.training, grid_of(config, ranks).dp
    if training.micro_batch_tokens is not None:
        parts = f"micro-batches of up to {training.micro_batch_tokens:,} tokens"
    else:
        count = training.global_batch_size // (training.micro_batch_size * dp)
        queries = counted(training.micro_batch_size, "query", "queries")
        parts = f"{counted(count, 'micro-batch', 'micro-batches')} x {queries} x {counted(dp, 'data-parallel rank')}"
    most = config.data.num_negatives
    negatives = f"up to {counted(most, 'hard negative')} per query" if most else "no hard negatives"
    if config.workload.rows == "rerank" and not most:
        negatives = "all documents of a row"
    queries = counted(training.global_batch_size, "query", "queries")
    return f"{queries} per step = {parts}; {negatives}, loss {config.objective.loss}"


def _rows(inputs: Inputs) -> str:
    held_out = "" if inputs.validation is None else f", {len(inputs.validation):,} held out"
    ignored = ""
    if inputs.config.workload.rows == "contrastive" and not inputs.config.data.num_negatives:
        most = inputs.records.most_negatives
        ignored = f"; data.num_negatives is 0, so the negatives of rows (up to {most}) are not used" if most else ""
    return f"{len(inputs.records):,} to train on{held_out}{ignored}"


def _steps(inputs: Inputs) -> str:
    training, steps, per_epoch = inputs.config.training, inputs.train_steps, inputs.sampler.steps_per_epoch
    done = f", of which {inputs.resume_state.steps} are done" if inputs.resume_state.steps else ""
    return (f"{steps}{done} = {steps / per_epoch:.4g} epochs of {per_epoch:.4g} steps; learning rate "
            f"{training.learning_rate:g}, {training.lr_decay_style}, "
            f"{counted(training.warmup(steps), 'step')} of warmup")


def _evaluations(inputs: Inputs) -> str:
    config, suite = inputs.config, inputs.suite
    sets = [*(f"{data.name} ({counted(len(data.query_ids), 'query', 'queries')}, "
              f"{counted(len(data.document_ids), 'document')})" for data in suite.retrieval),
            *(f"{data.name} ({counted(len(data.scores), 'pair')})" for data in suite.sts),
            *(f"{data.name} ({counted(len(data.lists), 'list')})" for data in suite.reranking)]
    if inputs.validation is not None:
        sets.append(counted(len(inputs.validation), "held-out row"))
    if not sets:
        return "nothing: evaluation and data.validation_fraction are not set"
    start = ", before the first" if config.evaluation.at_start and not inputs.resume_state.steps else ""
    return f"{', '.join(sets)}; every {counted(config.evaluation.every_steps, 'step')}{start} and after the last"


def _writes(config: RunConfig) -> str:
    checkpoint, files = config.checkpoint, []
    if checkpoint.directory is not None:
        period = (counted(checkpoint.save_every_steps, "step") if checkpoint.save_every_epochs is None else
                  counted(checkpoint.save_every_epochs, "epoch"))
        newest = f"the newest {checkpoint.keep}" if checkpoint.keep else "all"
        if checkpoint.keep_every_steps is not None:
            newest += f", every {counted(checkpoint.keep_every_steps, 'step')}"
        best = f" and the best by {best_metric(config)}" if config.keeps_best else ""
        files.append(f"{checkpoint.directory} (a checkpoint every {period}; {newest}{best} are kept)")
    if config.log_directory is not None:
        files.append(str(Path(config.log_directory) / "metrics.jsonl"))
        files += [str(Path(config.log_directory) / "tensorboard")] if config.logging.tensorboard else []
    if checkpoint.export_at_end is not None:
        what = "the exports" if checkpoint.export_formats else "the export"
        files.append(f"{', '.join(checkpoint.exports.values())} ({what}, at the end)")
    return ", ".join(files) or "nothing: checkpoint.directory and logging.directory are not set"
