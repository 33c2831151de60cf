"""Steps that go wrong: those without a finite loss or gradient, and those whose loss jumps; which rows they had."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_embed.checkpoint.log_files import open_to_append
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

REPORT_FILE = "suspicious_steps.jsonl"
WINDOW = 100
"""Steps over which mean and deviation are taken."""
LEAST = 20
"""Steps before the first judgement."""


class Health:
    """Counts skipped steps, and reports them and jumps of loss and gradient norm with the rows of the step.

    Equal on all ranks; only the one with `active` writes.

    Args:
        sources: step, from 0 -> FILE:LINE of its rows.
        directory: folder of REPORT_FILE; None: no file is written.
    """

    def __init__(self, config: RunConfig, sources: Callable[[int], Sequence[str]], directory: str | None, *,
                 active: bool) -> None:
        self._config = config
        self._sources = sources
        self._file = Path(directory) / REPORT_FILE if directory is not None and active else None
        self._active = active
        self._recent = {name: deque[float](maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self._skipped_in_a_row = 0
        self.skipped = 0
        """Steps of this process that were skipped."""

    def after_step(self, step: int, metrics: dict[str, float], *, skipped: bool) -> None:
        """Checks step `step` (from 0).

        Raises:
            ConfigError: more steps in a row were skipped than `training.max_skipped_steps` allows.
        """
        if skipped:
            self._count_skipped(step, metrics)
            return
        self._skipped_in_a_row = 0
        for name, recent in self._recent.items():
            jump = deviations(metrics[name], recent)
            limit = self._config.logging.spike_deviations
            if limit and jump > limit:
                self._report(step, metrics, f"{name} = {metrics[name]:.4g} is {jump:.1f} standard deviations above the "
                             f"mean of {len(recent)} steps, {statistics.fmean(recent):.4g}")
            recent.append(metrics[name])

    def _count_skipped(self, step: int, metrics: dict[str, float]) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        what = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
        self._report(step, metrics, f"{what} = {metrics[what]}: skipped, the parameters stay as they were")
        training = self._config.training
        if self._skipped_in_a_row > training.max_skipped_steps:
            few = f"{self._skipped_in_a_row} steps in a row, " if self._skipped_in_a_row > 1 else ""
            raise ConfigError(f"training.learning_rate = {training.learning_rate}: the {what} became {metrics[what]} "
                              f"in step {step + 1} ({few}training.max_skipped_steps = {training.max_skipped_steps}); "
                              "lower it, raise warmup_steps, or look at the rows of that step",
                              key="training.learning_rate")

    def _report(self, step: int, metrics: dict[str, float], what: str) -> None:
        """A warning, and a line in the file; a disk that fails here must not end the run."""
        if not self._active:
            return
        try:
            rows = list(self._sources(step))
        except UserError as error:
            rows = [str(error)]
        all_rows = "" if self._file is None else f"; all of them in {self._file}"
        logger.warning("step %d: %s; rows %s%s%s", step + 1, what, ", ".join(rows[:3]), ", ..." if rows[3:] else "",
                       all_rows if rows[3:] else "")
        if self._file is None:
            return
        line = {"step": step + 1, "what": what, "loss": str(metrics["loss"]), "grad_norm": str(metrics["grad_norm"]),
                "rows": rows}
        try:
            with open_to_append(self._file) as file:
                file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self._file, error.strerror)


def deviations(value: float, recent: Sequence[float]) -> float:
    """Standard deviations by which `value` exceeds the mean of `recent`; 0 if there are fewer than LEAST.

    The deviation counts as at least 1 % of the mean: ripples of a curve that has become flat are not reported.
    """
    if len(recent) < LEAST:
        return 0.0
    mean = statistics.fmean(recent)
    return (value - mean) / max(statistics.pstdev(recent, mean), 0.01 * abs(mean), 1e-12)
