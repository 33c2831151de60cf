"""The loop around the step: clocks, logs, evaluations, checkpoints."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_embed.batch import StepBatch
from megatron_embed.checkpoint.save import Saver
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import PreemptedError, UserError
from megatron_embed.parallel.collectives import largest, raise_on_all_ranks, sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.heap import HeapWatch
from megatron_embed.training.health import Health
from megatron_embed.training.metrics import MetricsWriter
from megatron_embed.training.step import Trainer, seed_step, train_step
from megatron_embed.training.stopping import StopRequest
from megatron_embed.training.throughput import Throughput


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens between steps. Each is called on all ranks."""

    load_batch: Callable[[int], StepBatch]
    """Number of the step, from 0 -> this rank's share of it. No communication: another rank may fail here."""
    evaluate: Callable[[], dict[str, float]] | None
    """Metrics by name, equal on all ranks."""
    agree: Callable[[StepBatch], StepBatch] | None
    """Gives all data-parallel ranks as many micro-batches, of one size; null where they have as many."""
    saver: Saver | None
    """Writes checkpoints."""
    is_best: Callable[[int, dict[str, float]], bool] | None
    """Whether these metrics, after so many steps, are the run's best so far; then a checkpoint is saved as well. Null:
    nobody asks."""
    is_over: Callable[[], bool]
    """After an evaluation: whether the run ends with this step, equal on all ranks."""
    stop: StopRequest
    """Whether this rank wants to stop early; ranks may differ."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A step's share of this rank, which every rank of the world has as well."""

    batch: StepBatch
    tokens: float
    """Real tokens of the step over all data-parallel ranks."""
    padded_tokens: float
    """The same, padding included."""
    squared_lengths: float
    """Sum over the step's texts of the squares of their lengths in tokens."""
    truncated_fraction: float
    """Share of the step's texts that were cut to their role's length."""
    signalled: bool
    """Whether some rank was told to stop."""
    time_is_up: bool
    """Whether some rank has spent its time."""


