"""The rows of each optimizer step: the same for every layout, and known for any step without replaying a run."""

import logging
import math
import threading
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.batch_queue import SharedTexts, divided
from megatron_embed.data.permutation import Permutation
from megatron_embed.data.records import AnyRecord, Records
from megatron_embed.errors import ConfigError

logger = logging.getLogger(__name__)

ORDER_VERSION = 3
"""Raise it when a sampler gives other rows for the same data, settings and step. 1: data/epoch_sampler.py; 2: several
data sets took their turns by data/turns.py's FurthestBehind."""
_BLOCK_ROWS = 1 << 17
_LEAST_STEPS = 32
"""Steps of a block at least: a text of up to about half as many rows as there are batches can be kept apart in it."""
_FEWEST_STEPS = 16
"""Steps of a period at least: in one of fewer, a row of two epochs could meet itself in a batch."""
_CACHED_BLOCKS = 1


class Sampler(ABC):
    """The order in which a run takes its rows.

    Attributes:
        num_rows: rows of the data.
        global_batch_size: rows of an optimizer step.
        num_steps: steps that there are rows for; None: any number.
    """

    num_rows: int
    global_batch_size: int
    num_steps: int | None = None

    @abstractmethod
    def rows_of_step(self, step: int) -> list[int]:
        """The `global_batch_size` row indices, in the whole data, of optimizer step `step` >= 0."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps that take as many rows as the data has; not rounded."""
        return self.num_rows / self.global_batch_size

    def steps_of_epochs(self, epochs: float) -> int:
        """Optimizer steps that take this many times the rows of the data, rounded up once at the end, >= 1."""
        return steps_of_epochs(epochs, self.num_rows, self.global_batch_size)


def steps_of_epochs(epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Optimizer steps that take this many times the rows, rounded up once at the end, >= 1."""
    return max(1, math.ceil(round(epochs * num_rows / global_batch_size, 6)))


def check_batch_size(global_batch_size: int, num_rows: int) -> None:
    """Raises ConfigError if the global batch is larger than the data."""
    if global_batch_size > num_rows:
        raise ConfigError(f"training.global_batch_size = {global_batch_size} is larger than the {num_rows} rows of "
                          "data.train; lower it or add rows", key="training.global_batch_size")


class GlobalBatchSampler(Sampler):
    """Row indices of every optimizer step: a pure function of the step, the seed and the rows.

    Without shuffling, step k takes rows k*global_batch_size ... and wraps round at the end. With shuffling, each epoch
    is a keyed permutation of the rows, and epoch follows epoch. The steps are divided into blocks that are computed
    alone, each from its own positions: no epoch is drawn, and no step replayed. In a block, a row that shares a text
    (query, positive, or one of the first `num_negatives` negatives) or a document's id with a row of the batch waits
    for a later batch, or changes places with a row of another one; nothing is lost. A text of more rows than a block
    has batches cannot avoid itself: its rows are spread evenly. Memory: that of a block, none per row of the data.

    Args:
        name: names the data in the warning of rows that cannot be kept apart.

    Raises:
        ConfigError: the global batch is larger than the data.
    """

    def __init__(self, records: Records[AnyRecord], *, global_batch_size: int, shuffle: bool, seed: int,
                 num_negatives: int = 0, name: str = "data.train") -> None:
        check_batch_size(global_batch_size, len(records))
        self.num_rows = len(records)
        self.global_batch_size = global_batch_size
        self.num_duplicates = 0
        self._records, self._num_negatives = records, num_negatives
        self._shuffle, self._seed, self._name = shuffle, seed, name
        self._lock = threading.Lock()
        self._blocks: dict[range, NDArray[np.int64]] = {}
        # Epochs that begin together: few enough rows would else make blocks of few batches.
        self._period = self.num_rows * -(-_FEWEST_STEPS * global_batch_size // self.num_rows)
        self._block_steps = max(_LEAST_STEPS, -(-_BLOCK_ROWS // global_batch_size))

    def rows_of_step(self, step: int) -> list[int]:
        size = self.global_batch_size
        if not self._shuffle:
            return [row % self.num_rows for row in range(step * size, (step + 1) * size)]
        with self._lock:
            steps = self._block_of(step)
            if steps not in self._blocks:
                while len(self._blocks) >= _CACHED_BLOCKS:
                    del self._blocks[next(iter(self._blocks))]
                self._blocks[steps] = self._shuffled(steps)
            rows: list[int] = self._blocks[steps][step - steps.start].tolist()
            return rows

    def _block_of(self, step: int) -> range:
        """The steps that are computed together with this one: all of a period of epochs, or a share of it."""
        size, period = self.global_batch_size, self._period
        index = step * size // period
        begin, end = -(-index * period // size), -(-(index + 1) * period // size)
        length = end - begin
        blocks = max(1, length // self._block_steps)
        block = ((step - begin + 1) * blocks - 1) // length
        return range(begin + block * length // blocks, begin + (block + 1) * length // blocks)

    def _shuffled(self, steps: range) -> NDArray[np.int64]:
        """The rows of each step of a block. [steps, global_batch_size] int64."""
        size = self.global_batch_size
        positions = np.arange(steps.start * size, steps.stop * size, dtype=np.int64)
        epochs = positions // self.num_rows
        rows = np.concatenate([
            Permutation(self.num_rows, self._seed, epoch)(positions[epochs == epoch] - epoch * self.num_rows)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)])
        texts = SharedTexts(*self._records.text_ids(rows, self._num_negatives), len(rows), size)
        batches, num_duplicates = divided(texts, len(rows), size)
        if num_duplicates and not self.num_duplicates:
            # NOTE: a block may end after the run, and steps of one of several sets are its turns: no steps are named.
            logger.warning("%s: %d of %d drawn rows share a global batch with an equal text (one text is in %d rows); "
                           "they are each other's negatives unless objective.mask_duplicates is true",
                           self._name, num_duplicates, len(rows), texts.most_rows)
        self.num_duplicates += num_duplicates
        return rows[np.array(batches, dtype=np.int64)]
