"""Metrics and configuration of a run, as `doctor --run` reads them. Loads no library."""

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.log_files import LARGEST_LOG, log_exists, objects_of_log
from megatron_embed.config.load import read_resolved
from megatron_embed.errors import ConfigError
from megatron_embed.models.reranker_settings import RERANKER_FILE, read_reranker_settings

CONFIGURATIONS = ("step_*/config.yaml", ".assets/config.yaml", "config.yaml")
"""Files with the resolved configuration of a run: in checkpoints, before the first one, and beside metrics that lie
elsewhere. The last one counts."""
_LARGEST_NUMBER = 1e100
"""Larger numbers of a log are left out, as those that are not finite: sums and ratios of others stay finite."""


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """Logged metrics and configuration of a run. All numbers in it are finite."""

    steps: Sequence[Mapping[str, float]]
    """Rows of optimizer steps, of the logged ones only; values that were not finite are absent."""
    evaluations: Sequence[Mapping[str, float]]
    """Rows of evaluations, the one before the first step (step 0) included."""
    config: Mapping[str, Any]
    """Settings by section; empty: unknown."""
    suspicious: Sequence[Mapping[str, Any]] = ()
    """Lines of suspicious_steps.jsonl: steps that were skipped or whose loss or gradient jumped, with their rows."""

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key; `default` if it is not known."""
        section, _, name = key.partition(".")
        values = self.config.get(section)
        return values.get(name, default) if isinstance(values, dict) else default

    def number(self, key: str) -> float | None:
        """A setting that is a number; None if it is not known.

        Raises:
            ConfigError: the run's configuration has something else there.
        """
        value = self.setting(key)
        if value is not None and (number := _finite(value)) is None:
            raise ConfigError(f"--run: the run's configuration has {key} = {value!r:.80}, which must be a number; "
                              "correct its config.yaml, or take that of another checkpoint", key="--run")
        return None if value is None else number

    def values(self, name: str) -> list[float]:
        """A metric of the steps that have it."""
        return [row[name] for row in self.steps if name in row]

    def early(self, name: str) -> float | None:
        """Median of a metric over the first tenth of the steps; None if no step has it."""
        values = self.values(name)
        return statistics.median(values[:max(1, len(values) // 10)]) if values else None

    def late(self, name: str) -> float | None:
        """Median of a metric over the last quarter of the steps; None if no step has it."""
        values = self.values(name)
        return statistics.median(values[-max(1, len(values) // 4):]) if values else None

    @property
    def chance_loss(self) -> float | None:
        """InfoNCE of vectors that tell nothing: log of the candidates; None: another loss, such as that of joint heads,
        or unknown."""
        negatives = self.late("negatives_per_query")
        if self.setting("objective.loss", "info_nce") != "info_nce" or self.setting("embedding.head") == "joint" or (
                negatives is None or negatives < 0 or not self.values("in_batch_accuracy")):
            return None
        return math.log(1 + negatives)


def read_run(directory: str) -> RunLog:
    """Metrics and configuration of a run. A line that a kill cut short is left out.

    Args:
        directory: of the run's checkpoints or logs, or the folder above the only such one.
    Raises:
        ConfigError: no metrics there, or no step was logged.
    """
    folder = Path(directory)
    below = [file.parent for file in folder.glob("*/metrics.jsonl")]
    own = [file for pattern in ("metrics.jsonl", *CONFIGURATIONS) for file in folder.glob(pattern)]
    if len(below) == 1 and not own:
        folder = below[0]
    files = [name for pattern in CONFIGURATIONS for name in sorted(folder.glob(pattern)) if name.is_file()]
    config: dict[str, Any] = read_resolved(files[-1]) if files else {}
    if isinstance(reranker := config.get("reranker"), dict) and reranker.get("max_length") is None:
        config["reranker"] = {**reranker, "max_length": _length_of_pairs(folder)}
    file = folder / "metrics.jsonl"
    elsewhere = config.get("logging", {}).get("directory")
    if not log_exists(file) and isinstance(elsewhere, str) and elsewhere:
        file = Path(elsewhere) / "metrics.jsonl"
    try:
        rows = list(_rows(file))
        suspicious = _suspicious(file.parent / "suspicious_steps.jsonl")
    except OSError as error:
        raise ConfigError(f"--run {directory}: {error.filename or file} cannot be read ({error.strerror}); name the "
                          "checkpoint.directory or logging.directory of a run", key="--run") from None
    log = RunLog(steps=[row for row in rows if "learning_rate" in row], config=config, suspicious=suspicious,
                 evaluations=[row for row in rows if any(name.startswith("eval/") for name in row)])
    if not log.steps:
        raise ConfigError(f"--run {directory}: no step is logged in {file} yet; ask again after "
                          "logging.every_steps steps", key="--run")
    return log


def _length_of_pairs(folder: Path) -> int | None:
    """Tokens of a reranker's pair where the configuration leaves it to the model; None without a checkpoint."""
    found = (read_reranker_settings(file.parent) for file in folder.glob(f"step_*/hf/{RERANKER_FILE}"))
    return next((settings.max_length for settings in found if settings is not None), None)


def _rows(file: Path) -> Iterator[dict[str, float]]:
    """The rows of a log that are of a step, with their numbers. Raises OSError as `lines_of_log`."""
    for row in objects_of_log(file, LARGEST_LOG):
        numbers = {name: number for name, value in row.items() if (number := _finite(value)) is not None}
        if "step" in numbers:
            yield numbers


def _finite(value: object) -> float | None:
    """The value, if it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_NUMBER:
        return None
    return float(value)


def _suspicious(file: Path) -> list[dict[str, Any]]:
    return list(objects_of_log(file, LARGEST_LOG)) if os.path.lexists(file) else []
