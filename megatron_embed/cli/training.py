"""Builds a run in order (topology, data, model, objective, optimizer, loop) and carries it out."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_embed.batch import EmbedBatch
from megatron_embed.checkpoint.files import latest_checkpoint, remove_unfinished
from megatron_embed.checkpoint.state import TrainingState, load_checkpoint, save_checkpoint
from megatron_embed.cli.export import PROBES, export_model, write_settings
from megatron_embed.cli.model import ModelDirectory, find_model, load_model_chunks
from megatron_embed.config.load import save_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.layout import write_companions
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.prompts import Role, RoleTokenizer
from megatron_embed.data.records import RecordSet, open_records
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.data.tokenless import refuse_tokenless_rows
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.beir import BeirData, load_beir, refuse_tokenless_texts
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.models.backbone import check_divisible
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.parallel.topology import (
    Topology,
    check_batch_sizes,
    check_token_budget,
    check_world_size,
    initialize,
    launched_rank,
    token_alignment,
)
from megatron_embed.training.agreement import agree_on_bins
from megatron_embed.training.grad_cache import GradCache
from megatron_embed.training.loop import Hooks, train
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.objective import Objective
from megatron_embed.training.optimizer import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_embed.training.step import Trainer

logger = logging.getLogger(__name__)

NUM_EXPORT_TEXTS = 64
"""Training texts on which an export is compared with the model in memory."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read and checked before the first collective, on every rank alike."""

    model: ModelDirectory
    records: RecordSet
    tokenizer: RoleTokenizer
    sampler: GlobalBatchSampler
    retrieval: Sequence[BeirData]
    train_steps: int


