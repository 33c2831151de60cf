"""The different texts of training rows, each read with its row when it is accessed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.corpus import LazyTexts, Picked
from megatron_embed.data.records import Record, documents_in_use, text_id

TextsOfRow = Callable[[Record], Sequence[tuple[int, str]]]
"""A row -> the id and the text of each of its texts."""


@dataclass(frozen=True, kw_only=True)
class UniqueTexts:
    """Different texts with their ids."""

    ids: NDArray[np.int64]
    """[texts], ascending."""
    texts: Sequence[str]
    """In the order of the ids."""


class _TextsOfRows(LazyTexts):
    """Texts by row and place. Reads a row again for each of them, but not for neighbours of one row."""

    def __init__(self, records: Sequence[Any], texts_of: TextsOfRow, rows: NDArray[np.int64],
                 places: NDArray[np.int64]) -> None:
        self._records, self._texts_of, self._where = records, texts_of, (rows, places)

    def __len__(self) -> int:
        return len(self._where[0])

    def _text(self, index: int) -> str:
        row, place = (int(values[index]) for values in self._where)
        return self._texts_of(self._records[row])[place][1]


class _Joined(LazyTexts):
    """Several sequences of texts as one."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def _text(self, index: int) -> str:
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._parts[part][index - self._ends[part]]


def documents_of(record: Record, num_positives: int, num_negatives: int) -> list[tuple[int, str]]:
    """The id and the text of each document that a step may embed."""
    return [(text_id(text), text) for text in documents_in_use(record, num_negatives, num_positives)]


def unique_texts(records: Sequence[Any], texts_of: TextsOfRow, others: Sequence[Sequence[str]] = ()) -> UniqueTexts:
    """The different texts of rows, and of other sequences. Reads every row, and every other text, once.

    Args:
        texts_of: gives the same texts whenever a row is read.
    """
    def of_rows() -> Iterator[tuple[int, int, int]]:
        for row in range(len(records)):
            for place, (name, _) in enumerate(texts_of(records[row])):
                yield name, row, place

    found = np.fromiter((value for triple in of_rows() for value in triple), dtype=np.int64).reshape(-1, 3)
    parts: list[Sequence[str]] = [_TextsOfRows(records, texts_of, found[:, 1], found[:, 2]), *others]
    ids = [found[:, 0], *(np.fromiter(map(text_id, texts), dtype=np.int64, count=len(texts)) for texts in others)]
    unique, first = np.unique(np.concatenate(ids), return_index=True)
    # In the order of the rows, so that neighbours are read together.
    return UniqueTexts(ids=unique, texts=Picked(_Joined(parts), first.tolist()))
