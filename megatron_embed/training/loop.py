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
from megatron_embed.training.audit_log import AuditLog
from megatron_embed.training.health import Health
from megatron_embed.training.metrics import MetricsWriter, Throughput
from megatron_embed.training.step import Trainer, seed_step, train_step
from megatron_embed.training.stopping import StopRequest


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """The work between steps. Each function is called on all ranks."""

    load_batch: Callable[[int], StepBatch]
    """Step, from 0 -> this rank's share of it. No communication: another rank may fail here."""
    evaluate: Callable[[], dict[str, float]] | None
    """Metrics by name, equal on all ranks."""
    agree: Callable[[StepBatch], StepBatch] | None
    """Gives all data-parallel ranks as many micro-batches; None if they have as many."""
    saver: Saver | None
    """Writes checkpoints."""
    save_due: Callable[[int], bool]
    """Steps done -> True if a checkpoint is due after them, whatever else asks for one."""
    is_best: Callable[[int, dict[str, float]], bool] | None
    """(steps, metrics) -> True if these metrics are the run's best so far; then a checkpoint is saved as well. None: no
    best checkpoint is kept."""
    is_over: Callable[[], bool]
    """After an evaluation: True if the run ends with this step, equal on all ranks."""
    stop: StopRequest
    """A request to this rank to stop early; ranks may differ."""
    writer: MetricsWriter
    """Writes metrics."""
    health: Health
    """Looks for steps that go wrong."""
    audit_log: AuditLog
    """Notes what a later audit compares."""


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
    repeated_fraction: float
    """Share of the step's texts that were not encoded again; see `training.encode_repeated_texts`."""
    signalled: bool
    """Some rank was told to stop."""
    time_is_up: bool
    """Some rank has spent its time."""
    wait_seconds: float
    """Time that this rank has waited for its batch."""


def load_agreed(hooks: Hooks, step: int, topology: Topology) -> Loaded:
    """The batch of a step, or on every rank the error of the lowest rank that has one: of its writer, or of this batch.

    One all-reduce of nine numbers over the world, between the CPUs, with a token budget two more of a few; an error
    alone costs another collective. The world and not the data-parallel group: a file may change between two ranks of a
    replica that read the same rows.
    """
    batch, error, start = None, hooks.writer.error or hooks.audit_log.error, time.perf_counter()
    try:
        batch = hooks.load_batch(step)
    except UserError as load_error:
        error = error or load_error
    wait_seconds = time.perf_counter() - start
    micro_batches = () if batch is None else batch.micro_batches
    real = sum(micro.num_tokens for micro in micro_batches)
    padded = sum(micro.token_ids.numel() for micro in micro_batches)
    squares = sum(int(micro.cu_seqlens.diff().square().sum()) for micro in micro_batches)
    encoded = sum(micro.num_sequences for micro in micro_batches)
    texts, cut = (0, 0) if batch is None else (batch.num_texts, batch.num_truncated)
    counts = torch.tensor([real, padded, squares, texts, encoded, cut, hooks.stop.signalled, hooks.stop.time_is_up,
                           error is not None], dtype=torch.float64)
    real_sum, padded_sum, squares_sum, texts_sum, encoded_sum, cut_sum, signalled, time_is_up, failed = sum_over(
        counts, dist.group.WORLD).tolist()
    if failed:
        raise_on_all_ranks(error)
    assert batch is not None
    copies = topology.world_size // topology.dp_size  # ranks that read the same rows
    if hooks.agree is not None:
        batch = hooks.agree(batch)
        padded = sum(micro.token_ids.numel() for micro in batch.micro_batches)
        padded_sum = sum_over(torch.tensor([padded]), topology.dp_group).item() * copies
    return Loaded(batch=batch, tokens=real_sum / copies, padded_tokens=padded_sum / copies,
                  squared_lengths=squares_sum / copies, truncated_fraction=cut_sum / texts_sum,
                  repeated_fraction=1 - encoded_sum / texts_sum,
                  signalled=signalled > 0, time_is_up=time_is_up > 0, wait_seconds=wait_seconds)


