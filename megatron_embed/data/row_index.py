"""The index of an entry's rows: where each is, what its texts hash to, and the maxima that set-up needs."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.index_parts import ROWS_OF_PART, Part, PartInfo, PartWriter, RowsDigest
from megatron_embed.data.records import AnyRecord, Record

Store = Callable[[PartInfo, bytes], object]
TextIds = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Hashes of texts, and the position, among the rows that were asked for, of the row that each belongs to."""


@dataclass(kw_only=True)
class Summary:
    """What is known of a unit of rows (all rows of an entry, or some of one file) besides its parts."""

    rows: int = 0
    lines: int = 0
    """Lines of the unit, blank ones too."""
    digest: RowsDigest = field(default_factory=RowsDigest)
    instructions: dict[str | None, int] = field(default_factory=dict)
    """Each distinct instruction (None: rows without one), with the index of its first row."""
    ignored: set[str] = field(default_factory=set)
    """Keys of rows that are not read."""
    columns: set[str] = field(default_factory=set)
    """Columns with names of the entry's own that some row has."""
    format: str | None = None
    """Name of the rows' format."""
    most_positives: int = 0
    most_negatives: int = 0
    most_documents: int = 0

    def note(self, record: AnyRecord) -> None:
        """Look at row `rows`, the next one."""
        self.instructions.setdefault(record.instruction, self.rows)
        if isinstance(record, Record):
            positives, negatives = len(record.positive), len(record.negatives)
            self._raise_to(positives, negatives, positives + negatives)
        else:
            self._raise_to(sum(label > 0 for label in record.labels), 0, len(record.documents))

    def note_plain(self, instruction: str | None, shape: tuple[int, int, bool]) -> None:
        """The same of a row with this instruction, positives and negatives."""
        self.instructions.setdefault(instruction, self.rows)
        self._raise_to(shape[0], shape[1], shape[0] + shape[1])

    def _raise_to(self, positives: int, negatives: int, documents: int) -> None:
        self.most_positives = max(self.most_positives, positives)
        self.most_negatives = max(self.most_negatives, negatives)
        self.most_documents = max(self.most_documents, documents)

    def extend(self, other: "Summary") -> None:
        """Take the rows of another unit behind these."""
        for instruction, row in other.instructions.items():
            self.instructions.setdefault(instruction, self.rows + row)
        self.rows += other.rows
        self.lines += other.lines
        self.digest.extend(other.digest.value, other.digest.rows)
        self.ignored |= other.ignored
        self.columns |= other.columns
        self.format = self.format or other.format
        self._raise_to(other.most_positives, other.most_negatives, other.most_documents)

    def as_json(self) -> dict[str, Any]:
        """The values that `from_json` reads."""
        return {**asdict(self), "instructions": list(self.instructions.items()), "ignored": sorted(self.ignored),
                "columns": sorted(self.columns)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Summary":
        """The summary that `as_json` wrote."""
        return cls(**{**values, "digest": RowsDigest(**values["digest"]), "ignored": set(values["ignored"]),
                      "columns": set(values["columns"]), "instructions": dict(values["instructions"])})


@dataclass(kw_only=True)
class IndexedUnit:
    """Rows of one file that were read by one process, in parts."""

    file: int
    """Index of the file in the entry."""
    summary: Summary
    parts: list[PartInfo]

    def as_json(self) -> dict[str, Any]:
        """The values that `from_json` reads."""
        return {"file": self.file, "summary": self.summary.as_json(), "parts": [info.as_json() for info in self.parts]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "IndexedUnit":
        """The unit that `as_json` wrote."""
        parts = [PartInfo(**{**info, "shape": None if info["shape"] is None else tuple(info["shape"])})
                 for info in values["parts"]]
        return cls(file=values["file"], summary=Summary.from_json(values["summary"]), parts=parts)


class UnitWriter:
    """Collects the rows of one unit, in parts of ROWS_OF_PART.

    Args:
        file: index of the file in the entry.
        store: keeps a part and its arrays.
    """

    def __init__(self, file: int, store: Store) -> None:
        self.summary = Summary()
        self._file = file
        self._store = store
        self._parts: list[PartInfo] = []
        self._part = PartWriter()
        self._shapes: set[tuple[int, int, bool]] = set()

    def add(self, record: AnyRecord, position: tuple[int, int, int] | None = None) -> None:
        """Take the next row. `position`: see PartWriter.add."""
        if self._part.rows == ROWS_OF_PART:
            self._store_part()
        self.summary.note(record)
        self.summary.rows += 1
        self._part.add(record, position)

    def add_plain(self, texts: Sequence[bytes], num_positives: int, instruction: str | None,
                  position: tuple[int, int, int]) -> None:
        """Take the next row, as RowReader.plain_texts gives it."""
        if self._part.rows == ROWS_OF_PART:
            self._store_part()
        shape = (num_positives, len(texts) - 1 - num_positives, False)
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.summary.note_plain(instruction, shape)
        self.summary.rows += 1
        self._part.add_texts(texts, shape, position)

    def _store_part(self) -> None:
        info, data = self._part.finish()
        self._store(info, data)
        self._parts.append(info)
        self._part = PartWriter()

    def finish(self) -> IndexedUnit:
        """The unit, once all rows have been added."""
        if self._part.rows:
            self._store_part()
        return IndexedUnit(file=self._file, summary=self.summary, parts=self._parts)


class RowIndex:
    """Rows of an entry by number, in the order of its units. Memory: that of the parts and units, none per row.

    Attributes:
        summary: of all rows.
        file_digests: of the rows of each file.
        folder: where it is kept; None: nowhere.
    """

    def __init__(self, units: Sequence[IndexedUnit], parts: Sequence[Part], folder: Path | None = None) -> None:
        """`parts`: those of all units, in order."""
        self.folder = folder
        self.summary = Summary()
        self.file_digests: list[RowsDigest] = []
        self._parts = list(parts)
        self._part_ends = list(accumulate(part.info.rows for part in parts))
        self._origins: list[tuple[int, int]] = []
        lines = 0
        for unit in units:
            if unit.file == len(self.file_digests):
                self.file_digests.append(RowsDigest())
                lines = 0
            self._origins.extend([(unit.file, lines)] * len(unit.parts))
            self.summary.extend(unit.summary)
            self.file_digests[-1].extend(unit.summary.digest.value, unit.summary.digest.rows)
            lines += unit.summary.lines

    def __len__(self) -> int:
        return self._part_ends[-1] if self._part_ends else 0

    def locate(self, row: int) -> tuple[int, int, int, int]:
        """(file, line number, first byte, byte behind the last) of a row, of a source with offsets."""
        part = bisect_right(self._part_ends, row)
        line, start, end = self._parts[part].location(row - self._first_row(part))
        file, lines_before = self._origins[part]
        return file, lines_before + line, start, end

    def hashes(self, row: int) -> bytes:
        """See Part.hashes."""
        part = bisect_right(self._part_ends, row)
        return self._parts[part].hashes(row - self._first_row(part))

    def _first_row(self, part: int) -> int:
        return self._part_ends[part - 1] if part else 0

    def query_ids(self, first: int, last: int) -> NDArray[np.int64]:
        """Hash of the query of the rows first ... last - 1. [last - first] int64."""
        pieces = []
        for part in range(bisect_right(self._part_ends, first), len(self._parts)):
            begin = self._first_row(part)
            if begin >= last:
                break
            pieces.append(self._parts[part].query_ids(slice(max(0, first - begin), last - begin)))
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> TextIds:
        """See Part.text_ids; rows in any order."""
        return gather_by_group(rows, np.asarray(self._part_ends), lambda part, local: self._parts[part].text_ids(
            local, num_negatives))


def gather_by_group(rows: NDArray[np.int64], ends: NDArray[np.int64],
                    take: Callable[[int, NDArray[np.int64]], TextIds]) -> TextIds:
    """Hashes of the texts of rows that lie in groups, one group after the other.

    Args:
        ends: number of the row behind each group's last.
        take: (group, row numbers in it) -> the same for the rows of one group.
    """
    groups = np.searchsorted(ends, rows, side="right")
    order = np.argsort(groups, kind="stable")
    present, begins = np.unique(groups[order], return_index=True)
    ids, owners = [], []
    for group, positions in zip(present.tolist(), np.split(order, begins[1:]), strict=True):
        found, owner = take(group, rows[positions] - (ends[group - 1] if group else 0))
        ids.append(found)
        owners.append(positions[owner])
    all_ids, all_owners = np.concatenate(ids), np.concatenate(owners)
    by_owner = np.argsort(all_owners, kind="stable")
    return all_ids[by_owner], all_owners[by_owner]
