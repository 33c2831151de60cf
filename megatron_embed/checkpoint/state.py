"""Training state as Megatron's sharded checkpoints: saved and loaded by all ranks, resumable at another layout."""

import json
import logging
from collections.abc import Sequence
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
from megatron_embed.errors import CheckpointError
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.platform.compat import MegatronOptimizer, OptimizerParamScheduler, dist_checkpointing

logger = logging.getLogger(__name__)

EXTRA_STATE = "._extra_state"
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


def _sharded_state(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    model = model_state(state.models)
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
    return {"model": model, "optimizer": optimizer}


def save_checkpoint(directory: str, step: int, state: TrainingState, *, assets: Path, keep: int) -> Path:
    """Writes DIRECTORY/step_NNNNNN and points `latest` at it. Called by all ranks; communicates over the world.

    A run killed at any instant leaves the previous checkpoint, or this one, complete.

    Args:
        step: optimizer steps done.
        assets: folder with megatron_embed.json, config.yaml and hf/ (configuration, tokenizer, untrained tensors).
        keep: newest checkpoints kept; 0 keeps all.
    """
    folder = Path(directory)
    target, temporary = folder / f"step_{step:06d}", folder / f".step_{step:06d}.tmp"
    if dist.get_rank() == 0:
        (temporary / "model").mkdir(parents=True)
    dist.barrier()
    sharded = _sharded_state(state, is_loading=False)
    sharded["scheduler"] = state.scheduler.state_dict()
    dist_checkpointing.save(sharded, str(temporary / "model"), content_metadata=SHARDING)
    if dist.get_rank() == 0:
        link_tree(assets, temporary)
        (temporary / TRAINER_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        sync_tree(temporary)
        replace_directory(temporary, target)
        write_atomically(folder / "latest", target.name + "\n")
        remove_old(folder, keep)
        logger.info("saved %s", target)
    dist.barrier()
    return target


def load_checkpoint(checkpoint: Path, state: TrainingState) -> int:
    """Restores model, optimizer and schedule, at any layout. Called by all ranks. Returns the optimizer steps done."""
    step = int(json.loads((checkpoint / TRAINER_FILE).read_text(encoding="utf-8"))["step"])
    sharded = _sharded_state(state, is_loading=True)
    loaded = _load(sharded, checkpoint)
    _load_models(state.models, loaded["model"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    return step


def load_model(checkpoint: Path, models: Sequence[EmbeddingModel]) -> None:
    """Restores the parameters alone, from a converted or a training checkpoint, at any layout. Called by all ranks."""
    _load_models(models, _load({"model": model_state(models)}, checkpoint)["model"])


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


def _load_models(models: Sequence[EmbeddingModel], loaded: dict[str, dict[str, torch.Tensor]]) -> None:
    for number, model in enumerate(models):
        tensors = {name.removeprefix("model."): value for name, value in loaded[f"chunk{number}"].items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        if missing or unexpected:
            raise CheckpointError(f"checkpoint and model differ: {(missing or unexpected)[0]!r} and "
                                  f"{len(missing) + len(unexpected) - 1} more tensors; it belongs to another model")
