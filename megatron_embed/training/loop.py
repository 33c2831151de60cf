"""The loop around the step: clocks, logs, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.step import Trainer, seed_step, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens between steps. Each is called on all ranks."""

    load_batch: Callable[[int], EmbedBatch]
    """Number of the step, from 0 -> this rank's share of it."""
    evaluate: Callable[[], dict[str, float]] | None
    """Metrics by name, equal on all ranks."""
    save: Callable[[int, bool], None] | None
    """(steps done, whether it is the last) -> writes a checkpoint."""


def token_counts(batch: EmbedBatch, topology: Topology) -> tuple[float, float]:
    """(real tokens, padded tokens) of the step over all data-parallel ranks."""
    real = sum(micro.num_tokens for micro in batch.micro_batches)
    padded = sum(micro.token_ids.numel() for micro in batch.micro_batches)
    counts = torch.tensor([real, padded], dtype=torch.float64, device=topology.device)
    total = sum_over(counts, topology.dp_group).tolist()
    return total[0], total[1]


def train(config: RunConfig, trainer: Trainer, hooks: Hooks, writer: MetricsWriter, topology: Topology, *,
          first_step: int, train_steps: int) -> dict[str, float]:
    """Optimizer steps first_step .. train_steps - 1. Returns the last step's metrics (empty if there was none)."""
    metrics: dict[str, float] = {}
    for step in range(first_step, train_steps):
        start = time.perf_counter()
        batch = hooks.load_batch(step)
        seed_step(config.training.seed, step, topology)
        metrics = train_step(batch, trainer)
        if not math.isfinite(metrics["loss"]):
            raise ConfigError(f"training.learning_rate = {config.training.learning_rate}: the loss became "
                              f"{metrics['loss']} in step {step + 1}; lower it, raise warmup_steps, or look at the "
                              "rows of that step")
        done, last = step + 1, step + 1 == train_steps
        real, padded = token_counts(batch, topology)
        seconds = time.perf_counter() - start
        metrics |= {"tokens_per_second": real / seconds, "padding_fraction": 1.0 - real / padded,
                    "step_seconds": seconds}
        writer.step(done, metrics, log=done % config.logging.every_steps == 0 or last)
        if hooks.evaluate is not None and (done % config.evaluation.every_steps == 0 or last):
            writer.evaluation(done, {f"eval/{name}": value for name, value in hooks.evaluate().items()})
        if hooks.save is not None and (done % config.checkpoint.save_every_steps == 0 or last):
            hooks.save(done, last)
    return metrics
