"""An entry of `data.train`: its records, and what is known of all of them without reading any."""

from abc import abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_embed.config.data import TrainFile
from megatron_embed.data.records import AnyRecord, Records
from megatron_embed.data.row_index import RowIndex, TextIds


class DataEntry(Records[AnyRecord]):
    """Records of one `data.train` entry.

    Attributes:
        path: as it was given.
        instructions: each distinct instruction (None: rows without one), with the FILE:LINE of its first row.
        digest: hash of the rows as they are read; blank lines and line endings do not count.
        most_positives: positives of the row with the most; of a list, documents with a label above 0.
        most_negatives: negatives of the row with the most; 0 if rows are lists with labels.
        most_documents: documents of the row with the most.
    """

    path: str
    digest: str
    instructions: dict[str | None, str]
    most_positives: int
    most_negatives: int
    most_documents: int

    def __init__(self, file: TrainFile) -> None:
        self.path = file.path
        self.file = file

    @property
    def index_folder(self) -> Path | None:
        """Directory of the index of the rows; None: there is no index."""
        return None

    @property
    def digest_of_order_1(self) -> str:
        """The digest in checkpoints of runs that began before ORDER_VERSION 2."""
        return self.digest

    @abstractmethod
    def query_ids(self, first: int, last: int) -> NDArray[np.int64]:
        """Hash of the query of the rows first ... last - 1; reads no row. [last - first] int64."""


class IndexedEntry(DataEntry):
    """An entry with an index of its rows."""

    def take_index(self, index: RowIndex) -> None:
        """Take over what the index says of all rows."""
        self.row_index, summary = index, index.summary
        self.instructions = {instruction: self._source(row) for instruction, row in summary.instructions.items()}
        self.most_positives, self.most_negatives = summary.most_positives, summary.most_negatives
        self.most_documents = summary.most_documents

    @property
    def index_folder(self) -> Path | None:
        return self.row_index.folder

    @abstractmethod
    def _source(self, index: int) -> str:
        """FILE:LINE of a row, which is not read."""

    def query_ids(self, first: int, last: int) -> NDArray[np.int64]:
        return self.row_index.query_ids(first, last)

    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> TextIds:
        return self.row_index.text_ids(rows, num_negatives)


class EntryPart(DataEntry):
    """Some of an entry's records.

    Args:
        rows: their indices, or with `complement` those of the others, ascending. Memory: 8 bytes for each.
    """

    def __init__(self, whole: DataEntry, rows: NDArray[np.int64], *, complement: bool) -> None:
        super().__init__(whole.file)
        self.instructions, self.digest = whole.instructions, whole.digest
        self.most_positives, self.most_negatives = whole.most_positives, whole.most_negatives
        self.most_documents = whole.most_documents
        self._whole = whole
        self._rows = rows  # held out
        self._complement = complement
        # Row i of the others stands behind those of `rows` with fewer than i + 1 others before them.
        self._others_before = rows - np.arange(len(rows)) if complement else rows

    def __len__(self) -> int:
        return len(self._whole) - len(self._rows) if self._complement else len(self._rows)

    def _in_whole(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices, in the whole entry, of these rows."""
        if not self._complement:
            return self._rows[rows]
        return rows + np.searchsorted(self._others_before, rows, side="right")

    def _record(self, index: int) -> AnyRecord:
        return self._whole[int(self._in_whole(np.array([index]))[0])]

    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> TextIds:
        return self._whole.text_ids(self._in_whole(rows), num_negatives)

    @property
    def digest_of_order_1(self) -> str:
        return self._whole.digest_of_order_1

    def query_ids(self, first: int, last: int) -> NDArray[np.int64]:
        rows = self._in_whole(np.arange(first, last))
        begin, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        return self._whole.query_ids(begin, end)[rows - begin]
