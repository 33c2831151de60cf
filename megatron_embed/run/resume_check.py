"""Whether a configuration may resume a run: what makes it another run is refused, every other change is logged."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.load import steps_done
from megatron_embed.config.load import read_resolved, to_dict
from megatron_embed.config.optimizer import OptimizerConfig
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import open_checkpoint
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.sampler import ORDER_VERSION
from megatron_embed.errors import ConfigError
from megatron_embed.loading.model_directory import ModelDirectory, adapters_of
from megatron_embed.loading.quantized import base_of_run
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.families import model_shape
from megatron_embed.models.joint_files import find_joint_heads
from megatron_embed.models.lora_settings import AdapterSettings
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import JOINT_POOLINGS, ModelPooling
from megatron_embed.run.run_directory import describe_rows, known_rows, with_known_choices
from megatron_embed.run.task import Task
from megatron_embed.training.optimizer import overlaps

logger = logging.getLogger(__name__)

FIXED: tuple[str, ...] = (
         "task", "model.quantization", "model.double_quantization", "reranker.head", "reranker.template",
         "reranker.instruction", "reranker.true_token",
         "reranker.false_token", "reranker.max_length", "embedding.normalize", "data.shuffle", "data.mixed_batches",
         "data.sampling_temperature", "data.validation_fraction", "data.num_negatives", "data.num_positives",
         "data.document_sampling",
         "training.global_batch_size", "training.seed", "objective.learnable_temperature",
         "objective.teacher_projection")
"""What a run keeps for life: a step's rows follow from these (and the data), its embeddings from `normalize`, and what
there is to save from the last."""


def check_resumable(task: Task, checkpoint: Path, records: RecordSet, train_steps: int) -> None:
    """Refuses what would make the rest of the run another run; logs every other change of the configuration.

    Args:
        checkpoint: the newest one of the run.
        records: those to train on.
        train_steps: of the whole run. With none left, another objective is refused: no step would be trained with it.
    Raises:
        ConfigError: naming key, new and old value.
    """
    config = with_known_choices(task.config, checkpoint)
    before, now = _flat(read_resolved(checkpoint / "config.yaml")), _flat(to_dict(config))
    saved = {key: value for key, value in task.saved_settings(checkpoint).items() if key in FIXED}
    before |= {key: value for key, value in saved.items() if now[key] is not None}
    for key in _fixed_keys(config, before):
        # What is saved beside config.yaml and not set now stays as it is saved.
        is_inherited = key in saved and now[key] is None
        if key in before and before[key] != now[key] and not is_inherited:
            raise _refusal(checkpoint, key, now[key], f"this run began with {_shown(before[key])}")
    _check_weights(config, checkpoint, before.get("data.train", []))
    _check_model(config, checkpoint, task.model)
    if not task.has_tokenizer_of(checkpoint):
        raise _refusal(checkpoint, "model.path", config.model.path,
                       "its tokenizer gives other ids than the one this run began with")
    known = known_rows(checkpoint)
    if known is not None and known != describe_rows(records, known["order"]) and config.data.allow_changes:
        logger.warning("since step %d the run trains on %d rows of %s, before on %d rows that were not the same",
                       steps_done(checkpoint) + 1, len(records), [item.path for item in config.data.train],
                       known["rows"])
    elif known is not None and known != describe_rows(records, known["order"]):
        raise _refusal(checkpoint, "data.train", [item.path for item in config.data.train],
                       f"{len(records)} rows that are not the {known['rows']} rows this run began with "
                       f"({_changed_entries(before.get('data.train', []), to_dict(config)['data']['train'])})")
    if known is not None and known["order"] != ORDER_VERSION:
        logger.info("%s began with an earlier version's order of rows, which it keeps%s", checkpoint.parent,
                    ": every start reads all rows where some are held out" if known["order"] == 1 else "")
    same = _equal_overlaps(config, before, task)
    changed = [key for key, value in now.items() if key in before and before[key] != value and key not in same]
    if steps_done(checkpoint) >= train_steps:
        _check_objective_of_finished_run(checkpoint, before, now, changed, train_steps)
    if changed:
        logger.info("resuming %s with other settings: %s", checkpoint, "; ".join(
            f"{key}: {_shown(before[key])} -> {_shown(now[key])}" for key in changed))


def _check_objective_of_finished_run(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any],
                                     changed: Sequence[str], train_steps: int) -> None:
    """Refuses a changed objective: what is exported would not have been trained with it."""
    for key in changed:
        if key.startswith("objective."):
            raise ConfigError(f"{key} = {_shown(now[key])}: the run in {checkpoint.parent} has done all its "
                              f"{train_steps} steps with {_shown(before[key])}, so nothing would be trained with it; "
                              "choose another checkpoint.directory, or raise training.train_steps (or epochs) to go "
                              "on", key=key)


def _changed_entries(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """The differences between two lists of data.train, in words. Settings that an earlier version did not have are not
    among them."""
    paths = [[entry["path"] for entry in entries] for entries in (before, now)]
    if paths[0] != paths[1]:
        return f"those of {', '.join(paths[0])}"
    changes = [f"{new['path']}: {key} was {old[key]} and is {value}" for old, new in zip(before, now, strict=True)
               for key, value in new.items() if key in old and old[key] != value]
    return "; ".join(changes) or "the files are not the same"


def is_unchanged(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the run's configuration is the checkpoint's, to the last setting."""
    now = to_dict(with_known_choices(config, checkpoint))
    return _flat(read_resolved(checkpoint / "config.yaml")) == _flat(now)


