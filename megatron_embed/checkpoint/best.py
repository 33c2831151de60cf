"""The best checkpoint of a run so far: which one it is, by what, and that it stays."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_embed.checkpoint.files import BEST, remove_old, sync_directory, write_atomically
from megatron_embed.checkpoint.save import on_rank_0
from megatron_embed.errors import CheckpointError
from megatron_embed.parallel.collectives import share_from_first

logger = logging.getLogger(__name__)

VALUE_FILE = "best.json"
"""In the best checkpoint: its step, metric and value. So moving the pointer moves all of them at once."""


class BestCheckpoint:
    """Where a run stands with its best metric. Larger is better; a value that is only equaled stays with the first."""

    def __init__(self, directory: str, metric: str, first_step: int) -> None:
        """What `directory` says, unless it was by another metric or of a step that this run has yet to do."""
        self._directory, self._metric = Path(directory), metric
        self._value = -float("inf")
        self._pending = False
        file = self._directory / BEST / VALUE_FILE
        if not file.is_file():
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            step, name, value = int(known["step"]), str(known["metric"]), float(known["value"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: not readable ({error!r}); remove {self._directory / BEST}, and the best is "
                                  "sought anew") from error
        if name == metric and step <= first_step:
            self._value = value

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best so far; then the next `mark` names the checkpoint that has it.

        Called by all ranks, which take the value of rank 0: one broadcast over the world.
        """
        value = float(share_from_first(repr(float(metrics[self._metric]))))
        if value > self._value:
            self._value, self._pending = value, True
            return True
        return False

    def mark(self, step: int, keep: int) -> None:
        """After a checkpoint was saved: points `best` at it, if it is, and lets the former best go.

        That one stays only if it is among the newest `keep`. Called by all ranks; see on_rank_0.
        """
        if not self._pending:
            return
        self._pending = False
        name = f"step_{step:06d}"

        def write() -> None:
            pointer, temporary = self._directory / BEST, self._directory / f".{BEST}.tmp"
            temporary.unlink(missing_ok=True)
            os.symlink(name, temporary)  # relative, so that the folder may be moved
            write_atomically(self._directory / name / VALUE_FILE, json.dumps(
                {"step": step, "metric": self._metric, "value": self._value}) + "\n")
            temporary.replace(pointer)
            sync_directory(self._directory)
            remove_old(self._directory, keep)
            logger.info("%s is the best so far: %s = %.4f", name, self._metric, self._value)

        on_rank_0(write, self._directory / name)