def require_writable(key: str, directory: str) -> None:
    """Makes the directory and tries a file in it. Raises ConfigError naming the key."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{key} = {directory!r}: cannot be written ({error.strerror}); choose a directory that "
                          "can") from error


def read_inputs(config: RunConfig) -> Inputs:
    """Checks all that can be wrong with a run. No communication.

    Raises:
        UserError: with file, key, value and remedy.
    """
    if not config.data.train:
        raise ConfigError("data.train = []: training needs at least one file of rows; add `train: [FILE.jsonl]` under "
                          "data")
    model = find_model(config.model.path)
    _, world_size, _ = launched_rank()
    check_batch_sizes(config, check_world_size(config.parallel, world_size))
    check_divisible(model.shape, config.parallel)
    check_token_budget(config)
    attention_kernel(config)
    for role, length in (("query", config.data.query_max_length), ("document", config.data.document_max_length)):
        if length > model.shape.max_position_embeddings:
            raise ConfigError(f"data.{role}_max_length = {length} is longer than the model's "
                              f"{model.shape.max_position_embeddings} positions; lower it to that or less")
    for key, directory in (("checkpoint.directory", config.checkpoint.directory),
                           ("logging.directory", log_directory(config))):
        if directory is not None:
            require_writable(key, directory)
    if config.checkpoint.export_at_end is not None:
        target = Path(config.checkpoint.export_at_end)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: exists already; remove it or choose "
                              "another name")
        directory = Path(config.checkpoint.directory or ".")
        if target.resolve() == directory.resolve() or directory.resolve() in target.resolve().parents:
            raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: lies in checkpoint.directory, whose "
                              "folders come and go; choose a directory beside it")
        require_writable("checkpoint.export_at_end", str(target.parent))
        if config.model.bidirectional and not model.shape.bidirectional:
            raise ConfigError(f"checkpoint.export_at_end = {str(target)!r}: Sentence Transformers runs "
                              f"{model.shape.family} models causally, so a bidirectional one differs there; set it to "
                              "null")
    tokenizer = RoleTokenizer(
        str(model.hf), add_eos=model.pooling(config.embedding.pooling) == "lasttoken",
        query_prompt=config.data.query_prompt, document_prompt=config.data.document_prompt,
        query_max_length=config.data.query_max_length, document_max_length=config.data.document_max_length)
    if tokenizer.needs_instructions and (config.evaluation.retrieval or config.checkpoint.export_at_end):
        key = "evaluation.retrieval" if config.evaluation.retrieval else "checkpoint.export_at_end"
        raise ConfigError(f"data.query_prompt = {config.data.query_prompt!r}: {key} has no instruction to put into it; "
                          "write the instruction out, or evaluate and export afterwards")
    records = open_records(config.data.train)
    refuse_tokenless_rows(records, tokenizer, config.data.num_negatives)
    sampler = GlobalBatchSampler(
        records, global_batch_size=config.training.global_batch_size, shuffle=config.data.shuffle,
        seed=config.training.seed, num_negatives=config.data.num_negatives)
    steps = number_of_steps(config, sampler)
    if config.training.warmup_steps >= steps:
        raise ConfigError(f"training.warmup_steps = {config.training.warmup_steps} must be below the {steps} training "
                          "steps")
    retrieval = [load_beir(directory, config.evaluation.split) for directory in config.evaluation.retrieval]
    for data in retrieval:
        refuse_tokenless_texts(data, tokenizer)
    return Inputs(model=model, records=records, tokenizer=tokenizer, sampler=sampler, retrieval=retrieval,
                  train_steps=steps)


def number_of_steps(config: RunConfig, sampler: GlobalBatchSampler) -> int:
    """`train_steps`, or the steps of `epochs` passes over the rows, or 1000."""
    if config.training.epochs is not None:
        return sampler.steps_of_epochs(config.training.epochs)
    return config.training.train_steps or 1000


def log_directory(config: RunConfig) -> str | None:
    """Where metrics go."""
    return config.logging.directory or config.checkpoint.directory


def run_training(config: RunConfig) -> dict[str, float]:
    """A whole run, resumed if `checkpoint.directory` holds a checkpoint. Returns the last step's metrics."""
    inputs = read_inputs(config)
    topology = initialize(config.parallel)
    models = load_model_chunks(inputs.model, config, topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    scheduler = build_scheduler(optimizer, config.training, inputs.train_steps)
    state = TrainingState(models=models, optimizer=optimizer, scheduler=scheduler)
    first_step = resume(config, state)
    pooling, kernel = inputs.model.pooling(config.embedding.pooling), attention_kernel(config)
    objective = Objective(config.objective, topology.dp_group)
    gradients = GradCache(chunks=wrapped, models=models, topology=topology, objective=objective,
                          negatives=config.objective.negatives, kernel=kernel,
                          has_dropout=config.training.hidden_dropout > 0 or config.training.attention_dropout > 0)
    trainer = Trainer(chunks=wrapped, gradients=gradients, optimizer=optimizer, scheduler=scheduler)
    encoder = TextEncoder(wrapped, topology, inputs.tokenizer, pooling=pooling, dim=inputs.model.shape.hidden_size,
                          kernel=kernel, causal=models[0].causal)
    assets = prepare_assets(config, inputs, topology)
    writer = MetricsWriter(log_directory(config), tensorboard=config.logging.tensorboard,
                           train_steps=inputs.train_steps, first_step=first_step, active=topology.rank == 0)
    loader = BatchLoader(
        inputs.records, inputs.sampler, inputs.tokenizer, dp_rank=topology.dp_rank, dp_size=topology.dp_size,
        micro_batch_size=config.training.micro_batch_size, num_negatives=config.data.num_negatives,
        alignment=token_alignment(config.parallel), constant_tokens=topology.pp_size > 1,
        micro_batch_tokens=config.training.micro_batch_tokens,
        whole_groups=config.objective.negatives == "micro_batch")

    def evaluate() -> dict[str, float]:
        return evaluate_all(inputs.retrieval, encoder, "cosine" if config.embedding.normalize else "dot")

    def save(step: int, last: bool) -> None:
        assert config.checkpoint.directory is not None and assets is not None
        save_checkpoint(config.checkpoint.directory, step, state, assets=assets, keep=config.checkpoint.keep)

    def agree(batch: EmbedBatch) -> EmbedBatch:
        return agree_on_bins(batch, topology, whole_groups=config.objective.negatives == "micro_batch")

    hooks = Hooks(load_batch=loader.batch, agree=None if config.training.micro_batch_tokens is None else agree,
                  evaluate=evaluate if inputs.retrieval else None,
                  save=save if config.checkpoint.directory is not None else None)
    for model in models:
        model.train()
    with loader:
        metrics = train(config, trainer, hooks, writer, topology, first_step=first_step, train_steps=inputs.train_steps)
    writer.close()
    if config.checkpoint.export_at_end is not None:
        texts = comparable_texts(inputs.records, inputs.tokenizer)
        export_model(str(config.checkpoint.directory), config.checkpoint.export_at_end, encoder, texts,
                     config.model.dtype)
    return metrics


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


def resume(config: RunConfig, state: TrainingState) -> int:
    """Loads the newest checkpoint, if any. Returns the optimizer steps it has done (0 without one)."""
    if config.checkpoint.directory is None:
        return 0
    checkpoint = latest_checkpoint(config.checkpoint.directory)
    if checkpoint is None:
        return 0
    step = load_checkpoint(checkpoint, state)
    logger.info("resumed %s after %d steps", checkpoint, step)
    return step


def prepare_assets(config: RunConfig, inputs: Inputs, topology: Topology) -> Path | None:
    """Rank 0 lays the files that every checkpoint carries beside its tensors; written anew at each start."""
    if config.checkpoint.directory is None:
        return None
    assets = Path(config.checkpoint.directory) / ".assets"
    if topology.rank == 0:
        remove_unfinished(assets.parent)
        write_assets(assets, config, inputs)
    dist.barrier()
    return assets


def write_assets(assets: Path, config: RunConfig, inputs: Inputs) -> None:
    """megatron_embed.json, the resolved config.yaml, and hf/ with files that say how this run pools and prompts."""
    shutil.rmtree(assets, ignore_errors=True)
    assets.mkdir(parents=True)
    write_companions(inputs.model.path if inputs.model.checkpoint is None else inputs.model.checkpoint, assets,
                     dtype=config.model.dtype)
    write_settings(assets / "hf", config, inputs.model)
    save_resolved(config, assets / "config.yaml")
