"""Where a run's numbers go: metrics.jsonl, TensorBoard, the log, a progress bar on a terminal."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes on one rank; on the others (`active` false) every call does nothing."""

    def __init__(self, directory: str | None, *, tensorboard: bool, train_steps: int, first_step: int,
                 active: bool) -> None:
        self.file = self.board = self.bar = None
        if not active:
            return
        if directory is not None:
            path = Path(directory)
            path.mkdir(parents=True, exist_ok=True)
            if first_step:
                keep_until(path / "metrics.jsonl", first_step)
            else:
                move_aside(path / "metrics.jsonl")
            self.file = (path / "metrics.jsonl").open("a", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(path / "tensorboard"), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(total=train_steps, initial=first_step, unit="step", file=sys.stderr)
        self.active = active

    def step(self, step: int, metrics: dict[str, float], *, log: bool) -> None:
        """After optimizer step number `step` (from 1). `log`: whether this is one of `logging.every_steps`."""
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{metrics['learning_rate']:.2e}", refresh=False)
        if log:
            self._write(step, metrics)
            if self.bar is None and self.file is not None:
                logger.info("step %d  loss %.4f  accuracy %.3f  grad norm %.3f  lr %.2e  %.0f tokens/s", step,
                            metrics["loss"], metrics["in_batch_accuracy"], metrics["grad_norm"],
                            metrics["learning_rate"], metrics["tokens_per_second"])

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Results of an evaluation after optimizer step `step`, keys already prefixed `eval/`."""
        self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes what is open."""
        for sink in (self.file, self.board, self.bar):
            if sink is not None:
                sink.close()


def move_aside(path: Path) -> None:
    """Keeps an earlier run's file as metrics.1.jsonl, metrics.2.jsonl, ... when a new run starts in its directory."""
    if path.exists() and path.stat().st_size:
        number = 1
        while (kept := path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        path.rename(kept)
        logger.info("kept the metrics of an earlier run as %s", kept)


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of `metrics.jsonl` after optimizer step `step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # cut short by a kill in the middle of a write
        if values["step"] > step:
            break
        kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")  # a kill leaves the old file or the new one
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
