"""Where a run stands, and whether a configuration may go on from there."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import latest_checkpoint, write_atomically
from megatron_embed.checkpoint.state import owes_evaluation, steps_done
from megatron_embed.config.json_file import read_json_file
from megatron_embed.config.load import read_resolved, to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import open_checkpoint
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.evaluation.suite import best_metric
from megatron_embed.export.embedding import PROBES
from megatron_embed.loading.model_directory import ModelDirectory, adapters_of
from megatron_embed.models.adapters import AdapterSettings
from megatron_embed.models.families import model_shape
from megatron_embed.models.reranker_settings import read_reranker_settings
from megatron_embed.models.saved_settings import read_saved_settings

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
"""In every checkpoint: what identifies the rows that it was trained on."""
EXPORT_FILE = "export.json"
"""In a run's directory: where `checkpoint.export_at_end` was written, and after how many steps."""

FIXED = ("task", "reranker.head", "reranker.template", "reranker.instruction", "reranker.true_token",
         "reranker.false_token", "reranker.max_length", "embedding.normalize", "data.shuffle", "data.mixed_batches",
         "data.sampling_temperature", "data.validation_fraction", "data.num_negatives", "data.num_positives",
         "data.document_sampling",
         "training.global_batch_size", "training.seed", "optimizer.distributed", "objective.learnable_temperature")
"""What a run keeps for life: a step's rows follow from these (and the data), its embeddings from `normalize`, the
layout of the optimizer's state, which Megatron cannot translate, from `distributed`, and what there is to save from the
last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands when it is started."""

    checkpoint: Path | None
    """The newest one; null: a new run."""
    steps: int
    """Optimizer steps done."""
    ended_early: bool
    """Whether that was the run's last step, by `evaluation.patience`."""
    evaluation_owed: bool = False
    """Whether a request to stop came in the way of the evaluation that was due after these steps."""


def standing(config: RunConfig) -> Standing:
    """What `checkpoint.directory` holds. No communication. Raises CheckpointError for a damaged checkpoint."""
    checkpoint = None if config.checkpoint.directory is None else latest_checkpoint(config.checkpoint.directory)
    steps = 0 if checkpoint is None else steps_done(checkpoint)
    best = best_checkpoint(config, steps) if config.evaluation.patience is not None and steps else None
    return Standing(checkpoint=checkpoint, steps=steps, ended_early=best is not None and best.is_over,
                    evaluation_owed=checkpoint is not None and owes_evaluation(checkpoint))


def best_checkpoint(config: RunConfig, steps: int) -> BestCheckpoint | None:
    """Where a run of so many steps stands with its best checkpoint; null where there are no checkpoints, or none is
    the best.

    No communication. Raises CheckpointError for a damaged one.
    """
    metric = best_metric(config)
    if config.checkpoint.directory is None or metric is None or not config.keeps_best:
        return None
    return BestCheckpoint(config.checkpoint.directory, metric, steps, patience=config.evaluation.patience)


def describe_rows(records: RecordSet) -> dict[str, Any]:
    """Contents of DATA_FILE: equal rows in equal order, equal value, wherever the files lie."""
    return {"rows": len(records), "digest": records.digest}


def with_known_dtype(config: RunConfig, checkpoint: Path | None) -> RunConfig:
    """The same with the checkpoint's dtype in place of `auto`: a run that goes on elsewhere stays what it was.

    No communication. Raises CheckpointError for a damaged checkpoint.
    """
    known = None if checkpoint is None else open_checkpoint(checkpoint).info.dtype
    if config.model.dtype != "auto" or known not in ("float32", "bfloat16"):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=known))


def check_resumable(config: RunConfig, checkpoint: Path, model: ModelDirectory,
                    tokenizer: RoleTokenizer | PairTokenizer, records: RecordSet) -> None:
    """Refuses what would make the rest of the run another run; logs every other change of the configuration.

    Raises:
        ConfigError: naming key, new and old value.
    """
    config = with_known_dtype(config, checkpoint)
    file = checkpoint / "config.yaml"
    before, now = _flat(read_resolved(file)), _flat(to_dict(config))
    # Without the distributed optimizer its state has no main parameters where the model is float32 itself.
    fixed = FIXED if config.optimizer.distributed else (*FIXED, "model.dtype")
    if config.objective.learnable_temperature:  # they are where it began, and the checkpoint knows where it is
        fixed = (*fixed, "objective.temperature", "objective.bias")
    asked = read_reranker_settings(checkpoint / "hf") if config.task == "reranker" else None
    for key in fixed:
        section, _, name = key.partition(".")
        if section == "reranker" and asked is not None:
            if now[key] is None:
                continue  # what the run began with
            before[key] = dataclasses.asdict(asked)[name]
        if key in before and before[key] != now[key]:
            raise _refusal(checkpoint, key, now[key], f"this run began with {_shown(before[key])}")
    weights = [file.weight for file in config.data.train]
    was = [file.get("weight", 1.0) for file in before.get("data.train", [])]
    if len(weights) == len(was) and weights != was:
        raise _refusal(checkpoint, "data.train", [item.path for item in config.data.train],
                       f"weights {weights}, this run began with {was}")
    _check_model(config, checkpoint, model)
    _check_tokenizer(config, checkpoint, model, tokenizer)
    known = _known_rows(checkpoint / DATA_FILE)
    if known is not None and known != describe_rows(records):
        raise _refusal(checkpoint, "data.train", [item.path for item in config.data.train],
                       f"{len(records)} rows that are not the {known['rows']} rows this run began with "
                       f"({before.get('data.train')})")
    changed = [f"{key}: {_shown(before[key])} -> {_shown(value)}" for key, value in now.items()
               if key in before and before[key] != value]
    if changed:
        logger.info("going on from %s with other settings: %s", checkpoint, "; ".join(changed))