def parameters_are_read(config: RunConfig, hooks: Hooks, done: int) -> bool:
    """Whether an evaluation, a checkpoint or a checksum reads the parameters after `done` steps."""
    return (done % config.evaluation.every_steps == 0 or hooks.save_due(done)
            or hooks.audit_log.checks_parameters(done))


def train(config: RunConfig, trainer: Trainer, hooks: Hooks, topology: Topology, *, first_step: int, train_steps: int,
          evaluation_owed: bool = False) -> dict[str, float]:
    """Optimizer steps first_step .. train_steps - 1, fewer if `hooks.is_over`. Returns the last step's metrics (empty
    if there was none).

    `evaluation_owed`: the checkpoint that this run resumes from is not evaluated yet; that comes first.

    Raises:
        PreemptedError: on every rank, once the step under way is done and saved, if some rank was asked to stop.
        ConfigError: losses that are not finite, see Health.
    """
    metrics: dict[str, float] = {}
    heap, throughput, saved, logged_skips = HeapWatch(), Throughput(trainer.grad_cache.models, topology), first_step, 0
    if evaluation_owed and make_up_for_evaluation(hooks, first_step):
        train_steps = first_step
    evaluate_at_start(config, hooks, first_step)
    for step in range(first_step, train_steps):
        start = time.perf_counter()
        loaded = load_agreed(hooks, step, topology)
        # At least one step per start: a run whose time is always up too early would be started again for ever.
        if loaded.signalled or (loaded.time_is_up and step > first_step):
            trainer.complete_parameters()
            leave_early(hooks, step, saved)
        begin_step(config, trainer, topology, step)
        metrics = train_step(loaded.batch, trainer)
        done, last = step + 1, step + 1 == train_steps
        if last or parameters_are_read(config, hooks, done):
            trainer.complete_parameters()
        hooks.audit_log.after_step(done, loaded.batch, metrics)
        hooks.health.after_step(step, metrics, skipped=bool(metrics.pop("skipped")))
        metrics |= metrics_of_rows(metrics, loaded, throughput, seconds=time.perf_counter() - start)
        log = done % config.logging.every_steps == 0 or last
        rare = {**throughput.worst_rank(), **throughput.row_shares()} if log else {}
        hooks.writer.step(done, {**metrics, **rare, "skipped_steps": hooks.health.skipped - logged_skips}, log=log)
        logged_skips = hooks.health.skipped if log else logged_skips
        evaluated = evaluation_due(config, hooks, done, last)
        best = evaluated and evaluate(hooks, done, saved, last)
        over = evaluated and hooks.is_over()
        if hooks.saver is not None:
            hooks.saver.poll()
            if hooks.save_due(done) or last or best or over:
                save(hooks, done)
                saved = done
        if over:
            break
        heap.after_step()
    if hooks.saver is not None:
        hooks.saver.finish()
    close_files(hooks)
    return metrics


def begin_step(config: RunConfig, trainer: Trainer, topology: Topology, step: int) -> None:
    """What depends on the step, from 0: random numbers, and schedules of the loss."""
    seed_step(config.training.seed, step, topology)
    trainer.grad_cache.objective.step = step


def metrics_of_rows(metrics: dict[str, float], loaded: Loaded, throughput: Throughput, *,
                    seconds: float) -> dict[str, float]:
    """A step's speed and truncated texts and, if its rows are of one data set, its `metrics` under that name too."""
    of_set = {} if loaded.batch.data_set is None else {
        f"{loaded.batch.data_set}/{name}": value for name, value in metrics.items()
        if name not in ("grad_norm", "learning_rate")}
    throughput.set_rows.update(loaded.batch.set_rows)
    throughput.note_wait(loaded.wait_seconds)
    speed = throughput.of_step(tokens=loaded.tokens, squared_lengths=loaded.squared_lengths,
                               padded_tokens=loaded.padded_tokens, seconds=seconds)
    repeated = {"repeated_fraction": loaded.repeated_fraction} if loaded.repeated_fraction else {}
    return {**of_set, **speed, "truncated_fraction": loaded.truncated_fraction, **repeated}


