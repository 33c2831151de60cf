"""A run's progress: its epoch, the time that is left, means over each epoch, and the last line of a terminal."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

AVERAGED = ("loss", "in_batch_accuracy", "accuracy")
"""Metrics whose means over an epoch are logged."""
SHOWN = (("loss", "loss", ".4f"), ("in_batch_accuracy", "accuracy", ".3f"), ("accuracy", "accuracy", ".3f"))
"""Metrics of a step on the terminal's last line: key, word and format."""


def epochs_done(steps: int, steps_per_epoch: float) -> int:
    """Whole epochs of so many steps."""
    return math.floor(round(steps / steps_per_epoch, 9))


def duration(seconds: float) -> str:
    """H:MM:SS, with days before it if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 24 else ""
    return f"{days}{hours % 24}:{minutes:02d}:{rest:02d}"


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first, as one line of `width` columns holds; the last column stays empty."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) >= width:
            break
        line = longer
    return line or parts[0][:max(0, width - 1)]


def terminal_width() -> int:
    """Columns of the terminal behind stderr; 80 where it cannot be asked, 0 if it has none (some containers)."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


class Progress:
    """Position of a run and means over its epochs, from the metrics of each of its steps.

    Args:
        train_steps: the step after which the run ends.
        first_step: steps that were done before this start.
        steps_per_epoch: not rounded; None: epochs are not counted.
    """

    def __init__(self, *, train_steps: int, first_step: int, steps_per_epoch: float | None) -> None:
        self.first_step = first_step
        self._train_steps, self._steps_per_epoch = train_steps, steps_per_epoch
        self._sums: dict[str, float] = {}
        self._count, self._since = 0, first_step
        self._first_end: tuple[int, float] | None = None
        self._left: float | None = None

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count step `step` (from 1)."""
        now = time.monotonic()
        if self._first_end is None:  # not counted: it compiles and fills caches
            self._first_end = step, now
        else:
            first, then = self._first_end
            self._left = (now - then) / (step - first) * (self._train_steps - step)
        if math.isfinite(metrics["loss"]):
            self._count += 1
            for name in AVERAGED:
                if name in metrics:
                    self._sums[name] = self._sums.get(name, 0.0) + metrics[name]

    def epoch(self, step: int) -> float | None:
        """Passes over the data after `step` steps; None if they are not counted."""
        return None if self._steps_per_epoch is None else step / self._steps_per_epoch

    def fields(self, step: int) -> list[str]:
        """Position after `step`: of how many steps, epoch, time that is left; from the second step of this start on."""
        epoch = self.epoch(step)
        return [f"{step}/{self._train_steps}", *([] if epoch is None else [f"epoch {epoch:.2f}"]),
                *([] if self._left is None else [f"ETA {duration(self._left)}"])]

    def terminal_line(self, step: int, metrics: Mapping[str, float], width: int) -> str:
        """The fields and the step's main metrics, the most important first, as far as a line of `width` holds them."""
        position, *rest = self.fields(step)
        words = [f"{word} {metrics[name]:{form}}" for name, word, form in SHOWN if name in metrics]
        return fitting([f"step {position}", *words, *reversed(rest), f"{metrics['tokens_per_second']:.0f} tokens/s",
                        f"lr {metrics['learning_rate']:.2e}"], width)

    def epoch_line(self, step: int) -> str | None:
        """Means over the epoch that ends with `step`, or over what the run's last step leaves of one; else None."""
        per_epoch, last = self._steps_per_epoch, step >= self._train_steps
        if per_epoch is None or not self._count:
            return None
        ends = epochs_done(step, per_epoch) > epochs_done(step - 1, per_epoch)
        if not ends and not last:
            return None
        means = "  ".join(f"{name.replace('_', ' ')} {total / self._count:.4f}" for name, total in self._sums.items())
        index = epochs_done(step, per_epoch) + (not ends)
        whole = self._train_steps / per_epoch
        of = f"epoch {index} of {whole:.4g}" if whole >= 1 else f"{whole:.2g} of an epoch"
        line = f"{of}, steps {self._since + 1} to {step}: mean {means}"
        self._sums, self._count, self._since = {}, 0, step
        return line


class TerminalLine:
    """The last line of a terminal, which stays below the log lines; nothing where stderr is not a terminal of some
    width."""

    def __init__(self, *, active: bool) -> None:
        self._bar: tqdm[None] | None = None
        self._above_bar = contextlib.ExitStack()
        if not active or not sys.stderr.isatty() or terminal_width() <= 0:
            return
        self._bar = tqdm(bar_format="{desc}", file=sys.stderr)
        self._above_bar.enter_context(logging_redirect_tqdm())

    def show(self, progress: Progress, step: int, metrics: Mapping[str, float]) -> None:
        """The position after `step`, cut to the width that the terminal has now."""
        if self._bar is not None:
            self._bar.set_description_str(progress.terminal_line(step, metrics, terminal_width() or 80), refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        """Leave the line as it is; messages go where they went before."""
        if self._bar is not None:
            self._bar.refresh()
        self._above_bar.close()
        if self._bar is not None:
            self._bar.close()
