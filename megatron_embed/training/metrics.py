"""A run's metrics: measured speed and memory; written to metrics.jsonl, TensorBoard, Weights & Biases and the log."""

import contextlib
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.checkpoint.log_files import LogWriter
from megatron_embed.config.schema import LoggingConfig
from megatron_embed.errors import ConfigError, UserError
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.parallel.collectives import largest_of_each
from megatron_embed.parallel.topology import Topology
from megatron_embed.planning.flops import BACKWARD_COST, BACKWARD_COST_FROZEN, forward_flops
from megatron_embed.planning.hardware import gpu_named
from megatron_embed.platform.heap import resident_bytes
from megatron_embed.training.dashboards import CUSTOM_SCALARS, open_wandb
from megatron_embed.training.progress import Progress, TerminalLine

logger = logging.getLogger(__name__)

LOGGED = ("in_batch_accuracy", "accuracy", "masked_fraction", "grad_norm")
"""Metrics that a log line gives beside the loss, if the objective has them."""
LOGGED_OF_EVALUATIONS = ("loss", "ndcg@10", "spearman")
"""Metrics of the held-out rows, of retrieval and reranking, and of pairs that a log line gives for each set; those of
truncated vectors are only in the files."""
LOGGED_MARGINS = ("margin_to_mean_negative", "margin_to_hardest_negative")
"""Metrics of the held-out rows that end that line."""
METRICS_FILE = "metrics.jsonl"
OnStep = Callable[[int, Mapping[str, float]], None]
"""(step, metrics): called on every rank after each step, and after each evaluation with the keys `eval/NAME`."""


class Throughput:
    """Metrics of a run's speed and memory, from the texts of its steps.

    Model FLOPs are those of one forward and one backward pass over real tokens (docs/planning.md): padding, the
    gradient cache's other forward pass and recomputation are not counted, so they lower the utilization.
    """

    def __init__(self, models: Sequence[EmbeddingModel], topology: Topology) -> None:
        model, self._topology = models[0], topology
        self.set_rows: Counter[str] = Counter()
        self._shape, self._causal = model.shape, model.causal
        trains_all = all(parameter.requires_grad for parameter in model.parameters())
        self._cost = 1 + (BACKWARD_COST if trains_all else BACKWARD_COST_FROZEN)
        gpu = gpu_named(torch.cuda.get_device_name(topology.device)) if topology.device.type == "cuda" else None
        self._peak_tflops = None if gpu is None else gpu.peak_tflops
        self._waits, self._waited_seconds = 0, 0.0

    def of_step(self, *, tokens: float, squared_lengths: float, padded_tokens: float,
                seconds: float) -> dict[str, float]:
        """Metrics of a step of the whole run. No communication.

        Args:
            tokens, squared_lengths: sums over the step's texts of their lengths in tokens, and of the lengths' squares.
        """
        flops = self._cost * forward_flops(self._shape, tokens, squared_lengths, causal=self._causal)
        tflops = flops / seconds / self._topology.world_size / 1e12
        metrics = {"tokens_per_second": tokens / seconds, "padding_fraction": 1.0 - tokens / padded_tokens,
                   "step_seconds": seconds, "tflops_per_rank": tflops}
        return metrics if self._peak_tflops is None else {**metrics, "mfu": tflops / self._peak_tflops}

    def note_wait(self, seconds: float) -> None:
        """Take note of how long this rank has waited for the batch of a step."""
        self._waits += 1
        self._waited_seconds += seconds

    def row_shares(self) -> dict[str, float]:
        """The share of each data set in the rows since the start; none where there is only one."""
        return {f"row_share_{name}": count / self.set_rows.total() for name, count in sorted(self.set_rows.items())}

    def worst_rank(self) -> dict[str, float]:
        """GiB of the rank that holds most: on a GPU the peak of its tensors since the last call, on a CPU resident
        memory; and seconds per step since the last call that the rank which waited longest has waited for its batch.
        One small all-reduce over the world."""
        held = resident_bytes()
        if self._topology.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._topology.device)
            torch.cuda.reset_peak_memory_stats(self._topology.device)
        wait = round(1e9 * self._waited_seconds / max(1, self._waits))
        self._waits, self._waited_seconds = 0, 0.0
        most_held, longest_wait = largest_of_each([held, wait], dist.group.WORLD)
        return {"memory_gib": most_held / 2**30, "data_wait_seconds": longest_wait / 1e9}


