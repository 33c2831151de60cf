"""What a run notes of every step, so that the command `audit` can replay it and compare: audit.jsonl."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.batch import StepBatch
from megatron_embed.checkpoint.log_files import LogWriter
from megatron_embed.checkpoint.parameter_checksums import (
    ParameterChecksum,
    ParameterChecksums,
    checksums_by_name,
    optimizer_bits,
)
from megatron_embed.errors import ConfigError, UserError
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.training.fingerprints import as_signed, fingerprint, named
from megatron_embed.training.step import Trainer

AUDIT_FILE = "audit.jsonl"
"""In a run's directory: a line for each start, each step and each save."""


class AuditLog:
    """Writer of AUDIT_FILE. Made and called by all ranks; rank 0 writes.

    A file that cannot be written does not raise: the error is kept in `error`, as MetricsWriter keeps its own.

    Args:
        directory: None: nothing is written, and no method communicates.
        every: steps between checksums of the parameters; 0: only at starts and saves.
        share: queries of a step on each data-parallel rank.
        max_mib: as of LogWriter.
    """

    def __init__(self, directory: str | None, trainer: Trainer, topology: Topology, *, first_step: int, every: int,
                 share: int, max_mib: int) -> None:
        self.error: UserError | None = None
        self._directory, self._topology, self._trainer = directory, topology, trainer
        self._every, self._share = every, share
        self._parameters = None if directory is None else ParameterChecksums(trainer.grad_cache.models, topology)
        # Parameters are then complete only where they are summed up.
        self._gathers_late = directory is not None and any(
            chunk.ddp_config.overlap_param_gather for chunk in trainer.chunks)
        self._file: LogWriter | None = None
        if directory is not None and topology.rank == 0:
            with self._noting_errors():
                self._file = LogWriter(Path(directory) / AUDIT_FILE, first_step=first_step, max_mib=max_mib)

    def start(self, step: int, facts: Mapping[str, Any]) -> None:
        """Note a start after `step` steps: what the run is, and its parameters."""
        if self._parameters is not None:
            self._write({"step": step, "start": facts, **_plain(self._parameters())})

    def checks_parameters(self, done: int) -> bool:
        """Whether the parameters are summed up after `done` steps; they must be complete then."""
        return self._parameters is not None and self._every > 0 and done % self._every == 0

    def after_step(self, done: int, batch: StepBatch, metrics: Mapping[str, float]) -> None:
        """Note step number `done`: its rows, texts and labels, and all of its metrics. One all-reduce over the world of
        a few integers and two for each rank; with the parameters' checksums one more."""
        if self._parameters is None:
            return
        own = as_signed(fingerprint(batch, self._topology.dp_rank * self._share))
        # Ranks that share a replica's rows must have the same: those beside rank 0 are counted apart from all.
        beside = own if self._topology.dp_group.size() == self._topology.world_size or self._is_beside_rank_0 else (
            torch.zeros_like(own))
        drifted: list[int] = []
        sampled = not self._gathers_late or self.checks_parameters(done)
        sample = self._parameters.sample() if sampled else []
        summed = sum_over(torch.cat([beside, own, torch.tensor(sample, dtype=torch.int64)]), dist.group.WORLD)
        beside, total, sums = summed.split([len(own), len(own), len(sample)])
        copies = self._topology.world_size // self._topology.dp_size
        record = {"step": done, **named(beside.tolist()), "metrics": finite(metrics),
                  "micro_batches": len(batch.micro_batches)}
        if not torch.equal(beside * copies, total):
            record["replica_differs"] = True
        if sampled:  # equal on all ranks
            norm, drifted = self._parameters.of_sample(sums.tolist())
            record |= {"norm_weights": norm} if self._parameters.has_norm_weights else {}
        if self.checks_parameters(done) or drifted:
            record |= _plain(self._parameters())
        self._write(record)

    def before_save(self, done: int) -> None:
        """Note the parameters and moments in memory, of which a checkpoint is about to be made. Collectives over the
        world."""
        if self._parameters is not None:
            bits = optimizer_bits(self._trainer.optimizer, self._topology)
            models = self._trainer.grad_cache.models
            self._write({"step": done, "save": checksums_by_name(models), **_plain(self._parameters()),
                         "optimizer_bits": f"{bits % 2**64:016x}"})

    def close(self) -> None:
        if self._file is not None:
            with self._noting_errors():
                self._file.close()

    @property
    def _is_beside_rank_0(self) -> bool:
        groups = self._topology.groups
        return groups.tp.rank() == 0 and groups.pp.rank() == 0 and groups.cp.rank() == 0

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            with self._noting_errors():
                self._file.append(record)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or ConfigError(
                f"logging.directory = {self._directory!r}: {AUDIT_FILE} cannot be written ({error.strerror or error}); "
                "look at the disk, or name another directory", key="logging.directory")


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics with None for what is not finite: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _plain(checksum: ParameterChecksum) -> dict[str, Any]:
    """A checksum as the log holds it."""
    return {"parameter_bits": f"{checksum.bits % 2**64:016x}", "parameter_norm": checksum.norm,
            **({"drifted": {str(rank): norm for rank, norm in checksum.drifted.items()}} if checksum.drifted else {})}
