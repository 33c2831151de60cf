"""Saving training state as Megatron's sharded checkpoints, at once or behind the training steps that follow."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.checkpoint.file_checksums import write_checksums, write_own_checksums
from megatron_embed.checkpoint.files import (
    LATEST,
    link_tree,
    remove_old,
    replace_directory,
    sync_tree,
    write_atomically,
)
from megatron_embed.checkpoint.load import TRAINER_FILE, TrainingState, model_state, trainer_text
from megatron_embed.checkpoint.optimizer_state import SHARDING, optimizer_to_save
from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.parallel.collectives import raise_on_all_ranks, smallest
from megatron_embed.platform.compat import ASYNC_SAVE, dist_checkpointing, parallel_save, write_common_file

logger = logging.getLogger(__name__)

PROBE_BYTES = 1 << 20
"""Bytes that a disk must take before a checkpoint is begun."""


class Saver:
    """Writes a run's checkpoints, DIRECTORY/step_NNNNNN, and points `latest` at the newest. Every method is called by
    all ranks alike.

    A run killed at any instant leaves the previous checkpoint, or this one, complete; so does a full disk.

    Args:
        assets: folder with megatron_embed.json, config.yaml and hf/ (configuration, tokenizer, untrained tensors).
        keep: newest checkpoints kept; 0 keeps all.
        keep_every: checkpoints after a multiple of so many steps are kept as well; None: none.
        background: tensors are copied to host memory, and written during the next steps. One checkpoint at a time.
        on_complete: called by all ranks with (steps of a checkpoint that is complete, keep).
    """

    def __init__(self, directory: str, state: TrainingState, *, assets: Path, keep: int, background: bool,
                 keep_every: int | None = None, on_complete: Callable[[int, int], None] | None) -> None:
        self._directory = Path(directory)
        self._state = state
        self._assets = assets
        self._keep, self._keep_every = keep, keep_every
        self._background = background
        self._on_complete = on_complete
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None

    def save(self, step: int, *, evaluation_owed: bool = False) -> None:
        """A checkpoint of the state after `step` optimizer steps; in the background one is begun, after the end of the
        one before it. `evaluation_owed`: the evaluation due at this step is still to be made.

        Communicates over the world.

        Raises:
            CheckpointError: on every rank; it cannot be written, and what there was of it is removed. In the
                background: that of the one before.
        """
        self.finish()
        pending = _Pending(self._directory, step, evaluation_owed=evaluation_owed)
        with pending.removed_on_error():
            on_rank_0(lambda: make_folder_on_free_disk(pending.temporary / "model"), pending.target)
            model = model_state(self._state.models)
            sharded = {"model": model, "optimizer": optimizer_to_save(self._state.optimizer, model)}
            sharded["scheduler"] = self._state.scheduler.state_dict()
            if self._state.learned is not None:
                sharded["learned"] = self._state.learned.state_dict()
            pending.begin(sharded, self._thread, living_storages(self._state))
        self._pending = pending
        if not self._background:
            self.finish()

    def mark_evaluation(self, step: int, *, owed: bool) -> None:
        """Notes in the checkpoint of this step whether its evaluation is still to be made. Called by all ranks; see
        on_rank_0."""
        self.finish()
        target = self._directory / f"step_{step:06d}"
        on_rank_0(lambda: write_atomically(target / TRAINER_FILE, trainer_text(step, evaluation_owed=owed)), target)
        if not owed and self._on_complete is not None:
            self._on_complete(step, self._keep)

    def poll(self) -> None:
        """Complete a checkpoint that all ranks have written. While there is one, a small all-reduce over the world."""
        if self._pending is not None and smallest(int(self._pending.is_written)):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it. Raises CheckpointError, as `save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with pending.removed_on_error():
                pending.end()
                on_rank_0(lambda: self._complete(pending), pending.target)
            if self._on_complete is not None:
                self._on_complete(pending.step, self._keep)

    def _complete(self, pending: "_Pending") -> None:
        """Complete a checkpoint on rank 0, once all tensors are there: temporary name, fsync, rename, `latest` last."""
        write_common_file(pending.temporary / "model")
        link_tree(self._assets, pending.temporary)
        (pending.temporary / TRAINER_FILE).write_text(
            trainer_text(pending.step, evaluation_owed=pending.evaluation_owed), encoding="utf-8")
        write_checksums(pending.temporary)
        sync_tree(pending.temporary)
        replace_directory(pending.temporary, pending.target)
        write_atomically(self._directory / LATEST, pending.target.name + "\n")
        remove_old(self._directory, self._keep, self._keep_every)
        logger.info("saved %s", pending.target)


class _Pending:
    """A checkpoint that is being written."""

    def __init__(self, directory: Path, step: int, *, evaluation_owed: bool) -> None:
        self.step, self.evaluation_owed = step, evaluation_owed
        self.target = directory / f"step_{step:06d}"
        self.temporary = directory / f".step_{step:06d}.tmp"
        self._request: Any = None
        self._written: Future[None] | None = None

    @property
    def is_written(self) -> bool:
        """True once this rank's tensors are written, or have failed to be."""
        return self._written is None or self._written.done()

    @contextlib.contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Errors of the file system become a CheckpointError; rank 0 removes what there is. A rank that cannot write
        tells the others; rank 0 knows the reason."""
        try:
            try:
                yield
            except CheckpointException as error:
                reasons = [str(failure[0]).strip().splitlines()[-1] for failure in error.failures.values()]
                raise not_written(self.target, reasons[0] if reasons else "see rank 0") from error
            except OSError as error:
                raise not_written(self.target, error.strerror or str(error)) from error
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def begin(self, sharded: dict[str, Any], thread: ThreadPoolExecutor | None, living: Collection[int]) -> None:
        """Plans who writes what, which communicates, and writes this rank's share, in `thread` if there is one.

        `living`: see `living_storages`.
        """
        self._request = dist_checkpointing.save(sharded, str(self.temporary / "model"), content_metadata=SHARDING,
                                                sharded_strategy=parallel_save(), **ASYNC_SAVE)
        if self._request.async_fn is None:
            return
        rank, _, results = self._request.async_fn_args
        on_host = self._request.preload_fn()
        if thread is None:
            self._write(rank, on_host, results)
        else:
            self._written = thread.submit(self._write, rank, copied(on_host, living), results)

    def _write(self, *arguments: Any) -> None:
        """Write this rank's tensors, and the checksums of their files."""
        self._request.async_fn(*arguments)
        with contextlib.suppress(OSError):  # of a full disk `end` learns from the results; rank 0 reads what has no sum
            write_own_checksums(self.temporary / "model", dist.get_rank())

    def end(self) -> None:
        """Waits for all ranks, then rank 0 writes the metadata. Communicates over the world."""
        if self._written is not None:
            self._written.result()
        dist.barrier()
        for finalize in self._request.finalize_fns:
            finalize()


