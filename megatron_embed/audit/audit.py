"""The audit of one step: load, replay, compare, explain."""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_embed.audit.case import Case, Cause
from megatron_embed.audit.causes import explain
from megatron_embed.audit.compare import (
    Difference,
    Tolerance,
    data_difference,
    log_difference,
    number_difference,
    update_difference,
)
from megatron_embed.audit.replay import Replay, opened
from megatron_embed.audit.run_log import RunLog, configuration_of, read_run
from megatron_embed.checkpoint.file_checksums import changed_files
from megatron_embed.checkpoint.log_files import log_exists
from megatron_embed.config.load import config_of_overrides, to_dict
from megatron_embed.config.objective import CONTRASTIVE
from megatron_embed.config.schema import CheckpointConfig, EvaluationConfig, LoggingConfig, ParallelConfig, RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.parallel.lost_rank import monitored_ranks
from megatron_embed.platform.determinism import deterministic_algorithms
from megatron_embed.platform.launcher import launched_rank
from megatron_embed.run.audit_facts import settings_digest
from megatron_embed.run.environment import set_environment
from megatron_embed.run.run_directory import describe_rows
from megatron_embed.training.audit_log import AUDIT_FILE
from megatron_embed.training.metrics import METRICS_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """The result."""

    step: int
    checkpoint: Path | None
    replayed: int
    """Steps that were replayed, the audited one included."""
    difference: Difference | None
    """The first one; None: all is as logged."""
    causes: Sequence[Cause]
    metrics: Mapping[str, tuple[float | None, float]]
    """Metrics of the last replayed step, by name: logged and replayed."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of that step: index, FILE:LINE, rank of the run."""
    notes: Sequence[str]
    tolerance: Tolerance
    seconds: float


def audit(args: argparse.Namespace) -> tuple[Audit, int]:
    """(the audit of step --step of the run RUN, this rank). Called by all ranks.

    Raises:
        UserError: there is no such step, or what it needs is gone.
    """
    begun, notes = time.monotonic(), list[str]()
    log = read_run(args.run, args.step)
    config, problems = configuration_of(log, args.step, settings_digest)
    done, checkpoint = log.checkpoint_before(args.step)
    check_segments(log, done, args.step)
    problems = [*problems, *weight_problems(log, done, checkpoint)]
    damaged = [Cause(name="damaged checkpoint file", text=text) for text in problems if ": model/" in text]
    if damaged:  # it may not even load
        return Audit(step=args.step, checkpoint=checkpoint, replayed=0, metrics={}, rows=[], notes=notes,
                     difference=Difference(step=done + 1, part="weights", values={}), causes=damaged,
                     tolerance=Tolerance(dtype="float32", replayed=0),
                     seconds=time.monotonic() - begun), launched_rank()[0]
    replayed = config_of_audit(config, log, args, checkpoint)
    set_environment(replayed)
    with deterministic_algorithms(replayed.training.deterministic), monitored_ranks() as start:
        with opened(replayed, checkpoint, start) as replay:
            if config.embedding.head in ("multi_vector", "sparse", "joint"):
                notes.append(f"the loss of a {config.embedding.head} model is computed as in training, not by a plain "
                             "reference")
            work = _Work(log=log, replay=replay, step=args.step, done=done, checkpoint=checkpoint)
            difference = work.run(problems)
            notes += not_compared(log, range(done + 1, done + work.replayed + 1), config.logging.every_steps)
            causes = [] if difference is None else explain(Case(
                log=log, replay=replay, difference=difference, done=done, problems=tuple(problems)))
            result = Audit(step=args.step, checkpoint=checkpoint, replayed=work.replayed, difference=difference,
                           causes=causes, metrics=work.metrics, rows=work.rows(), notes=notes,
                           tolerance=work.tolerance(work.last), seconds=time.monotonic() - begun)
        return result, replay.topology.rank