def save(hooks: Hooks, done: int, *, evaluation_owed: bool = False) -> None:
    """Save a checkpoint after `done` steps, and note the parameters in memory. Called by all ranks."""
    assert hooks.saver is not None
    hooks.audit_log.before_save(done)
    hooks.saver.save(done, evaluation_owed=evaluation_owed)


def close_files(hooks: Hooks) -> None:
    """Close the files of metrics, or raise on every rank the error of one that cannot be written."""
    hooks.writer.close()
    hooks.audit_log.close()
    raise_on_all_ranks(hooks.writer.error or hooks.audit_log.error)


def make_up_for_evaluation(hooks: Hooks, done: int) -> bool:
    """Evaluate the checkpoint of `done` steps that this run resumes from. Returns True if the run is over by that.
    Called by all ranks."""
    if hooks.evaluate is not None:
        evaluate(hooks, done, done, True)
    if hooks.saver is not None:
        hooks.saver.mark_evaluation(done, owed=False)
    return hooks.evaluate is not None and hooks.is_over()


def evaluate_at_start(config: RunConfig, hooks: Hooks, first_step: int) -> None:
    """Evaluate the model before the first step of a new run, unless it is not wanted. Called by all ranks.

    The results never count as the best: no checkpoint holds that model.
    """
    if first_step == 0 and config.evaluation.at_start and hooks.evaluate is not None:
        run_evaluation(hooks, 0, 0, True)


def evaluate(hooks: Hooks, done: int, saved: int, last: bool) -> bool:
    """Evaluate and write the metrics, see `run_evaluation`. Returns True if they are the best so far."""
    results = run_evaluation(hooks, done, saved, last)
    return hooks.is_best is not None and hooks.is_best(done, results)


def run_evaluation(hooks: Hooks, done: int, saved: int, last: bool) -> dict[str, float]:
    """Evaluate and write the metrics, which are returned. Called by all ranks.

    If some rank is asked to stop, the evaluation is skipped, or broken off between two batches, and the run stops here;
    its checkpoint says that the evaluation is owed. After the `last` step it takes place although the time is up.

    Raises:
        PreemptedError: on every rank, then.
    """
    assert hooks.evaluate is not None
    if largest(int(hooks.stop.signalled or (hooks.stop.time_is_up and not last)), dist.group.WORLD):
        leave_early(hooks, done, saved, evaluation_owed=True)
    if hooks.saver is not None:
        hooks.saver.finish()  # the checkpoint that is being written may be the best so far
    try:
        results = hooks.evaluate()
    except PreemptedError:
        leave_early(hooks, done, saved, evaluation_owed=True)
    hooks.writer.evaluation(done, results)
    return results


def evaluation_due(config: RunConfig, hooks: Hooks, done: int, last: bool) -> bool:
    """True if an evaluation is due after `done` steps."""
    return hooks.evaluate is not None and (last or done % config.evaluation.every_steps == 0)


def leave_early(hooks: Hooks, done: int, saved: int, *, evaluation_owed: bool = False) -> NoReturn:
    """Save after `done` steps, unless that was `saved` last, and raise PreemptedError. Called by all ranks."""
    if hooks.saver is not None:
        if done != saved:
            save(hooks, done, evaluation_owed=evaluation_owed)
        hooks.saver.finish()
    close_files(hooks)
    raise PreemptedError(f"stopped after {done} steps ({hooks.stop.reason()}), saved; "
                         "start the run again to resume it")
