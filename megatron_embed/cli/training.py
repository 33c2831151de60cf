"""Builds a run in order (topology, data, model, objective, optimizer, loop) and carries it out."""

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_embed.batch import EmbedBatch
from megatron_embed.checkpoint.files import remove_unfinished
from megatron_embed.checkpoint.lock import sole_writer
from megatron_embed.checkpoint.state import TrainingState, load_checkpoint, on_rank_0, save_checkpoint
from megatron_embed.cli.export import PROBES, export_model, write_settings
from megatron_embed.cli.inputs import Inputs, log_directory, output_directories, read_inputs
from megatron_embed.cli.model import blaming, load_model_chunks
from megatron_embed.cli.resume import DATA_FILE, Standing, describe_rows, moved_on, record_export
from megatron_embed.config.load import save_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.layout import write_companions
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.prompts import Role, RoleTokenizer
from megatron_embed.data.records import RecordSet
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.parallel.collectives import raise_first, smallest
from megatron_embed.parallel.topology import Topology, initialize, token_alignment
from megatron_embed.training.agreement import agree_on_bins
from megatron_embed.training.build import build_objective
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.loop import Hooks, train
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_embed.training.step import Trainer

logger = logging.getLogger(__name__)

NUM_EXPORT_TEXTS = 64
"""Training texts on which an export is compared with the model in memory."""


def run_training(config: RunConfig) -> dict[str, float]:
    """A whole run, resumed if `checkpoint.directory` holds a checkpoint. Returns the last step's metrics.

    Empty where there was no step left; a run that is complete, its export included, touches nothing.
    """
    inputs = read_inputs(config)
    topology = initialize(config.parallel)
    if smallest(int(inputs.nothing_left(config))):  # Agreed: the disk may answer one rank sooner than another.
        logger.info("%s has %d steps of %d: the run is complete%s; nothing to do", inputs.standing.checkpoint,
                    inputs.standing.steps, inputs.train_steps,
                    f" and {config.checkpoint.export_at_end} is its export" if config.checkpoint.export_at_end else "")
        return {}
    with contextlib.ExitStack() as locks:
        for key, directory in output_directories(config).items():
            locks.enter_context(sole_writer(key, directory))
        raise_first(moved_on(config, inputs.standing))
        return carry_out(config, inputs, topology)


def carry_out(config: RunConfig, inputs: Inputs, topology: Topology) -> dict[str, float]:
    """The run itself, from the newest checkpoint on. Called by all ranks; returns the last step's metrics."""
    with blaming("model.path", config.model.path):
        models = load_model_chunks(inputs.model, config, topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    scheduler = build_scheduler(optimizer, config.training, inputs.train_steps)
    state = TrainingState(models=models, optimizer=optimizer, scheduler=scheduler)
    first_step = resume(inputs.standing, state)
    pooling, kernel = inputs.model.pooling(config.embedding.pooling), attention_kernel(config)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology,
                          objective=build_objective(config, topology.dp_group), kernel=kernel,
                          has_dropout=config.training.hidden_dropout > 0 or config.training.attention_dropout > 0)
    trainer = Trainer(chunks=wrapped, gradients=gradients, optimizer=optimizer, scheduler=scheduler)
    encoder = TextEncoder(wrapped, topology, inputs.tokenizer, pooling=pooling, dim=inputs.model.shape.hidden_size,
                          kernel=kernel, causal=models[0].causal)
    assets = prepare_assets(config, inputs)
    writer = MetricsWriter(log_directory(config), tensorboard=config.logging.tensorboard,
                           train_steps=inputs.train_steps, first_step=first_step, active=topology.rank == 0)
    loader = BatchLoader(
        inputs.records, inputs.sampler, inputs.tokenizer, dp_rank=topology.dp_rank, dp_size=topology.dp_size,
        micro_batch_size=config.training.micro_batch_size, num_negatives=config.data.num_negatives,
        alignment=token_alignment(config.parallel), constant_tokens=topology.pp_size > 1,
        micro_batch_tokens=config.training.micro_batch_tokens,
        whole_groups=not config.objective.couples_batch)

    def evaluate() -> dict[str, float]:
        return evaluate_all(inputs.retrieval, encoder, "cosine" if config.embedding.normalize else "dot")

    def save(step: int, last: bool) -> None:
        assert config.checkpoint.directory is not None and assets is not None
        save_checkpoint(config.checkpoint.directory, step, state, assets=assets, keep=config.checkpoint.keep)

    def agree(batch: EmbedBatch) -> EmbedBatch:
        return agree_on_bins(batch, topology, whole_groups=not config.objective.couples_batch)

    hooks = Hooks(load_batch=loader.batch, agree=None if config.training.micro_batch_tokens is None else agree,
                  evaluate=evaluate if inputs.retrieval else None,
                  save=save if config.checkpoint.directory is not None else None)
    for model in models:
        model.train()
    with loader:
        metrics = train(config, trainer, hooks, writer, topology, first_step=first_step, train_steps=inputs.train_steps)
    if config.checkpoint.export_at_end is not None:
        export_at_end(config, inputs, encoder, max(first_step, inputs.train_steps))
    return metrics


