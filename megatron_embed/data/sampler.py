"""The rows of each optimizer step: the same for every layout, and known for any step without replaying a run."""

import logging
import math
import threading
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.records import AnyRecord, shared_keys, text_id
from megatron_embed.errors import ConfigError

logger = logging.getLogger(__name__)

_PATIENCE = 32
"""Waiting texts tried per row of a batch; with every fresh row tried once, an epoch is linear in its rows."""
_CACHED_EPOCHS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """The steps of one epoch."""

    first_step: int
    batches: NDArray[np.int64]
    """[steps, global_batch_size] row indices."""
    left_over: list[int]
    """Rows that did not fill a batch; the next epoch begins with them."""
    num_duplicates: int
    """Rows that were put into a batch beside an equal text."""


class Sampler(ABC):
    """The order in which a run takes its rows.

    Attributes:
        num_rows: rows of the data.
        global_batch_size: rows of an optimizer step.
    """

    num_rows: int
    global_batch_size: int

    @abstractmethod
    def rows_of_step(self, step: int) -> list[int]:
        """The `global_batch_size` row indices, in the whole data, of optimizer step `step` >= 0."""

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps that take as many rows as the data has; not rounded."""
        return self.num_rows / self.global_batch_size

    def steps_of_epochs(self, epochs: float) -> int:
        """Optimizer steps that take this many times the rows of the data, rounded up once at the end, >= 1."""
        return max(1, math.ceil(round(epochs * self.num_rows / self.global_batch_size, 6)))


class GlobalBatchSampler(Sampler):
    """Row indices of every optimizer step: a pure function of the step, the seed and the rows.

    Without shuffling, step k takes rows k*global_batch_size ... and wraps round at the end. With shuffling, each epoch
    is a seeded permutation, and a row that shares a text (query, positive, or one of the first `num_negatives`
    negatives) or a document's id with a row of the batch waits for a later batch. Rows left at the end of an epoch open
    the next one, so nothing is lost. A text of more rows than an epoch has batches cannot avoid itself: its rows are
    spread evenly.

    Raises:
        ConfigError: the global batch is larger than the data.
    """

    def __init__(self, records: Sequence[AnyRecord], *, global_batch_size: int, shuffle: bool, seed: int,
                 num_negatives: int = 0) -> None:
        if global_batch_size > len(records):
            raise ConfigError(f"training.global_batch_size = {global_batch_size} is larger than the {len(records)} "
                              "rows of data.train; lower it or add rows", key="training.global_batch_size")
        self.num_rows = len(records)
        self.global_batch_size = global_batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._lock = threading.Lock()
        if shuffle:
            self._texts = _SharedTexts(records, num_negatives, global_batch_size)
            self._first_steps = [0]
            self._left_over: list[list[int]] = [[]]
            self._duplicates: list[int] = []
            self._cache: dict[int, _Epoch] = {}

    def rows_of_step(self, step: int) -> list[int]:
        if not self._shuffle:
            start = step * self.global_batch_size
            return [row % self.num_rows for row in range(start, start + self.global_batch_size)]
        with self._lock:
            epoch_index = 0
            while step >= self._first_step_after(epoch_index):
                epoch_index += 1
            epoch = self._epoch(epoch_index)
            return [int(row) for row in epoch.batches[step - epoch.first_step]]

    def _first_step_after(self, epoch_index: int) -> int:
        if epoch_index + 1 == len(self._first_steps):
            self._epoch(epoch_index)
        return self._first_steps[epoch_index + 1]

    def _epoch(self, epoch_index: int) -> _Epoch:
        if epoch_index not in self._cache:
            epoch = self._shuffled_epoch(epoch_index)
            if epoch_index + 1 == len(self._first_steps):
                self._first_steps.append(epoch.first_step + len(epoch.batches))
                self._left_over.append(epoch.left_over)
                self._duplicates.append(epoch.num_duplicates)
                if epoch.num_duplicates and not any(self._duplicates[:-1]):
                    logger.warning("epoch %d: %d of %d rows share a global batch with an equal text (one text is in %d "
                                   "rows); fewer with a smaller training.global_batch_size or data.num_negatives",
                                   epoch_index, epoch.num_duplicates, self.num_rows, self._texts.most_rows)
            while len(self._cache) >= _CACHED_EPOCHS:
                del self._cache[next(iter(self._cache))]
            self._cache[epoch_index] = epoch
        return self._cache[epoch_index]

    def _shuffled_epoch(self, epoch_index: int) -> _Epoch:
        order = np.random.Generator(np.random.PCG64([self._seed, epoch_index])).permutation(self.num_rows)
        queue = _Queue(self._left_over[epoch_index], order.tolist(), self._texts, self.global_batch_size)
        batches = list(iter(queue.next_batch, None))
        return _Epoch(
            first_step=self._first_steps[epoch_index],
            batches=np.array(batches, dtype=np.int64).reshape(-1, self.global_batch_size),
            left_over=queue.left_over(),
            num_duplicates=queue.num_duplicates,
        )


class _SharedTexts:
    """Texts that each row shares with other rows, by a dense index, and how often a batch may hold each text.

    Attributes:
        most_rows: rows that hold the most common text.
    """

    def __init__(self, records: Sequence[AnyRecord], num_negatives: int, global_batch_size: int) -> None:
        ids, counts = array("q"), array("q")
        for record in records:
            texts = shared_keys(record, num_negatives)
            ids.extend(sorted(text_id(text) for text in texts))
            counts.append(len(texts))
        _, text, occurrences = np.unique(np.asarray(ids), return_inverse=True, return_counts=True)
        shared = occurrences[text] > 1
        row = np.repeat(np.arange(len(counts)), np.asarray(counts))[shared]
        self._ends = array("q", np.cumsum(np.bincount(row, minlength=len(counts))).tolist())
        self._row_texts = array("q", text[shared].tolist())
        self.most_rows = int(occurrences.max())
        # A text of m rows comes m / batches times per batch on average; allowing the next whole number of them spreads
        # its rows evenly, where allowing one would pile them up at the end. It is 1 for every text that can be apart.
        self._allowed = array("q", np.ceil(occurrences * global_batch_size / len(counts)).astype(np.int64).tolist())

    def of_row(self, row: int) -> array:  # type: ignore[type-arg]
        """Indices (>= 0) of the row's shared texts."""
        return self._row_texts[self._ends[row - 1] if row else 0:self._ends[row]]

    def allowed(self, text: int) -> int:
        """How many rows of a batch may have this text; 1 for a row's own mark."""
        return self._allowed[text] if text >= 0 else 1


