"""What a run's directory holds when it is started: its newest checkpoint, its best one, its export."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import latest_checkpoint, write_atomically
from megatron_embed.checkpoint.load import owes_evaluation, steps_done
from megatron_embed.config.json_file import read_json_file
from megatron_embed.config.load import read_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import open_checkpoint
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.indexed_rows import stamp_of
from megatron_embed.data.row_source import files_of
from megatron_embed.data.sampler import ORDER_VERSION
from megatron_embed.errors import CheckpointError
from megatron_embed.evaluation.suite import best_metric
from megatron_embed.models.auto_matmul import libraries_of_run
from megatron_embed.names import MODEL_DTYPES, FurtherExport

DATA_FILE = "data.json"
"""In every checkpoint: what identifies the rows that it was trained on."""
EXPORT_FILE, FURTHER_EXPORT_FILE = "export.json", "export-{kind}.json"
"""In a run's directory: where `checkpoint.export_at_end`, and each of `checkpoint.export_formats`, was written, and
after how many steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeState:
    """Progress of a run when it is started."""

    checkpoint: Path | None
    """The newest one; None: a new run."""
    steps: int
    """Optimizer steps done."""
    ended_early: bool
    """Whether that was the run's last step, by `evaluation.patience`."""
    evaluation_owed: bool = False
    """Whether a request to stop came in the way of the evaluation that was due after these steps."""


def resume_state(config: RunConfig) -> ResumeState:
    """The state that `checkpoint.directory` holds. No communication. Raises CheckpointError if it is damaged."""
    checkpoint = None if config.checkpoint.directory is None else latest_checkpoint(config.checkpoint.directory)
    steps = 0 if checkpoint is None else steps_done(checkpoint)
    best = best_checkpoint(config, steps) if config.evaluation.patience is not None and steps else None
    return ResumeState(checkpoint=checkpoint, steps=steps, ended_early=best is not None and best.is_over,
                    evaluation_owed=checkpoint is not None and owes_evaluation(checkpoint))


def best_checkpoint(config: RunConfig, steps: int) -> BestCheckpoint | None:
    """The best checkpoint of a run of so many steps; None where there are no checkpoints, or none is the best.

    No communication. Raises CheckpointError for a damaged one.
    """
    metric = best_metric(config)
    if config.checkpoint.directory is None or metric is None or not config.keeps_best:
        return None
    return BestCheckpoint(config.checkpoint.directory, metric, steps, patience=config.evaluation.patience,
                          keep_every=config.checkpoint.keep_every_steps)


def describe_rows(records: RecordSet, order: int) -> dict[str, Any]:
    """Contents of DATA_FILE: equal rows in equal order, equal value, wherever the files lie.

    `order`: the ORDER_VERSION that the run began with.
    """
    digest = records.digest_of_order_1 if order == 1 else records.digest
    return {"rows": len(records), "digest": digest, "order": order}


def data_stamps(config: RunConfig) -> list[list[Any]] | None:
    """Path, size and time of change of every file of rows; None where some are in other places than files."""
    paths = [path for file in config.data.files for path in (*(files_of(file.path) or [file.path]), file.corpus)
             if path is not None]
    if not all(map(os.path.isfile, paths)):
        return None
    return [[os.path.abspath(path), *stamp_of(os.stat(path))] for path in paths]


def known_stamps(checkpoint: Path) -> list[list[Any]] | None:
    """The result of `data_stamps` at the run's last start; None if it is not known."""
    try:
        stamps: list[list[Any]] | None = read_json_file(checkpoint / DATA_FILE)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stamps


def known_rows(checkpoint: Path | None) -> dict[str, Any] | None:
    """The result of `describe_rows` of the run so far; None for a new run, or a converted model, which has seen none.

    Raises:
        CheckpointError: the file is damaged, or a later version of this program wrote it.
    """
    if checkpoint is None or not (file := checkpoint / DATA_FILE).is_file():
        return None
    try:
        known: dict[str, Any] = read_json_file(file)
        rows = {"rows": known["rows"], "digest": known["digest"], "order": known.get("order", 1)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); the checkpoint is damaged: remove {file.parent}, and "
                              "the run resumes from the one before it") from error
    if rows["order"] not in range(1, ORDER_VERSION + 1):
        raise CheckpointError(f"{file}: order = {rows['order']!r}: a later version of megatron_embed chose the rows of "
                              "this run's steps; resume it with that version")
    return rows


def with_known_choices(config: RunConfig, checkpoint: Path | None) -> RunConfig:
    """The same with the checkpoint's dtype in place of `auto` and its libraries of matrix products in place of None: a
    run that is resumed elsewhere keeps them.

    No communication. Raises CheckpointError or ConfigError for a damaged checkpoint.
    """
    if checkpoint is None:
        return config
    model, dtype = config.model, open_checkpoint(checkpoint).info.dtype
    if model.dtype == "auto" and dtype in MODEL_DTYPES:
        model = dataclasses.replace(model, dtype=dtype)
    if model.cpu_matmul is None:
        model = dataclasses.replace(model, cpu_matmul=libraries_of_run(read_resolved(checkpoint / "config.yaml")))
    return dataclasses.replace(config, model=model)


def pending_exports(config: RunConfig, steps: int) -> dict[FurtherExport | None, str]:
    """The directories that do not hold the export of this run after so many steps yet, by format; see
    CheckpointConfig.exports."""
    return {kind: target for kind, target in config.checkpoint.exports.items()
            if not _is_exported(config, kind, target, steps)}


def _is_exported(config: RunConfig, kind: FurtherExport | None, target: str, steps: int) -> bool:
    if config.checkpoint.directory is None or not (Path(target) / "modules.json").is_file():
        return False
    file = Path(config.checkpoint.directory) / _export_file(kind)
    wanted = _export_record(config, kind, steps).encode()
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(wanted) + 1) == wanted


def record_export(config: RunConfig, kind: FurtherExport | None, steps: int) -> None:
    """Notes, just before an export gets its name, that it will be this run's, which has done so many steps."""
    write_atomically(Path(config.checkpoint.directory or "") / _export_file(kind), _export_record(config, kind, steps))


def _export_file(kind: FurtherExport | None) -> str:
    return EXPORT_FILE if kind is None else FURTHER_EXPORT_FILE.format(kind=kind)


def _export_record(config: RunConfig, kind: FurtherExport | None, steps: int) -> str:
    best = {"of": best_metric(config)} if config.checkpoint.export == "best" else {}
    return json.dumps({"directory": str(Path(config.checkpoint.exports[kind]).resolve()), "steps": steps,
                       **best}) + "\n"


def changed_since_check(config: RunConfig, checked: ResumeState) -> CheckpointError | None:
    """The error of a rank whose newest checkpoint is no longer what it was when the run was checked."""
    try:
        now = resume_state(config)
    except CheckpointError as error:
        return error
    if now == checked:
        return None
    return CheckpointError(f"{config.checkpoint.directory}: another run wrote {now.checkpoint} while this one started; "
                           "start it again")
