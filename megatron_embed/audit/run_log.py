"""A run's directory as an audit reads it: audit.jsonl, the kept checkpoints, the configuration of each start."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_embed.audit.record_checks import checked_record
from megatron_embed.checkpoint.files import step_directories
from megatron_embed.checkpoint.log_files import LARGEST_LOG, lines_of_log, log_exists, objects_of_log
from megatron_embed.config.json_file import json_value
from megatron_embed.config.load import load_config, read_resolved
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import CheckpointError, ConfigError, UserError
from megatron_embed.training.audit_log import AUDIT_FILE
from megatron_embed.training.metrics import METRICS_FILE


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What audit.jsonl holds, and where the checkpoints are."""

    directory: Path
    """The directory of audit.jsonl."""
    checkpoints: dict[int, Path]
    """By optimizer steps done, ascending."""
    starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Records of the starts, by the steps done before; of several after the same steps the last."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    saves: dict[int, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows of metrics.jsonl, by step."""

    def start_of(self, step: int) -> tuple[int, dict[str, Any]]:
        """(steps done before, record) of the start in which a step was made. Raises ConfigError if there is none."""
        first = max((done for done in self.starts if done < step), default=None)
        if first is None:
            raise ConfigError(f"--step {step}: {self.directory / AUDIT_FILE}: no start of the run before this step; "
                              "choose a step behind one", key="--step")
        return first, self.starts[first]["start"]

    def checkpoint_before(self, step: int) -> tuple[int, Path | None]:
        """(steps done, the newest kept checkpoint at or before step - 1); (0, None): the model that the run began
        with."""
        done = max((steps for steps in self.checkpoints if steps < step), default=0)
        return (done, self.checkpoints[done]) if done else (0, None)


def read_run(path: str, step: int) -> RunLog:
    """Read a run's directory. No communication.

    Raises:
        ConfigError: there is no such run, or no such step in its log.
        CheckpointError: the log is damaged.
    """
    run, checkpoints = Path(path), step_directories(Path(path))
    directory = run if log_exists(run / AUDIT_FILE) else _other_directory(run, "logging")
    if not log_exists(directory / AUDIT_FILE):
        raise ConfigError(f"{run}: there is no {AUDIT_FILE}, so it is not the directory of a run of this version; name "
                          "its checkpoint.directory", key="RUN")
    log = RunLog(directory=directory, checkpoints=checkpoints or step_directories(_other_directory(run, "checkpoint")))
    _read_records(directory / AUDIT_FILE, log)
    _read_metrics(directory / METRICS_FILE, log)
    if step not in log.steps:
        known = f"its log has the steps {min(log.steps)} to {max(log.steps)}" if log.steps else "its log has no step"
        raise ConfigError(f"--step {step}: {directory / AUDIT_FILE}: {known}; choose one of them", key="--step")
    log.start_of(step)
    return log


def configuration_of(log: RunLog, step: int, digest_of: Any) -> tuple[RunConfig, list[str]]:
    """(settings with which a step was made, what is wrong with them in words).

    Args:
        digest_of: configuration -> the hash that the run's starts note.
    """
    wanted, problems, newest = log.start_of(step)[1].get("settings"), [], None
    later = [path for done, path in log.checkpoints.items() if done >= step]
    earlier = [path for done, path in log.checkpoints.items() if done < step]
    folders = [*later, *reversed(earlier), log.directory / ".assets", log.directory]
    if log.checkpoints:
        folders.append(next(iter(log.checkpoints.values())).parent / ".assets")
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            continue
        try:
            config = load_config(str(folder / "config.yaml"), [])
        except UserError as error:
            problems.append(f"{folder / 'config.yaml'} cannot be read: {error}")
            continue
        if digest_of(config) == wanted:
            return config, []
        newest = newest or config
        problems.append(f"{folder / 'config.yaml'} is not what the run was started with")
    if newest is None:
        raise ConfigError(f"{log.directory}: no config.yaml of the run is left, neither beside {AUDIT_FILE} nor in a "
                          "checkpoint; put one back", key="RUN")
    return newest, problems


def _other_directory(run: Path, section: str) -> Path:
    """The run's other directory, as the newest config.yaml in this one says; this one where it does not."""
    known = [*(path / "config.yaml" for path in reversed(list(step_directories(run).values()))), run / "config.yaml"]
    for file in known:
        if file.is_file():
            named = read_resolved(file).get(section, {}).get("directory")
            return Path(named) if isinstance(named, str) and named else run
    return run


def _read_metrics(file: Path, log: RunLog) -> None:
    """The rows of a log of metrics that have a loss; those that cannot be read are left out."""
    if not log_exists(file):
        return
    try:
        for row in objects_of_log(file, LARGEST_LOG):
            if "loss" in row and type(row.get("step")) is int:
                log.metrics[row["step"]] = row
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_records(path: Path, log: RunLog) -> None:
    try:
        for file, line_number, line in lines_of_log(path, LARGEST_LOG):
            try:
                record = checked_record(json_value(line))
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return  # cut short by a kill, or being written
                raise CheckpointError(f"{file}:{line_number}: not readable ({error}); the log is damaged") from error
            kind = log.starts if "start" in record else log.saves if "save" in record else log.steps
            kind[record["step"]] = record
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror}); the log is damaged")
