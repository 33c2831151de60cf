"""The loop around the step: clocks, logs, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_embed.batch import StepBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError, UserError
from megatron_embed.parallel.collectives import raise_first, sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.heap import HeapWatch
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.step import Trainer, seed_step, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens between steps. Each is called on all ranks."""

    load_batch: Callable[[int], StepBatch]
    """Number of the step, from 0 -> this rank's share of it. No communication: another rank may fail here."""
    evaluate: Callable[[], dict[str, float]] | None
    """Metrics by name, equal on all ranks."""
    agree: Callable[[StepBatch], StepBatch] | None
    """Gives all data-parallel ranks as many micro-batches, of one size; null where they have as many."""
    save: Callable[[int, bool], None] | None
    """(steps done, whether it is the last) -> writes a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A step's share of this rank, which every rank of the world has as well."""

    batch: StepBatch
    tokens: float
    """Real tokens of the step over all data-parallel ranks."""
    padded_tokens: float
    """The same, padding included."""
    truncated_fraction: float
    """Share of the step's texts that were cut to their role's length."""


def load_agreed(hooks: Hooks, step: int, topology: Topology, error: UserError | None = None) -> Loaded:
    """The batch of a step, or on every rank the error of the lowest rank that has none.

    One all-reduce of five numbers over the world; an error alone costs another collective. The world and not the
    data-parallel group: a file may change between two twins that read the same rows.

    `error`: what this rank alone has met since the last step.
    """
    batch = None
    try:
        batch = hooks.load_batch(step)
    except UserError as found:
        error = error or found
    micro_batches = () if batch is None else batch.micro_batches
    real = sum(micro.num_tokens for micro in micro_batches)
    padded = sum(micro.token_ids.numel() for micro in micro_batches)
    texts, cut = sum(micro.num_sequences for micro in micro_batches), 0 if batch is None else batch.num_truncated
    counts = torch.tensor([real, padded, texts, cut, error is not None], dtype=torch.float64, device=topology.device)
    real_sum, padded_sum, texts_sum, cut_sum, failed = sum_over(counts, dist.group.WORLD).tolist()
    if failed:
        raise_first(error)
    assert batch is not None
    twins = topology.world_size // topology.dp_size
    if hooks.agree is not None:
        batch = hooks.agree(batch)
        padded_sum = sum(micro.token_ids.numel() for micro in batch.micro_batches) * topology.world_size
    return Loaded(batch=batch, tokens=real_sum / twins, padded_tokens=padded_sum / twins,
                  truncated_fraction=cut_sum / texts_sum)


def train(config: RunConfig, trainer: Trainer, hooks: Hooks, writer: MetricsWriter, topology: Topology, *,
          first_step: int, train_steps: int) -> dict[str, float]:
    """Optimizer steps first_step .. train_steps - 1. Returns the last step's metrics (empty if there was none)."""
    metrics: dict[str, float] = {}
    heap = HeapWatch()
    for step in range(first_step, train_steps):
        start = time.perf_counter()
        loaded = load_agreed(hooks, step, topology, writer.error)
        seed_step(config.training.seed, step, topology)
        metrics = train_step(loaded.batch, trainer)
        if not math.isfinite(metrics["loss"]):
            raise ConfigError(f"training.learning_rate = {config.training.learning_rate}: the loss became "
                              f"{metrics['loss']} in step {step + 1}; lower it, raise warmup_steps, or look at the "
                              "rows of that step")
        done, last = step + 1, step + 1 == train_steps
        seconds = time.perf_counter() - start
        if loaded.batch.data_set is not None:
            metrics |= {f"{loaded.batch.data_set}/{name}": value for name, value in metrics.items()
                        if name not in ("grad_norm", "learning_rate")}
        metrics |= {"tokens_per_second": loaded.tokens / seconds,
                    "padding_fraction": 1.0 - loaded.tokens / loaded.padded_tokens, "step_seconds": seconds,
                    "truncated_fraction": loaded.truncated_fraction}
        writer.step(done, metrics, log=done % config.logging.every_steps == 0 or last)
        if hooks.evaluate is not None and (done % config.evaluation.every_steps == 0 or last):
            writer.evaluation(done, {f"eval/{name}": value for name, value in hooks.evaluate().items()})
        if hooks.save is not None and (done % config.checkpoint.save_every_steps == 0 or last):
            hooks.save(done, last)
        heap.after_step()
    writer.close()
    raise_first(writer.error)
    return metrics