def config_of_audit(config: RunConfig, log: RunLog, args: argparse.Namespace, checkpoint: Path | None) -> RunConfig:
    """The run's configuration for a replay: it writes nothing, evaluates nothing, and has the layout at hand."""
    _, world_size, _ = launched_rank()
    start = log.start_of(args.step)[1]
    parallel: dict[str, Any] = dict(start["parallel"])
    if args.overrides or world_size != start["world_size"]:
        parallel = {}
    model, training = config.model, config.training
    if args.dtype is not None:
        model = dataclasses.replace(model, dtype=args.dtype)
    if checkpoint is not None and not os.path.isdir(os.path.expanduser(model.path)):
        model = dataclasses.replace(model, path=str(checkpoint))
    sizes = ParallelConfig(**parallel)
    if args.overrides:
        sizes = config_of_overrides([f"model.path={json.dumps(model.path)}", *args.overrides]).parallel
    ranks = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    check_negatives(config, dp_size_of(start), world_size // ranks)
    share = max(1, training.global_batch_size // max(1, world_size // ranks))
    micro = next(size for size in range(min(training.micro_batch_size, share), 0, -1) if share % size == 0)
    keep = "auto" if sizes.pipeline_model_parallel_size > 1 else training.keep_activations
    return dataclasses.replace(
        config, model=model, parallel=sizes, checkpoint=CheckpointConfig(), logging=LoggingConfig(tensorboard=False),
        evaluation=EvaluationConfig(),
        training=dataclasses.replace(training, micro_batch_size=micro, exit_duration_minutes=None,
                                     keep_activations=keep))


def not_compared(log: RunLog, steps: range, every_steps: int) -> list[str]:
    """The comparison of metrics.jsonl with audit.jsonl that could not be made for replayed steps, in words.

    Args:
        every_steps: of the run's logging: the steps that have a row in metrics.jsonl are multiples of it.
    """
    file = log.directory / METRICS_FILE
    if not log_exists(file):
        return [f"{file}: not there, so its numbers are not compared with those of {AUDIT_FILE}"]
    missing = [str(step) for step in steps if step % every_steps == 0 and step not in log.metrics]
    return [f"{file}: no row with a loss of step{'s' if missing[1:] else ''} {', '.join(missing)}, so its numbers are "
            f"not compared with those of {AUDIT_FILE}"] if missing else []


def check_segments(log: RunLog, done: int, step: int) -> None:
    """Raises ConfigError if the run was started again with other settings between the checkpoint and the step."""
    settings = log.start_of(step)[1].get("settings")
    for first, record in sorted(log.starts.items()):
        if first < step and log.start_of(done + 1)[0] <= first and record["start"].get("settings") != settings:
            last = min(later for later in log.starts if later > first)
            raise ConfigError(f"--step {step}: since step {last} the run has other settings than when step {done + 1} "
                              f"was made, with which the replay would begin; audit a step up to {last}, or one behind "
                              "a later checkpoint", key="--step")


def check_negatives(config: RunConfig, run_size: int, size: int) -> None:
    """Raises ConfigError if the rows that are computed together depend on the data-parallel size, and it is another."""
    objective = config.objective
    if objective.loss in CONTRASTIVE and objective.negatives == "micro_batch" and run_size != size:
        raise ConfigError(f"objective.negatives = 'micro_batch': the negatives of a query are those of the micro-"
                          f"batches that the run's {run_size} data-parallel ranks computed together; start the audit "
                          f"on {run_size} data-parallel ranks", key="objective.negatives")


def weight_problems(log: RunLog, done: int, checkpoint: Path | None) -> list[str]:
    """Sentences on damaged or missing files of the checkpoint."""
    if checkpoint is None:
        return []
    changed = changed_files(checkpoint)
    return [f"{checkpoint}: {change}" for change in changed or ()]


@dataclasses.dataclass(kw_only=True)
class _Work:
    """An audit under way."""

    log: RunLog
    replay: Replay
    step: int
    done: int
    checkpoint: Path | None
    last: int = 0
    """The last step that was replayed, whole or in part."""
    replayed: int = 0
    metrics: dict[str, tuple[float | None, float]] = dataclasses.field(default_factory=dict)
    masked: dict[int, tuple[int, list[int]]] = dataclasses.field(default_factory=dict)
    """Masked negatives of the last replayed step, see Replay.masked."""
    problems: list[str] = dataclasses.field(default_factory=list)

    def run(self, problems: Sequence[str]) -> Difference | None:
        """Replay up to the step. Returns the first difference."""
        self.problems, self.last = list(problems), self.done + 1
        difference = self._at_start()
        for step in range(self.done + 1, self.step + 1):
            if difference is not None:
                break
            difference = self._replay(step)
        return difference

    def tolerance(self, step: int) -> Tolerance:
        """The tolerance for the numbers of a step."""
        config, start = self.replay.inputs.config, self.log.start_of(step)[1]
        same = start["parallel"] == to_dict(config)["parallel"] and (
            start["world_size"] == self.replay.topology.world_size)
        dtype = "bfloat16" if "bfloat16" in (start["dtype"], config.model.dtype) else "float32"
        return Tolerance(dtype=dtype, replayed=step - self.done - 1, rows=config.training.global_batch_size,
                         dropout=config.has_dropout and not same, rounded=config.embedding.precision != ("float32",))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the last replayed step, in the order of the global batch."""
        inputs, start = self.replay.inputs, self.log.start_of(self.last)[1]
        rows = inputs.sampler.rows_of_step(self.last - 1)
        share = max(1, len(rows) // dp_size_of(start))
        masked = self.masked
        return [{"row": row, "source": inputs.records[row].source, "rank": position // share,
                 **({"negatives": masked[position][0],
                     "masked_documents_of_rows": [rows[of] for of in masked[position][1]]}
                    if position in masked else {})} for position, row in enumerate(rows)]

    def _at_start(self) -> Difference | None:
        """The first difference before any step is replayed: in settings, rows of the data or weights."""
        record, start = self._weights_record(), self.log.start_of(self.step)[1]
        known = describe_rows(self.replay.inputs.records, self.replay.inputs.order)
        if known != start["rows"]:
            return Difference(step=self.last, part="rows", values={
                f"data.train {name}": (start["rows"].get(name), known[name]) for name in known
                if start["rows"].get(name) != known[name]})
        checksum = self.replay.checksum()
        same_dtype = start["dtype"] == self.replay.inputs.config.model.dtype
        for noted in (record, self.log.starts.get(self.done)) if same_dtype else ():
            if noted is not None and noted["parameter_bits"] != f"{checksum.bits % 2**64:016x}":
                return Difference(step=self.last, part="weights", values={
                    "parameter_norm": (noted["parameter_norm"], checksum.norm)})
        if record is not None and "optimizer_bits" in record and same_dtype and self._has_comparable_moments():
            bits = self.replay.optimizer_bits()
            if record["optimizer_bits"] != bits:
                return Difference(step=self.last, part="optimizer state", values={
                    "optimizer_bits": (record["optimizer_bits"], bits)})
        if self.problems:
            return Difference(step=self.last, part="settings" if "config.yaml" in self.problems[0] else "files",
                              values={})
        return None

    def _has_comparable_moments(self) -> bool:
        """Whether the run and the replay hold every tensor whole, and moments as they are in the checkpoint."""
        optimizer = self.replay.inputs.config.optimizer
        if optimizer.name != "adamw" or optimizer.precision_aware or optimizer.cpu_offload:
            return False
        sizes = self.log.start_of(self.step)[1]["parallel"], to_dict(self.replay.inputs.config)["parallel"]
        return all(each[f"{name}_parallel_size"] == 1 for each in sizes
                   for name in ("tensor_model", "expert_model", "expert_tensor"))

    def _weights_record(self) -> Mapping[str, Any] | None:
        """The record of the weights that the replay begins with."""
        return self.log.saves.get(self.done) if self.done else self.log.starts.get(0)

    def _replay(self, step: int) -> Difference | None:
        self.last, self.replayed, record = step, self.replayed + 1, self.log.steps.get(step)
        self.masked = {}
        if record is None:
            raise ConfigError(f"--step {self.step}: the log lacks step {step}, which must be replayed; choose a step "
                              "with a kept checkpoint behind that one", key="--step")
        batch, tolerance = self.replay.batch(step), self.tolerance(step)
        difference = log_difference(step, record, self.log.metrics.get(step, {}))
        if difference is not None:
            return difference
        difference = data_difference(step, record, self.replay.fingerprint(batch))
        if difference is not None:
            return difference
        numbers = self.replay.numbers(step, batch)
        self.masked = self.replay.masked()
        logged = record["metrics"]
        self.metrics = {name: (logged[name], value) for name, value in numbers.metrics.items() if name in logged}
        difference = number_difference(step, record, numbers.metrics, tolerance) or self._differing_copies(record)
        if difference is not None:
            return difference
        updated = self.replay.update(numbers)
        record = {**self.log.saves.get(step, {}), **record}
        norms = {"parameter_norm": self.replay.checksum().norm} if "parameter_norm" in record else {}
        norms |= {"norm_weights": self.replay.norm_weights()} if "norm_weights" in record else {}
        return update_difference(step, record, updated, norms, tolerance)

    @staticmethod
    def _differing_copies(record: Mapping[str, Any]) -> Difference | None:
        """The difference between ranks that the run itself noted at this step."""
        if record.get("replica_differs"):
            return Difference(step=record["step"], part="copies", values={"rows of a replica's ranks": ("differ", "")})
        if "drifted" in record:
            return Difference(step=record["step"], part="copies", values={
                f"norm of rank {rank}": (norm, record["parameter_norm"]) for rank, norm in record["drifted"].items()})
        return None


def dp_size_of(start: Mapping[str, Any]) -> int:
    """Data-parallel size of a start of the run."""
    sizes = start["parallel"]
    return int(start["world_size"] // (sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
                                       * sizes["context_parallel_size"]))
