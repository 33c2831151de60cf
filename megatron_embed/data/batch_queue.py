"""Divides rows into batches in which no text occurs twice, where that is possible."""

from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

_PATIENCE = 32
"""Waiting texts tried per row of a batch; with every fresh row tried once, the work is linear in the rows."""


class SharedTexts:
    """Texts that each row shares with other rows, by a dense index, and how often a batch may hold each text.

    Args:
        ids: hashes of texts.
        owners: the row, from 0, that each belongs to; ascending.

    Attributes:
        is_empty: whether no row shares a text with another one.
        shares: whether a row shares a text with another one, by row.
        most_rows: rows that hold the most common text.
    """

    def __init__(self, ids: NDArray[np.int64], owners: NDArray[np.int64], num_rows: int, batch_size: int) -> None:
        _, text = np.unique(ids, return_inverse=True)
        num_texts = int(text.max()) + 1
        pairs = np.sort(owners * num_texts + text)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # a row may hold a text twice
        row, text = pairs // num_texts, pairs % num_texts
        occurrences = np.bincount(text, minlength=num_texts)
        shared = occurrences[text] > 1
        self.is_empty = not shared.any()
        counts = np.bincount(row[shared], minlength=num_rows)
        self.shares = (counts > 0).tobytes()
        self._ends = array("q", np.cumsum(counts).tobytes())
        self._row_texts = array("q", text[shared].tobytes())
        self.most_rows = int(occurrences.max())
        # A text of m rows comes m / batches times per batch on average; allowing the next whole number of them spreads
        # its rows evenly, where allowing one would pile them up at the end. It is 1 for every text that can be apart.
        allowed = np.ceil(occurrences * batch_size / num_rows).astype(np.int64)
        self.can_be_apart = int(allowed.max()) == 1
        self._allowed = array("q", allowed.tobytes())

    def of_row(self, row: int) -> Sequence[int]:
        """The texts that the row shares with others."""
        return self._row_texts[self._ends[row - 1] if row else 0:self._ends[row]]

    def allowed(self, text: int) -> int:
        """The number of rows of a batch that may have this text; 1 for a row's own mark."""
        return self._allowed[text] if text >= 0 else 1


class BatchQueue:
    """Rows to be divided into batches: new ones in order, and waiting ones, each behind the text that blocked it.

    Attributes:
        num_duplicates: rows that were put into a batch beside an equal text.
        is_crowded: whether the last batch was completed with rows that it should not have.
    """

    def __init__(self, left_over: list[int], rows: list[int], texts: SharedTexts, batch_size: int) -> None:
        self.num_duplicates = 0
        self.is_crowded = False
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
        self._batch, self._used, self.is_crowded = [], {}, False
        self._take_waiting()
        fresh, batch, shares = self._fresh, self._batch, self._texts.shares
        while fresh and len(batch) < self._batch_size:
            row = fresh.popleft()
            if not shares[row] and row not in self._twice:
                batch.append(row)
                continue
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
        self.is_crowded = True
        while len(self._batch) < self._batch_size:
            text = next(iter(self._waiting))
            queue = self._waiting.pop(text)
            row = queue.popleft()
            self._place(row, self._marks(row))
            self._num_waiting -= 1
            if queue:
                self._waiting[text] = queue


def divided(texts: SharedTexts, num_rows: int, batch_size: int) -> tuple[list[list[int]], int]:
    """(the rows 0 ... num_rows - 1 in batches, rows that are in a batch beside an equal text).

    Rows keep their order, but for those that wait for a batch without their texts, and a few of the last batch that
    change places with rows of other ones. `num_rows` is a multiple of `batch_size`.
    """
    if texts.is_empty:
        return [list(range(first, first + batch_size)) for first in range(0, num_rows, batch_size)], 0
    queue = BatchQueue([], list(range(num_rows)), texts, batch_size)
    batches, crowded = [], []
    while (batch := queue.next_batch()) is not None:
        crowded += [len(batches)] * queue.is_crowded
        batches.append(batch)
    if rest := queue.left_over():
        crowded.append(len(batches))
        batches.append(rest)
    if crowded:
        _Exchange(texts, batches, 8 * num_rows).relieve(crowded)
    if texts.can_be_apart and not crowded:
        return batches, 0
    return batches, sum(_num_beside_equals(batch, texts) for batch in batches)


def _num_beside_equals(batch: Sequence[int], texts: SharedTexts) -> int:
    seen: set[int] = set()
    count = 0
    for row in batch:
        if not texts.shares[row]:
            continue
        marks = texts.of_row(row)
        count += any(mark in seen for mark in marks)
        seen.update(marks)
    return count


class _Exchange:
    """Lets rows that meet too many equal texts in their batch change places with rows of other batches.

    Args:
        patience: pairs of rows that are looked at, in all.
    """

    def __init__(self, texts: SharedTexts, batches: list[list[int]], patience: int) -> None:
        self._texts, self._batches = texts, batches
        self._patience = patience
        self._counts: dict[int, dict[int, int]] = {}

    def relieve(self, crowded: Sequence[int]) -> None:
        """Take from these batches the rows that are too many, as far as others can have them."""
        for number in crowded:
            for position in range(len(self._batches[number])):
                if self._patience <= 0:
                    return
                row = self._batches[number][position]
                self._note(number, row, -1)
                if self._fits(number, row):
                    self._note(number, row, 1)
                else:
                    self._move(number, position)

    def _count(self, number: int) -> dict[int, int]:
        """Rows of a batch by text."""
        if number not in self._counts:
            counts: dict[int, int] = {}
            for row in self._batches[number]:
                for mark in self._texts.of_row(row):
                    counts[mark] = counts.get(mark, 0) + 1
            self._counts[number] = counts
        return self._counts[number]

    def _note(self, number: int, row: int, change: int) -> None:
        counts = self._count(number)
        for mark in self._texts.of_row(row):
            counts[mark] = counts.get(mark, 0) + change

    def _fits(self, number: int, row: int) -> bool:
        counts = self._count(number)
        return all(counts.get(mark, 0) < self._texts.allowed(mark) for mark in self._texts.of_row(row))

    def _move(self, number: int, position: int) -> None:
        """Find a row of another batch to change places with; the row at `position` is not counted in its batch."""
        row = self._batches[number][position]
        for distance in range(1, len(self._batches)):
            other = (number - distance) % len(self._batches)
            self._patience -= 1
            if self._patience <= 0:
                break
            if not self._fits(other, row):
                continue
            for place, candidate in enumerate(self._batches[other]):
                self._patience -= 1
                if self._fits(number, candidate):
                    self._batches[number][position], self._batches[other][place] = candidate, row
                    self._note(other, candidate, -1)
                    self._note(other, row, 1)
                    self._note(number, candidate, 1)
                    return
        self._note(number, row, 1)
