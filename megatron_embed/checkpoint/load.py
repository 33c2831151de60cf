"""Training state as Megatron's sharded tensors: loaded by all ranks at any layout. Saving: save.py."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.checkpoint.optimizer_state import OptimizerRestore
from megatron_embed.checkpoint.plan_messages import use_trees
from megatron_embed.checkpoint.safe_unpickler import DENSE_KEYS, HEAD_KEYS, check_description, install
from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.models.file_checks import check_files
from megatron_embed.models.lora_settings import is_adapter
from megatron_embed.objectives.base import Learned
from megatron_embed.parallel.collectives import raise_on_all_ranks
from megatron_embed.platform.compat import MegatronOptimizer, OptimizerParamScheduler, dist_checkpointing

install()
use_trees()

Result = TypeVar("Result")

EXTRA_STATE = "._extra_state"
TRAINER_FILE = "trainer.json"
TENSORS = "optimizer_tensors"
"""Key of the optimizer's tensors while they are loaded, apart from what the checkpoint says of its groups."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run must remember. Rows and dropout are functions of seed and step, so they need no state."""

    models: Sequence[EmbeddingModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    learned: Learned | None = None
    """Numbers of the loss that are trained; None: none."""


def model_state(models: Sequence[EmbeddingModel]) -> dict[str, dict[str, Any]]:
    """Sharded tensors that checkpoints hold, by chunk of this rank; their keys are `model.<name>`, layers by their
    global numbers."""
    state = {}
    for index, model in enumerate(models):
        sharded = model.sharded_state_dict(prefix="model.")
        # Transformer Engine's FP8 state; empty in our layers, and absent from converted checkpoints.
        state[f"chunk{index}"] = {name: value for name, value in sharded.items()
                                  if not name.endswith(EXTRA_STATE) and is_stored(model, name)}
    return state


def is_stored(model: EmbeddingModel, name: str) -> bool:
    """Whether checkpoints hold this tensor of a model, by its name with `model.`: of one with quantized weights only
    adapters, head and Dense modules, since its base model has the rest."""
    return not model.is_quantized or is_adapter(name) or name.startswith((HEAD_KEYS, DENSE_KEYS))


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps of a training checkpoint. No communication."""
    return int(_trainer_values(checkpoint)["step"])


def owes_evaluation(checkpoint: Path) -> bool:
    """True if a request to stop prevented the evaluation that was due at this training checkpoint. No communication."""
    return bool(_trainer_values(checkpoint).get("evaluation_owed", False))


def trainer_text(step: int, *, evaluation_owed: bool) -> str:
    """Contents of TRAINER_FILE."""
    return json.dumps({"step": step, **({"evaluation_owed": True} if evaluation_owed else {})})


def _trainer_values(checkpoint: Path) -> dict[str, Any]:
    check_files(checkpoint)
    file = checkpoint / TRAINER_FILE
    try:
        values: dict[str, Any] = read_json_file(file)
        return {**values, "step": int(values["step"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); the checkpoint is damaged: remove {checkpoint}, and "
                              "the run resumes from the one before it") from error


def load_checkpoint(checkpoint: Path, state: TrainingState) -> int:
    """Restores model, optimizer and schedule, at any layout. Called by all ranks. Returns the optimizer steps done."""
    step = steps_done(checkpoint)
    model = model_state(state.models)
    optimizer = OptimizerRestore(state.optimizer, model)
    tensors = _on_all_ranks(lambda: optimizer.wanted(keys_of(checkpoint)))
    loaded = _on_all_ranks(lambda: _load({"model": model, TENSORS: tensors}, checkpoint))
    _on_all_ranks(lambda: _load_models(state.models, loaded["model"]))
    _on_all_ranks(lambda: optimizer.load(loaded.get(TENSORS, {}), loaded["optimizer"]))
    state.scheduler.load_state_dict(loaded["scheduler"])
    if state.learned is not None:
        if "learned" not in loaded:
            raise CheckpointError(f"{checkpoint}: holds no learned temperature or projection, so the run began without "
                                  "objective.learnable_temperature or teacher_projection; set it to false, or start a "
                                  "new run")
        state.learned.load_state_dict(loaded["learned"])
    return step


def load_model(checkpoint: Path, models: Sequence[EmbeddingModel], *, with_head: bool = True,
               with_adapters: bool = True, with_dense: bool = True) -> None:
    """Restores the parameters alone, from a converted or a training checkpoint, at any layout. Called by all ranks.

    `with_head`: a reranker's head too; `with_adapters`: LoRA adapters too; `with_dense`: Dense modules too; else they
    stay as they are.
    """
    def kept(name: str) -> bool:
        return ((with_head or not name.startswith(HEAD_KEYS)) and (with_adapters or not is_adapter(name))
                and (with_dense or not name.startswith(DENSE_KEYS)))

    state = {chunk: {name: value for name, value in values.items() if kept(name)}
             for chunk, values in model_state(models).items()}
    loaded = _on_all_ranks(lambda: _load({"model": state}, checkpoint))["model"]
    _on_all_ranks(lambda: _load_models(models, loaded, kept))


def _on_all_ranks(load: Callable[[], Result]) -> Result:
    """The result of `load` on this rank, or on every rank the error of the lowest that has one: since 0.18 Megatron
    does not tell the others of a file that one rank cannot read. Called by all ranks."""
    result: Result | None = None
    error: CheckpointError | None = None
    try:
        result = load()
    except CheckpointError as caught:
        error = caught
    raise_on_all_ranks(error)
    return cast(Result, result)


def reason_of(error: BaseException) -> str:
    """The reason of an error, in one line; of several ranks' failures, which torch wraps, the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    # torch's second sentence advises to run the file's code.
    return lines[0].partition(". In PyTorch 2.6")[0] if lines else type(error).__name__


def keys_of(checkpoint: Path) -> Collection[str]:
    """Keys of what is stored in a checkpoint. No communication. Raises CheckpointError."""
    folder = checkpoint / "model"
    with _error_context(folder):
        check_files(checkpoint)
        check_description(folder)
        return FileSystemReader(str(folder)).read_metadata().state_dict_metadata.keys()


def _load(sharded: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint / "model"
    with _error_context(folder):
        check_files(checkpoint)
        check_description(folder)
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(folder))
    return loaded


@contextlib.contextmanager
def _error_context(folder: Path) -> Iterator[None]:
    """Context in which an error of reading `folder` becomes a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        # Missing files and mismatched shapes give exceptions of many kinds; torch's does not derive from Exception.
        from megatron_embed.checkpoint.file_checksums import changed_files

        if changed := changed_files(folder.parent, contents=False):
            raise CheckpointError(f"{folder}: cannot be loaded into this model ({changed[0]}); it is damaged: copy it "
                                  f"again, or remove {folder.parent} to use the checkpoint before it") from error
        raise CheckpointError(f"{folder}: cannot be loaded into this model ({reason_of(error)}); it is damaged or "
                              "belongs to another model") from error


def _load_models(models: Sequence[EmbeddingModel], loaded: dict[str, dict[str, torch.Tensor]],
                 kept: Callable[[str], bool] = lambda name: True) -> None:
    """`kept`: true for the names, which begin with `model.`, that must be there."""
    for index, model in enumerate(models):
        tensors = {name.removeprefix("model."): value for name, value in loaded[f"chunk{index}"].items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE) and kept(f"model.{name}")
                   and is_stored(model, f"model.{name}")]
        if missing or unexpected:
            raise CheckpointError(f"checkpoint and model differ: {(missing or unexpected)[0]!r} and "
                                  f"{len(missing) + len(unexpected) - 1} more tensors; it belongs to another model")
