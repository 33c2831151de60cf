"""Training state as Megatron's sharded checkpoints: saved and loaded by all ranks, resumable at another layout."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.checkpoint.files import (
    link_tree,
    remove_old,
    replace_directory,
    sync_tree,
    write_atomically,
)
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.models.adapters import is_adapter
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.parallel.collectives import raise_first
from megatron_embed.platform.compat import MegatronOptimizer, OptimizerParamScheduler, dist_checkpointing

logger = logging.getLogger(__name__)

EXTRA_STATE = "._extra_state"
HEAD = "model.head."
"""Beginning of the names of a reranker's head."""
TRAINER_FILE = "trainer.json"

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
"""Megatron 0.16.1's default for the distributed optimizer raises on save; this one resumes at another layout."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run must remember. Rows and dropout are functions of seed and step, so they need no state."""

    models: Sequence[EmbeddingModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def model_state(models: Sequence[EmbeddingModel]) -> dict[str, dict[str, Any]]:
    """Sharded tensors by chunk of this rank; their keys are `model.<name>`, layers by their global numbers."""
    state = {}
    for number, model in enumerate(models):
        sharded = model.sharded_state_dict(prefix="model.")
        # Transformer Engine's FP8 state; empty in our layers, and absent from converted checkpoints.
        state[f"chunk{number}"] = {name: value for name, value in sharded.items() if not name.endswith(EXTRA_STATE)}
    return state


CONFIGURED = ("betas", "eps", "max_lr", "min_lr")
"""What Megatron saves with the groups of parameters, and the configuration decides: a resumed run may change it."""


def _sharded_state(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    model = model_state(state.models)
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(directory: str, step: int, state: TrainingState, *, assets: Path, keep: int) -> Path:
    """Writes DIRECTORY/step_NNNNNN and points `latest` at it. Called by all ranks; communicates over the world.

    A run killed at any instant leaves the previous checkpoint, or this one, complete; so does a full disk.

    Args:
        step: optimizer steps done.
        assets: folder with megatron_embed.json, config.yaml and hf/ (configuration, tokenizer, untrained tensors).
        keep: newest checkpoints kept; 0 keeps all.
    Raises:
        CheckpointError: it cannot be written; what there was of it is removed.
    """
    folder = Path(directory)
    target, temporary = folder / f"step_{step:06d}", folder / f".step_{step:06d}.tmp"

    def complete() -> None:
        link_tree(assets, temporary)
        (temporary / TRAINER_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        sync_tree(temporary)
        replace_directory(temporary, target)
        write_atomically(folder / "latest", target.name + "\n")
        remove_old(folder, keep)
        logger.info("saved %s", target)

    try:
        on_rank_0((temporary / "model").mkdir, target, parents=True)
        sharded = _sharded_state(state, is_loading=False)
        sharded["scheduler"] = state.scheduler.state_dict()
        _save_shards(sharded, temporary, target)
        on_rank_0(complete, target)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def on_rank_0(action: Callable[..., object], target: Path, **options: object) -> None:
    """`action` on rank 0, which writes `target`; its error is raised on every rank, a CheckpointError if a file's.

    Called by all ranks; one all-gather over the world, before which no rank goes on.
    """
    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            action(**options)
        except UserError as found:
            error = found
        except OSError as found:
            error = _not_written(target, found.strerror or str(found))
    raise_first(error)


def _save_shards(sharded: dict[str, Any], temporary: Path, target: Path) -> None:
    """Every rank's tensors. A rank that cannot write its own tells the others; rank 0 knows the reason."""
    try:
        dist_checkpointing.save(sharded, str(temporary / "model"), content_metadata=SHARDING)
    except CheckpointException as error:
        reasons = [str(failure[0]).strip().splitlines()[-1] for failure in error.failures.values()]
        raise _not_written(target, reasons[0] if reasons else "see rank 0") from error
    except OSError as error:
        raise _not_written(target, error.strerror or str(error)) from error


def _not_written(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint.directory = {str(target.parent)!r}: {target.name} could not be written "
                           f"({reason}); make room or name another disk; what was complete before still is")


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps of a training checkpoint. No communication."""
    file = checkpoint / TRAINER_FILE
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); the checkpoint is damaged: remove {checkpoint}, and "
                              "the run goes on from the one before it") from error


def load_checkpoint(checkpoint: Path, state: TrainingState) -> int:
    """Restores model, optimizer and schedule, at any layout. Called by all ranks. Returns the optimizer steps done."""
    step = steps_done(checkpoint)
    sharded = _sharded_state(state, is_loading=True)
    loaded = _load(sharded, checkpoint)
    _load_models(state.models, loaded["model"])
    configured = [{key: group[key] for key in CONFIGURED} for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, configured, strict=True):
        group.update(settings)
    state.scheduler.load_state_dict(loaded["scheduler"])
    return step


def load_model(checkpoint: Path, models: Sequence[EmbeddingModel], *, with_head: bool = True,
               with_adapters: bool = True) -> None:
    """Restores the parameters alone, from a converted or a training checkpoint, at any layout. Called by all ranks.

    `with_head`: a reranker's head too; `with_adapters`: LoRA adapters too; else they stay as they are.
    """
    def kept(name: str) -> bool:
        return (with_head or not name.startswith(HEAD)) and (with_adapters or not is_adapter(name))

    state = {chunk: {name: value for name, value in values.items() if kept(name)}
             for chunk, values in model_state(models).items()}
    _load_models(models, _load({"model": state}, checkpoint)["model"], kept)


def _load(sharded: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint / "model"
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(folder))
    except (Exception, CheckpointException) as error:
        # Plain exceptions of many kinds for missing files and mismatched shapes; torch's own is no Exception.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded into this model ({first_line}); it is damaged or belongs to "
                              "another model") from error
    return loaded


def _load_models(models: Sequence[EmbeddingModel], loaded: dict[str, dict[str, torch.Tensor]],
                 kept: Callable[[str], bool] = lambda name: True) -> None:
    """`kept`: of names that begin `model.`, those that must be there."""
    for number, model in enumerate(models):
        tensors = {name.removeprefix("model."): value for name, value in loaded[f"chunk{number}"].items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE) and kept(f"model.{name}")]
        if missing or unexpected:
            raise CheckpointError(f"checkpoint and model differ: {(missing or unexpected)[0]!r} and "
                                  f"{len(missing) + len(unexpected) - 1} more tensors; it belongs to another model")