class _Queue:
    """Rows to be divided into batches: new ones in order, and waiting ones, each behind the text that blocked it."""

    def __init__(self, left_over: list[int], rows: list[int], texts: _SharedTexts, batch_size: int) -> None:
        self.num_duplicates = 0
        self._fresh = deque(chain(left_over, rows))
        self._twice = set(left_over)
        self._waiting: dict[int, deque[int]] = {}
        self._num_waiting = 0
        self._texts = texts
        self._batch_size = batch_size
        self._batch: list[int] = []
        self._used: dict[int, int] = {}

    def next_batch(self) -> list[int] | None:
        """The next batch; None once the remaining rows are left to the next epoch."""
        self._batch, self._used = [], {}
        self._take_waiting()
        while self._fresh and len(self._batch) < self._batch_size:
            row = self._fresh.popleft()
            blocker = self._place_unless_blocked(row)
            if blocker is not None:
                self._waiting.setdefault(blocker, deque()).append(row)
                self._num_waiting += 1
        if len(self._batch) < self._batch_size:
            if len(self._batch) + self._num_waiting < 2 * self._batch_size:
                return None
            self._take_blocked()
        return self._batch

    def left_over(self) -> list[int]:
        """The rows of the batch that could not be completed, and those still waiting."""
        return [*self._batch, *chain.from_iterable(self._waiting.values())]

    def _marks(self, row: int) -> Sequence[int]:
        """The row's shared texts, and a mark of its own where it could meet itself: left over, and in this epoch."""
        texts = self._texts.of_row(row)
        return [~row, *texts] if row in self._twice else texts

    def _place_unless_blocked(self, row: int) -> int | None:
        """Put the row into the batch, or give the mark that it would repeat too often."""
        marks = self._marks(row)
        for mark in marks:
            if self._used.get(mark, 0) >= self._texts.allowed(mark):
                return mark
        self._place(row, marks)
        return None

    def _place(self, row: int, marks: Sequence[int]) -> None:
        self.num_duplicates += any(mark in self._used for mark in marks) if marks else 0
        for mark in marks:
            self._used[mark] = self._used.get(mark, 0) + 1
        self._batch.append(row)

    def _take_waiting(self) -> None:
        """Place waiting rows that fit, those of the longest waiting texts first."""
        for text in list(islice(self._waiting, _PATIENCE * self._batch_size)):
            if len(self._batch) == self._batch_size:
                return
            queue = self._waiting[text]
            while queue and len(self._batch) < self._batch_size and self._place_unless_blocked(queue[0]) is None:
                queue.popleft()
                self._num_waiting -= 1
            del self._waiting[text]
            if queue:  # at the end, so that the others have their turn first
                self._waiting[text] = queue

    def _take_blocked(self) -> None:
        """Complete the batch with rows that wait, one per text in turn, duplicates or not."""
        while len(self._batch) < self._batch_size:
            text = next(iter(self._waiting))
            queue = self._waiting.pop(text)
            row = queue.popleft()
            self._place(row, self._marks(row))
            self._num_waiting -= 1
            if queue:
                self._waiting[text] = queue
