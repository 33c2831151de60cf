"""Training state as Megatron's sharded tensors: loaded by all ranks at any layout. Saving: save.py."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.adapters import is_adapter
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.parallel.collectives import raise_first
from megatron_embed.platform.compat import MegatronOptimizer, OptimizerParamScheduler, dist_checkpointing

Found = TypeVar("Found")

EXTRA_STATE = "._extra_state"
HEAD = "model.head."
"""Beginning of the names of a reranker's head."""
TRAINER_FILE = "trainer.json"

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
"""Megatron 0.16.1's default for the distributed optimizer raises on save; this one resumes at another layout."""


class Stateful(Protocol):
    """A part of a run that is plain numbers, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run must remember. Rows and dropout are functions of seed and step, so they need no state."""

    models: Sequence[EmbeddingModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    learned: Stateful | None = None
    """Numbers of the loss that are trained; null: none."""


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
KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""Keys by which groups of parameters differ, whatever the configuration says."""
OFFLOADING = ("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32", "pin_cpu_grads",
              "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d")
"""What Megatron's offloaded optimizer has in its groups. Two are classes, which torch refuses to load."""


def sharded_state(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    """Model and optimizer. Communicates over the data-parallel group, where the optimizer is distributed.

    Nothing says where the optimizer's state lay: a run may go on elsewhere.
    """
    model = model_state(state.models)
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
    parts = [optimizer] if "optimizer" in optimizer else list(optimizer.values())
    for part in parts:
        for group in part["optimizer"]["param_groups"] if "optimizer" in part else ():
            for key in OFFLOADING:
                group.pop(key, None)
    return {"model": model, "optimizer": optimizer}


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps of a training checkpoint. No communication."""
    return int(_trainer_values(checkpoint)["step"])


def owes_evaluation(checkpoint: Path) -> bool:
    """Whether the evaluation that was due at this training checkpoint was left out or broken off by a request to stop.
    No communication."""
    return bool(_trainer_values(checkpoint).get("evaluation_owed", False))


def trainer_text(step: int, *, evaluation_owed: bool) -> str:
    """Contents of TRAINER_FILE."""
    return json.dumps({"step": step, **({"evaluation_owed": True} if evaluation_owed else {})})


def _trainer_values(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / TRAINER_FILE
    try:
        values: dict[str, Any] = read_json_file(file)
        return {**values, "step": int(values["step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); the checkpoint is damaged: remove {checkpoint}, and "
                              "the run goes on from the one before it") from error


def load_checkpoint(checkpoint: Path, state: TrainingState) -> int:
    """Restores model, optimizer and schedule, at any layout. Called by all ranks. Returns the optimizer steps done."""
    step = steps_done(checkpoint)
    sharded = sharded_state(state, is_loading=True)
    loaded = _agreed(lambda: _load(sharded, checkpoint))
    _agreed(lambda: _load_models(state.models, loaded["model"]))
    load_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    if state.learned is not None:
        if "learned" not in loaded:
            raise CheckpointError(f"{checkpoint}: holds no learned temperature, so the run began without "
                                  "objective.learnable_temperature; set it to false, or start a new run")
        state.learned.load_state_dict(loaded["learned"])
    return step


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Its state and its groups as they were saved, but for what the configuration decides. No communication.

    Another class of optimizer may have saved them (torch's, Transformer Engine's, one in host memory). What this one
    alone keeps in its groups stays: without, Transformer Engine's FusedAdam stops for want of `bias_correction`, and
    torch's, which takes null for what is missing, is no longer fused.
    """
    own = [dict(group) for group in optimizer.param_groups]
    _configure_groups(loaded, own)
    optimizer.load_state_dict(loaded)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in settings.items() if key in CONFIGURED or group.get(key) is None})


def _configure_groups(loaded: Any, own: Sequence[dict[str, Any]]) -> None:
    """Gives all groups in what was `loaded` the learning rates of the `own` group of their kind.

    Megatron from 0.19 on finds a group by these too: after a change it would end in a KeyError.
    """
    if isinstance(loaded, dict):
        for group in loaded.get("param_groups", ()):
            alike = [other for other in own if all(other.get(key) == group.get(key) for key in KINDS)]
            group.update({key: other[key] for other in alike for key in ("max_lr", "min_lr") if key in other})
    for part in loaded.values() if isinstance(loaded, dict) else loaded if isinstance(loaded, list | tuple) else ():
        if isinstance(part, dict | list | tuple):
            _configure_groups(part, own)


def load_model(checkpoint: Path, models: Sequence[EmbeddingModel], *, with_head: bool = True,
               with_adapters: bool = True) -> None:
    """Restores the parameters alone, from a converted or a training checkpoint, at any layout. Called by all ranks.

    `with_head`: a reranker's head too; `with_adapters`: LoRA adapters too; else they stay as they are.
    """
    def kept(name: str) -> bool:
        return (with_head or not name.startswith(HEAD)) and (with_adapters or not is_adapter(name))

    state = {chunk: {name: value for name, value in values.items() if kept(name)}
             for chunk, values in model_state(models).items()}
    loaded = _agreed(lambda: _load({"model": state}, checkpoint))["model"]
    _agreed(lambda: _load_models(models, loaded, kept))


def _agreed(load: Callable[[], Found]) -> Found:
    """What `load` gives on this rank, or on every rank the error of the lowest that has one: since 0.18 Megatron tells
    the others nothing of a file that one rank cannot read. Called by all ranks."""
    found: Found | None = None
    error: CheckpointError | None = None
    try:
        found = load()
    except CheckpointError as caught:
        error = caught
    raise_first(error)
    return cast(Found, found)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks' failures, which torch wraps, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _load(sharded: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint / "model"
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(folder))
    except (Exception, CheckpointException) as error:
        # Plain exceptions of many kinds for missing files and mismatched shapes; torch's own is no Exception.
        raise CheckpointError(f"{folder}: cannot be loaded into this model ({reason_of(error)}); it is damaged or "
                              "belongs to another model") from error
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