def export_at_end(config: RunConfig, inputs: Inputs, encoder: TextEncoder, steps: int) -> None:
    """Makes the export of the newest checkpoint, which has `steps` optimizer steps. Called by all ranks."""
    directory, target = config.checkpoint.directory, config.checkpoint.export_at_end
    assert directory is not None and target is not None
    export_model(directory, target, encoder, comparable_texts(inputs.records, inputs.tokenizer), config.model.dtype,
                 note=functools.partial(record_export, directory, target, steps))


def comparable_texts(records: RecordSet, tokenizer: RoleTokenizer) -> list[str]:
    """Training texts that neither role cuts: Sentence Transformers knows one maximum length, we know one per role."""
    roles: tuple[Role, ...] = ("query", "document")
    some = [records[number] for number in range(min(len(records), NUM_EXPORT_TEXTS))]
    texts = [*(record.query for record in some), *(text for texts in PROBES.values() for text in texts)]
    return [text for text in texts if not any(tokenizer.tokenize([text], role).num_truncated for role in roles)]


def evaluate_all(sets: Sequence[BeirData], encoder: TextEncoder,
                 similarity: Literal["cosine", "dot"]) -> dict[str, float]:
    """Retrieval metrics of every set, prefixed by its name where there are several. Called by all ranks."""
    results: dict[str, float] = {}
    for data in sets:
        metrics = evaluate_retrieval(encoder.encode, data, similarity=similarity)
        results.update(metrics if len(sets) == 1 else {f"{data.name}/{key}": value for key, value in metrics.items()})
    return results


def resume(standing: Standing, state: TrainingState) -> int:
    """Loads the newest checkpoint, if any. Returns the optimizer steps it has done (0 without one)."""
    if standing.checkpoint is None:
        return 0
    step = load_checkpoint(standing.checkpoint, state)
    logger.info("resumed %s after %d steps", standing.checkpoint, step)
    return step


def prepare_assets(config: RunConfig, inputs: Inputs) -> Path | None:
    """Rank 0 lays the files that every checkpoint carries beside its tensors; written anew at each start."""
    if config.checkpoint.directory is None:
        return None
    assets = Path(config.checkpoint.directory) / ".assets"

    def write() -> None:
        remove_unfinished(assets.parent)
        write_assets(assets, config, inputs)

    on_rank_0(write, assets)
    return assets


def write_assets(assets: Path, config: RunConfig, inputs: Inputs) -> None:
    """megatron_embed.json, the resolved config.yaml, and hf/ with files that say how this run pools and prompts.

    A resumed run takes its model's files from its checkpoint: those of model.path may be others by now.
    """
    shutil.rmtree(assets, ignore_errors=True)
    assets.mkdir(parents=True)
    source = inputs.standing.checkpoint or inputs.model.checkpoint or inputs.model.path
    write_companions(source, assets, dtype=config.model.dtype, max_lengths={
        "query": config.data.query_max_length, "document": config.data.document_max_length})
    with blaming("model.path", config.model.path):
        write_settings(assets / "hf", config, inputs.model)
    save_resolved(config, assets / "config.yaml")
    (assets / DATA_FILE).write_text(json.dumps(describe_rows(inputs.records)), encoding="utf-8")