def _fixed_keys(config: RunConfig, before: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that the run keeps for life. `before`: its settings so far, by key."""
    keys = FIXED
    # The state of an optimizer that is not distributed has no main parameters where the model is float32 itself.
    if not (config.optimizer.distributed and before.get("optimizer.distributed", True)):
        keys += ("model.dtype",)
    # The state of the two is of different numbers; that of adamw and adamw_8bit is the same in a checkpoint.
    if "muon" in (config.optimizer.name, before.get("optimizer.name")):
        keys += ("optimizer.name",)
    if config.objective.learnable_temperature:  # which began there, and the checkpoint knows where it is
        keys += ("objective.temperature", "objective.bias")
    return keys


def _equal_overlaps(config: RunConfig, before: Mapping[str, Any], task: Task) -> set[str]:
    """Keys of overlapping communication with equal effect before and now, as `false` and `auto` on a CPU."""
    names = ("overlap_grad_reduce", "overlap_param_gather", "distributed")
    old = {name: before[f"optimizer.{name}"] for name in names if f"optimizer.{name}" in before}
    if len(old) < len(names):
        return set()
    resolved = [overlaps(each, has_adapters=adapters_of(config.lora, task.model) is not None,
                         has_head=task.has_head, has_tied_head=task.has_tied_head)
                for each in (OptimizerConfig(**old), config.optimizer)]
    return {f"optimizer.{name}" for name, one, other in zip(names, *resolved, strict=False) if one == other}


def _check_weights(config: RunConfig, checkpoint: Path, files: Sequence[dict[str, Any]]) -> None:
    """Refuses other weights of as many files as before."""
    weights, before = [file.weight for file in config.data.train], [file.get("weight", 1.0) for file in files]
    if len(weights) == len(before) and weights != before and config.data.allow_changes:
        logger.warning("since step %d the entries of data.train have the weights %s, before %s",
                       steps_done(checkpoint) + 1, weights, before)
    elif len(weights) == len(before) and weights != before:
        raise _refusal(checkpoint, "data.train", [item.path for item in config.data.train],
                       f"weights {weights}, this run began with {before}")


def _refusal(checkpoint: Path, key: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{key} = {_shown(value)}: {why}, and a run keeps it for life ({checkpoint}); set it back, or "
                       "start a new run in another checkpoint.directory (model.path may be this checkpoint)",
                       key=key)


def _check_model(config: RunConfig, checkpoint: Path, model: ModelDirectory) -> None:
    """Refuses another shape, attention or pooling than before."""
    before = dataclasses.asdict(model_shape(checkpoint / "hf"))
    now = dataclasses.asdict(model.shape)
    was_bidirectional = before.pop("bidirectional")
    if was_bidirectional != (now.pop("bidirectional") or config.model.bidirectional):
        raise _refusal(checkpoint, "model.bidirectional", config.model.bidirectional,
                       f"this run began with {_shown(was_bidirectional)}")
    # A model that has its weights does not depend on how new ones would be drawn.
    different = [name for name in before if name != "initializer_range" and before[name] != now[name]]
    if different:
        name = different[0]
        raise _refusal(checkpoint, "model.path", config.model.path,
                       f"another model ({name} = {now[name]!r}, this run began with {before[name]!r})")
    adapters, had = adapters_of(config.lora, model), open_checkpoint(checkpoint).info.adapters
    if _describe_adapters(adapters) != _describe_adapters(had):
        raise _refusal(checkpoint, "lora.rank", config.lora.rank, f"this run began with {_describe_adapters(had)}")
    _check_base(config, checkpoint, model)
    saved = read_saved_settings(checkpoint / "hf")
    if model.saved.vectors != saved.vectors:
        raise _refusal(checkpoint, "embedding.head", config.embedding.head,
                       f"this run began with {saved.vectors or 'a dense model'}")
    heads, is_joint = find_joint_heads(checkpoint / "hf"), model.joint is not None
    if is_joint != (heads is not None):
        raise _refusal(checkpoint, "embedding.head", config.embedding.head,
                       f"this run began {'without' if heads is None else 'with'} joint heads")
    if model.joint is not None and heads is not None and model.joint.token_dim != heads.dim:
        raise _refusal(checkpoint, "embedding.embedding_dim", config.embedding.embedding_dim,
                       f"{model.joint.token_dim} numbers of a token's vector, this run began with {heads.dim}")
    pooling = model.pooling(config.embedding.pooling)
    was: ModelPooling | None = saved.pooling
    if is_joint:
        was = None if saved.pooling is None else JOINT_POOLINGS.get(saved.pooling)
    if was is not None and pooling != was:
        raise _refusal(checkpoint, "embedding.pooling", pooling, f"this run began with {was!r}")
    dense, had_dense = _sizes_of(model.dense(config.embedding)), _sizes_of(saved.dense)
    if not config.workload.has_head and not is_joint and dense != had_dense:
        raise _refusal(checkpoint, "embedding.embedding_dim", config.embedding.embedding_dim,
                       f"Dense modules {dense or '(none)'}, this run began with {had_dense or '(none)'}")


def _sizes_of(dense: Sequence[DenseSettings]) -> list[str]:
    """Dense modules in words, without their folders."""
    return [f"{settings.in_features}x{settings.out_features} {settings.activation}"
            f"{' with bias' * settings.bias}{' of unit vectors' * settings.normalize_input}" for settings in dense]


def _check_base(config: RunConfig, checkpoint: Path, model: ModelDirectory) -> None:
    """Refuses another base model than the adapters' own, whose quantized weights the checkpoint does not hold. Where it
    lies may change."""
    had, now = open_checkpoint(checkpoint).info.quantized_base, base_of_run(config, model)
    if had is not None and now is not None and had.fingerprint != now.fingerprint:
        raise _refusal(checkpoint, "model.path", config.model.path, f"other weights than those of {had.path} that this "
                       f"run's adapters belong to (fingerprint {now.fingerprint}, not {had.fingerprint})")


def _describe_adapters(adapters: AdapterSettings | None) -> str:
    """Rank, scale and modules, which decide what adapters compute."""
    if adapters is None:
        return "no adapters"
    return f"adapters of rank {adapters.rank}, scale {adapters.scale:g}, on {', '.join(adapters.modules)}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _shown(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