def load_agreed(hooks: Hooks, step: int, topology: Topology, error: UserError | None = None) -> Loaded:
    """The batch of a step, or on every rank the error of the lowest rank that has none.

    One all-reduce of eight numbers over the world; an error alone costs another collective. The world and not the
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
    squares = sum(int(micro.cu_seqlens.diff().square().sum()) for micro in micro_batches)
    texts, cut = sum(micro.num_sequences for micro in micro_batches), 0 if batch is None else batch.num_truncated
    counts = torch.tensor([real, padded, squares, texts, cut, hooks.stop.signalled, hooks.stop.time_is_up,
                           error is not None], dtype=torch.float64, device=topology.device)
    real_sum, padded_sum, squares_sum, texts_sum, cut_sum, signalled, time_is_up, failed = sum_over(
        counts, dist.group.WORLD).tolist()
    if failed:
        raise_on_all_ranks(error)
    assert batch is not None
    twins = topology.world_size // topology.dp_size
    if hooks.agree is not None:
        batch = hooks.agree(batch)
        padded_sum = sum(micro.token_ids.numel() for micro in batch.micro_batches) * topology.world_size
    return Loaded(batch=batch, tokens=real_sum / twins, padded_tokens=padded_sum / twins,
                  squared_lengths=squares_sum / twins, truncated_fraction=cut_sum / texts_sum,
                  signalled=signalled > 0, time_is_up=time_is_up > 0)


def train(config: RunConfig, trainer: Trainer, hooks: Hooks, writer: MetricsWriter, topology: Topology,
          health: Health, *, first_step: int, train_steps: int, evaluation_owed: bool = False) -> dict[str, float]:
    """Optimizer steps first_step .. train_steps - 1, fewer if `hooks.is_over`. Returns the last step's metrics (empty
    if there was none).

    `evaluation_owed`: the run stopped before it had evaluated what it goes on from; that comes first.

    Raises:
        PreemptedError: on every rank, once the step under way is done and saved, if some rank was asked to stop.
        ConfigError: losses that are not finite, see Health.
    """
    metrics: dict[str, float] = {}
    heap, throughput, saved, logged_skips = HeapWatch(), Throughput(trainer.gradients.models, topology), first_step, 0
    if evaluation_owed and make_up_for_evaluation(hooks, writer, first_step):
        train_steps = first_step
    for step in range(first_step, train_steps):
        start = time.perf_counter()
        loaded = load_agreed(hooks, step, topology, writer.error)
        # At least one step per start: a run whose time is always up too early would be started again for ever.
        if loaded.signalled or (loaded.time_is_up and step > first_step):
            trainer.complete_parameters()
            leave_early(hooks, writer, step, saved)
        seed_step(config.training.seed, step, topology)
        metrics = train_step(loaded.batch, trainer)
        health.after_step(step, metrics, skipped=bool(metrics.pop("skipped")))
        done, last = step + 1, step + 1 == train_steps
        if last or done % config.evaluation.every_steps == 0 or done % config.checkpoint.save_every_steps == 0:
            trainer.complete_parameters()  # for the evaluation, the checkpoint, the export
        seconds = time.perf_counter() - start
        if loaded.batch.data_set is not None:
            metrics |= {f"{loaded.batch.data_set}/{name}": value for name, value in metrics.items()
                        if name not in ("grad_norm", "learning_rate")}
        metrics |= throughput.of_step(tokens=loaded.tokens, squared_lengths=loaded.squared_lengths,
                                      padded_tokens=loaded.padded_tokens, seconds=seconds)
        metrics |= {"truncated_fraction": loaded.truncated_fraction}
        log = done % config.logging.every_steps == 0 or last
        memory = throughput.memory() if log else {}
        writer.step(done, {**metrics, **memory, "skipped_steps": health.skipped - logged_skips}, log=log)
        logged_skips = health.skipped if log else logged_skips
        evaluated = evaluation_due(config, hooks, done, last)
        best = evaluated and evaluate(hooks, writer, done, saved, last)
        over = evaluated and hooks.is_over()
        if hooks.saver is not None:
            hooks.saver.poll()
            if done % config.checkpoint.save_every_steps == 0 or last or best or over:
                hooks.saver.save(done)
                saved = done
        if over:
            break
        heap.after_step()
    if hooks.saver is not None:
        hooks.saver.finish()
    writer.close()
    raise_on_all_ranks(writer.error)
    return metrics


def make_up_for_evaluation(hooks: Hooks, writer: MetricsWriter, done: int) -> bool:
    """The evaluation that was due after `done` steps, whose checkpoint this run goes on from; whether the run is over
    by it. Called by all ranks."""
    if hooks.evaluate is not None:
        evaluate(hooks, writer, done, done, True)
    if hooks.saver is not None:
        hooks.saver.mark_evaluation(done, owed=False)
    return hooks.evaluate is not None and hooks.is_over()


def evaluate(hooks: Hooks, writer: MetricsWriter, done: int, saved: int, last: bool) -> bool:
    """Evaluates and writes the metrics down; whether they are the best so far. Called by all ranks.

    The evaluation is left out, or broken off between two batches, if some rank is asked to stop, and the run stops
    here; its checkpoint says that it is owed. After the `last` step it is made although the time is up.

    Raises:
        PreemptedError: on every rank, then.
    """
    assert hooks.evaluate is not None
    if largest(int(hooks.stop.signalled or (hooks.stop.time_is_up and not last)), dist.group.WORLD):
        leave_early(hooks, writer, done, saved, evaluation_owed=True)
    if hooks.saver is not None:
        hooks.saver.finish()  # the checkpoint in the making may be the best so far, by what is known before
    try:
        results = hooks.evaluate()
    except PreemptedError:
        leave_early(hooks, writer, done, saved, evaluation_owed=True)
    writer.evaluation(done, results)
    return hooks.is_best is not None and hooks.is_best(done, results)


def evaluation_due(config: RunConfig, hooks: Hooks, done: int, last: bool) -> bool:
    """Whether to evaluate after so many steps."""
    return hooks.evaluate is not None and (last or done % config.evaluation.every_steps == 0)


def leave_early(hooks: Hooks, writer: MetricsWriter, done: int, saved: int, *,
                evaluation_owed: bool = False) -> NoReturn:
    """Saves after `done` steps, unless that was `saved` last, and raises PreemptedError. Called by all ranks."""
    if hooks.saver is not None:
        if done != saved:
            hooks.saver.save(done, evaluation_owed=evaluation_owed)
        hooks.saver.finish()
    writer.close()
    raise_on_all_ranks(writer.error)
    raise PreemptedError(f"stopped after {done} steps ({hooks.stop.reason()}), saved; "
                         "start the run again and it goes on")
