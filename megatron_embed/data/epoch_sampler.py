"""The order of rows of runs that began before ORDER_VERSION 2, which they keep: each epoch is drawn as a whole."""

import logging
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.batch_queue import BatchQueue, SharedTexts
from megatron_embed.data.records import AnyRecord, Records
from megatron_embed.data.sampler import Sampler, check_batch_size

logger = logging.getLogger(__name__)

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


class EpochSampler(Sampler):
    """Row indices of every optimizer step, as runs have them that began before ORDER_VERSION 2.

    Each epoch is a seeded permutation, and a row that shares a text (query, positive, or one of the first
    `num_negatives` negatives) or a document's id with a row of the batch waits for a later batch. Rows left at the
    end of an epoch open the next one, so nothing is lost. A text of more rows than an epoch has batches cannot
    avoid itself: its rows are spread evenly.

    Raises:
        ConfigError: the global batch is larger than the data.
    """

    def __init__(self, records: Records[AnyRecord], *, global_batch_size: int, seed: int,
                 num_negatives: int = 0) -> None:
        check_batch_size(global_batch_size, len(records))
        self.num_rows = len(records)
        self.global_batch_size = global_batch_size
        self._seed = seed
        self._lock = threading.Lock()
        ids = records.text_ids(np.arange(len(records)), num_negatives)
        self._texts = SharedTexts(*ids, len(records), global_batch_size)
        self._first_steps = [0]
        self._left_over: list[list[int]] = [[]]
        self._duplicates: list[int] = []
        self._cache: dict[int, _Epoch] = {}

    def rows_of_step(self, step: int) -> list[int]:
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
                                   "rows); they are each other's negatives unless objective.mask_duplicates is true",
                                   epoch_index, epoch.num_duplicates, self.num_rows, self._texts.most_rows)
            while len(self._cache) >= _CACHED_EPOCHS:
                del self._cache[next(iter(self._cache))]
            self._cache[epoch_index] = epoch
        return self._cache[epoch_index]

    def _shuffled_epoch(self, epoch_index: int) -> _Epoch:
        order = np.random.Generator(np.random.PCG64([self._seed, epoch_index])).permutation(self.num_rows)
        queue = BatchQueue(self._left_over[epoch_index], order.tolist(), self._texts, self.global_batch_size)
        batches = list(iter(queue.next_batch, None))
        return _Epoch(
            first_step=self._first_steps[epoch_index],
            batches=np.array(batches, dtype=np.int64).reshape(-1, self.global_batch_size),
            left_over=queue.left_over(),
            num_duplicates=queue.num_duplicates,
        )