def make_folder_on_free_disk(folder: Path) -> None:
    """Make a folder on a disk that is not full, else raise OSError. Without this test torch.save would fail first, with
    an error of its own (RuntimeError: iostream error) that the other ranks would not learn of."""
    folder.mkdir(parents=True)
    probe = folder / ".probe"
    try:
        with probe.open("wb", buffering=0) as file:
            remaining = PROBE_BYTES
            while remaining:
                remaining -= file.write(b"\0" * remaining)
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def living_storages(state: TrainingState) -> set[int]:
    """Addresses of the memory that the next optimizer step changes: of parameters, main parameters and moments."""
    tensors: list[Any] = [tensor for model in state.models for tensor in (*model.parameters(), *model.buffers())]
    for part in state.optimizer.chained_optimizers:
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for values in part.optimizer.state.values() for value in values.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}


def copied(on_host: list[Any], living: Collection[int]) -> list[Any]:
    """Megatron's buckets of tensors with copies of those in `living` storages.

    The next optimizer step changes parameters and moments in place: without copies a checkpoint would hold a mixture of
    two steps. What is a copy already, of a GPU's tensor or of a part of a buffer, is not copied again.
    """
    return [(file, key, (others, [
        (item, tensor.clone() if tensor.untyped_storage().data_ptr() in living else tensor)
        for item, tensor in staged])) for file, key, (others, staged) in on_host]


def on_rank_0(action: Callable[..., object], target: Path, **options: object) -> None:
    """`action` on rank 0, which writes `target`; its error is raised on every rank, a CheckpointError if a file's.

    Called by all ranks; one all-gather over the world, before which no rank returns.
    """
    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            action(**options)
        except UserError as user_error:
            error = user_error
        except OSError as file_error:
            error = not_written(target, file_error.strerror or str(file_error))
    raise_on_all_ranks(error)


def not_written(target: Path, reason: str) -> CheckpointError:
    """The error of a checkpoint that cannot be written."""
    return CheckpointError(f"checkpoint.directory = {str(target.parent)!r}: {target.name} could not be written "
                           f"({reason}); free disk space or name another disk; what was complete before still is",
                           key="checkpoint.directory")