class MetricsWriter:
    """Writer of metrics on one rank; on the others (`active` false) every call does nothing.

    A file that cannot be written (a full disk) does not raise: the other ranks would wait for this one. It is kept in
    `error`, which the loop raises on all ranks before the next step. The terminal's last line stays below the log's.
    """

    def __init__(self, directory: str | None, *, settings: LoggingConfig, progress: Progress, active: bool,
                 wandb_settings: dict[str, Any] | None = None, main_metric: str | None = None,
                 on_step: OnStep | None = None) -> None:
        """`wandb_settings`: the resolved configuration, for a run at Weights & Biases; None: no such run.

        `main_metric`: the evaluation metric that compares checkpoints; the log line of evaluations begins with it.
        """
        self.file: LogWriter | None = None
        self.board: Any = None
        self.wandb: Any = None
        self.error: UserError | None = None
        self.directory = directory
        self.progress = progress
        self._active, self._main_metric, self._on_step = active, main_metric, on_step
        if active and directory is not None:
            with self._noting_errors():
                self._open(Path(directory), settings, progress.first_step)
            if self.error is None and wandb_settings is not None:
                self.wandb = open_wandb(Path(directory), wandb_settings)
        self._terminal = TerminalLine(active=active)

    def step(self, step: int, metrics: Mapping[str, float], *, log: bool) -> None:
        """Metrics of optimizer step `step` (from 1). `log`: True for one of `logging.every_steps`."""
        self.progress.after_step(step, metrics)
        if (epoch := self.progress.epoch(step)) is not None:
            metrics = {**metrics, "epoch": round(epoch, 4)}
        self._terminal.show(self.progress, step, metrics)
        if log:
            self._write(step, metrics)
        if log and self._active:
            words = [f"{name.replace('_', ' ')} {metrics[name]:.3f}" for name in LOGGED if name in metrics]
            logger.info("step %d  loss %.4f  %s  lr %.2e  %.0f tokens/s  %s", step, metrics["loss"], "  ".join(words),
                        metrics["learning_rate"], metrics["tokens_per_second"], "  ".join(self.progress.fields(step)))
        line = self.progress.epoch_line(step)
        if line is not None and self._active:
            logger.info("%s", line)
        if self._on_step is not None:
            self._on_step(step, metrics)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Results of an evaluation after optimizer step `step` (0: before the first), by name; they are written as
        `eval/NAME`."""
        named = {f"eval/{name}": value for name, value in metrics.items()}
        self._write(step, named)
        if self._active:
            shown = [name for name in metrics if name.rpartition("/")[2] in LOGGED_OF_EVALUATIONS
                     and not re.search(r"(^|/)dim_\d+/", name) and name != self._main_metric]
            if self._main_metric is not None and self._main_metric in metrics:
                shown.insert(0, self._main_metric)
            shown += [name for name in LOGGED_MARGINS if name in metrics and name != self._main_metric]
            logger.info("step %d  evaluation: %s", step, "  ".join(f"{name} {metrics[name]:.4f}" for name in shown))
        if self._on_step is not None:
            self._on_step(step, named)

    def close(self) -> None:
        """Flushes and closes what is open."""
        self._terminal.close()
        for sink in (self.file, self.board):
            if sink is not None:
                with self._noting_errors():
                    sink.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _open(self, directory: Path, settings: LoggingConfig, first_step: int) -> None:
        self.file = LogWriter(directory / METRICS_FILE, first_step=first_step, max_mib=settings.max_file_mib)
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
            self.board.add_custom_scalars(CUSTOM_SCALARS)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._noting_errors():
            if self.file is not None:
                # JSON has no NaN.
                known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
                if self.file.append({"step": step, **known}) and self.board is not None:
                    self.board.close()  # the next scalar opens another file of events
            named = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
            if self.board is not None:
                for name, value in named.items():
                    self.board.add_scalar(name, value, step)
                self.board.flush()  # a run that is killed leaves no gap in its curves
            if self.wandb is not None:
                self.wandb.log(named, step=step)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.error = self.error or ConfigError(
                f"logging.directory = {self.directory!r}: the run's metrics cannot be written ({reason}); look at the "
                "disk, or name another directory", key="logging.directory")


def write_projector(directory: str, vectors: Tensor, labels: Sequence[tuple[str, str, str]],
                    step: int) -> UserError | None:
    """Write [texts, dim] with (set, role, text) of each for TensorBoard's projector, in place of those of an earlier
    start of the run. Returns the error if they cannot be written."""
    from torch.utils.tensorboard import SummaryWriter

    rows = [[name, role, " ".join(text.split())[:120]] for name, role, text in labels]  # a line each, no tabs
    folder = Path(directory) / "tensorboard"
    try:
        shutil.rmtree(folder / f"{step:05d}" / "evaluation", ignore_errors=True)
        (folder / "projector_config.pbtxt").unlink(missing_ok=True)
        with SummaryWriter(str(folder)) as board:
            board.add_embedding(vectors, metadata=rows, metadata_header=["set", "role", "text"], global_step=step,
                                tag="evaluation")
    except OSError as error:
        return ConfigError(f"logging.directory = {directory!r}: the projector's data cannot be written "
                           f"({error.strerror or error}); look at the disk, or name another directory",
                           key="logging.directory")
    return None
