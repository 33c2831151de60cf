"""The best checkpoint of a run so far: its metric and value, the link to it, and the evaluations since."""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_embed.checkpoint.files import BEST, remove_old, sync_directory, write_atomically
from megatron_embed.checkpoint.save import on_rank_0
from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.parallel.collectives import broadcast_from_rank0

logger = logging.getLogger(__name__)

VALUE_FILE = "best.json"
"""File in the best checkpoint: its step, metric and value. So moving the link moves all of them at once."""
EVALUATIONS_FILE = "evaluations.json"
"""File in a run's directory: the steps that were evaluated since the best one, and the metric that compares them."""


def smaller_is_better(metric: str) -> bool:
    """True for losses, and for the similarity to documents that do not belong to the query."""
    return re.fullmatch(r"(.*/)?(loss(@[a-z0-9@]+)?|negative_similarity)", metric) is not None


class BestCheckpoint:
    """A run's best value of a metric, and its checkpoint. An equal value does not replace the first."""

    def __init__(self, directory: str, metric: str, first_step: int, *, patience: int | None = None,
                 keep_every: int | None = None) -> None:
        """Read from `directory`, unless it compares by another metric or is of a step that this run has yet to do.

        `patience`: evaluations without a better value after which the run is over; None: no limit. `keep_every`:
        see `remove_old`. No communication.
        """
        self._directory, self._metric, self._patience = Path(directory), metric, patience
        self._keep_every = keep_every
        self._sign = -1.0 if smaller_is_better(metric) else 1.0
        self._value = -math.inf * self._sign
        self._step: int | None = None
        self._pending = False
        known = self._read(self._directory / BEST / VALUE_FILE, f"remove {self._directory / BEST}, and the best is "
                           "searched again", {"step": int, "metric": str, "value": float})
        if known is not None and known["metric"] == metric and known["step"] <= first_step:
            self._step, self._value = known["step"], known["value"]
        known = self._read(self._directory / EVALUATIONS_FILE, "remove it, and evaluations are counted again",
                           {"metric": str, "steps": list})
        self._waited: list[int] = []
        if known is not None and known["metric"] == metric:
            self._waited = [step for step in known["steps"] if (self._step or 0) < step <= first_step]

    @staticmethod
    def _read(file: Path, remedy: str, types: dict[str, type]) -> dict[str, Any] | None:
        """The values of a small file of ours; None if there is none."""
        if not file.is_file():
            return None
        try:
            known = read_json_file(file)
            return {key: type_(known[key]) for key, type_ in types.items()}
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{file}: not readable ({error!r}); {remedy}") from error

    @property
    def is_over(self) -> bool:
        """True if as many evaluations as the patience allows gave nothing better: the run ends here."""
        return self._patience is not None and len(self._waited) >= self._patience

    @property
    def checkpoint(self) -> tuple[Path, int]:
        """The best checkpoint and its steps, once it is saved.

        Raises:
            CheckpointError: there is none by this metric.
        """
        if self._step is None:
            raise CheckpointError(f"checkpoint.export = 'best': no evaluation of the run in {self._directory} gave a "
                                  f"best checkpoint by {self._metric}; set it to last", key="checkpoint.export")
        return self._directory / f"step_{self._step:06d}", self._step

    @property
    def so_far(self) -> tuple[str, int, float] | None:
        """Metric, step and value of the best evaluation; None: there was none."""
        return None if self._step is None else (self._metric, self._step, self._value)

    def improves(self, step: int, metrics: Mapping[str, float]) -> bool:
        """True if this evaluation after `step` steps is the best so far; then the next `mark` names its checkpoint.

        Called by all ranks, which take the value of rank 0: one broadcast over the world, and see on_rank_0.

        Raises:
            ConfigError: the evaluation has no such metric, on every rank.
        """
        if self._metric not in metrics:
            raise ConfigError(f"evaluation.best_metric = {self._metric!r}: nothing contributed to it in the evaluation "
                              f"after {step} steps; choose one of {', '.join(metrics)}", key="evaluation.best_metric")
        value = float(broadcast_from_rank0(repr(float(metrics[self._metric]))))
        better = value * self._sign > self._value * self._sign
        if better:
            self._step, self._value, self._pending = step, value, True
        # A step is evaluated twice where a run was killed before its checkpoint said that this was done.
        self._waited = [] if better else [*(other for other in self._waited if other != step), step]
        if not better:  # a better one lets the older steps be ignored, once its checkpoint is complete
            on_rank_0(lambda: write_atomically(self._directory / EVALUATIONS_FILE, json.dumps(
                {"metric": self._metric, "steps": self._waited}) + "\n"), self._directory / BEST)
            if self.is_over:
                logger.info("%s has not been better than %.4f (step %s) for %d evaluations: the run ends", self._metric,
                            self._value, self._step, len(self._waited))
        return better

    def mark(self, step: int, keep: int) -> None:
        """After a checkpoint was saved: point `best` at it if it is the best, and release the former one.

        That one stays only if it is among the newest `keep`. Called by all ranks; see on_rank_0.
        """
        if not self._pending:
            return
        self._pending = False
        name = f"step_{step:06d}"

        def write() -> None:
            pointer, temporary = self._directory / BEST, self._directory / f".{BEST}.tmp"
            temporary.unlink(missing_ok=True)
            os.symlink(name, temporary)  # relative, so that the folder may be moved
            write_atomically(self._directory / name / VALUE_FILE, json.dumps(
                {"step": step, "metric": self._metric, "value": self._value}) + "\n")
            temporary.replace(pointer)
            sync_directory(self._directory)
            remove_old(self._directory, keep, self._keep_every)
            logger.info("%s is the best so far: %s = %.4f", name, self._metric, self._value)

        on_rank_0(write, self._directory / name)