def _known_rows(file: Path) -> dict[str, Any] | None:
    """What `describe_rows` said of the run so far; null for a converted model, which has seen none."""
    if not file.is_file():
        return None
    try:
        known: dict[str, Any] = read_json_file(file)
        return {"rows": known["rows"], "digest": known["digest"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); the checkpoint is damaged: remove {file.parent}, and "
                              "the run goes on from the one before it") from error


def _refusal(checkpoint: Path, key: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{key} = {_shown(value)}: {why}, and a run keeps it for life ({checkpoint}); set it back, or "
                       "start a new run in another checkpoint.directory (model.path may be this checkpoint)", key=key)


def _check_model(config: RunConfig, checkpoint: Path, model: ModelDirectory) -> None:
    """The same shape, attention and pooling as before."""
    before = dataclasses.asdict(model_shape(checkpoint / "hf"))
    now = dataclasses.asdict(model.shape)
    was_bidirectional = before.pop("bidirectional")
    if was_bidirectional != (now.pop("bidirectional") or config.model.bidirectional):
        raise _refusal(checkpoint, "model.bidirectional", config.model.bidirectional,
                       f"this run began with {_shown(was_bidirectional)}")
    # How new weights would be drawn is nothing to a model that has its own.
    different = [name for name in before if name != "initializer_range" and before[name] != now[name]]
    if different:
        name = different[0]
        raise _refusal(checkpoint, "model.path", config.model.path,
                       f"another model ({name} = {now[name]!r}, this run began with {before[name]!r})")
    adapters, had = adapters_of(config.lora, model), open_checkpoint(checkpoint).info.adapters
    if _computed(adapters) != _computed(had):
        raise _refusal(checkpoint, "lora.rank", config.lora.rank, f"this run began with {_computed(had)}")
    pooling, was = model.pooling(config.embedding.pooling), read_saved_settings(checkpoint / "hf").pooling
    if was is not None and pooling != was:
        raise _refusal(checkpoint, "embedding.pooling", pooling, f"this run began with {was!r}")


def _computed(adapters: AdapterSettings | None) -> str:
    """What adapters compute, in words."""
    if adapters is None:
        return "no adapters"
    return f"adapters of rank {adapters.rank}, scale {adapters.scale:g}, on {', '.join(adapters.modules)}"


def _check_tokenizer(config: RunConfig, checkpoint: Path, model: ModelDirectory,
                     tokenizer: RoleTokenizer | PairTokenizer) -> None:
    """The same ids as before, on texts of several scripts."""
    texts = [text for texts in PROBES.values() for text in texts]
    if isinstance(tokenizer, PairTokenizer):
        pairs = [Pair(query="a", document=text) for text in texts]
        if tokenizer.with_directory(str(checkpoint / "hf")).tokenize(pairs) != tokenizer.tokenize(pairs):
            raise _other_tokenizer(config, checkpoint)
        return
    saved = RoleTokenizer(
        str(checkpoint / "hf"), add_eos=model.pooling(config.embedding.pooling) == "lasttoken",
        text_format=dataclasses.replace(model.text_format, truncation_side="right"),
        document_prompt=config.data.prompt("document"), query_max_length=config.data.max_length("query"),
        document_max_length=config.data.max_length("document"))
    if saved.tokenize(texts, "document").token_ids != tokenizer.tokenize(texts, "document").token_ids:
        raise _other_tokenizer(config, checkpoint)


def _other_tokenizer(config: RunConfig, checkpoint: Path) -> ConfigError:
    return _refusal(checkpoint, "model.path", config.model.path,
                    "its tokenizer gives other ids than the one this run began with")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _shown(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def is_exported(config: RunConfig, steps: int) -> bool:
    """Whether `checkpoint.export_at_end` holds the export of this run after so many steps."""
    target, directory = config.checkpoint.export_at_end, config.checkpoint.directory
    if target is None or directory is None or not (Path(target) / "modules.json").is_file():
        return False
    file = Path(directory) / EXPORT_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == _export_record(config, steps)


def record_export(config: RunConfig, steps: int) -> None:
    """Notes, just before an export gets its name, that it will be this run's, which has done so many steps."""
    write_atomically(Path(config.checkpoint.directory or "") / EXPORT_FILE, _export_record(config, steps))


def _export_record(config: RunConfig, steps: int) -> str:
    best = {"of": best_metric(config)} if config.checkpoint.export == "best" else {}
    return json.dumps({"directory": str(Path(config.checkpoint.export_at_end or "").resolve()), "steps": steps,
                       **best}) + "\n"


def changed_since_check(config: RunConfig, found: Standing) -> CheckpointError | None:
    """The error of a rank whose newest checkpoint is no longer what it was when the run was checked."""
    try:
        now = standing(config)
    except CheckpointError as error:
        return error
    if now == found:
        return None
    return CheckpointError(f"{config.checkpoint.directory}: another run wrote {now.checkpoint} while this one started; "
                           "start it again")
