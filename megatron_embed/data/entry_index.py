"""Reads the rows of an entry once, checks them, and writes them into its index; or finds the index of an earlier start.
"""

import os
from pathlib import Path
from typing import Any

from megatron_embed.config.data import TrainFile
from megatron_embed.data.formats import FORMATS, RowReader
from megatron_embed.data.index_parts import Part
from megatron_embed.data.index_store import (
    IndexPlace,
    IndexWriter,
    Unit,
    folder_of,
    index_in_memory,
    read_index,
)
from megatron_embed.data.indexed_rows import IndexedRows, RawRows, stamp_of
from megatron_embed.data.jsonl import BLANK
from megatron_embed.data.records import Kind
from megatron_embed.data.row_index import IndexedUnit, RowIndex, Store, UnitWriter
from megatron_embed.errors import DataError

UNIT_BYTES = 32 << 20
"""Bytes of a file that one process reads at a time; a rank that dies loses the work on one unit."""


def open_index(rows: RawRows, reader: RowReader, file: TrainFile, kind: Kind | None, place: IndexPlace) -> RowIndex:
    """The index of an entry. Reads no row if a valid one is found.

    Raises:
        DataError: a row cannot be used.
        ConfigError: a file cannot be opened, or the index cannot be written to the directory that is set for it.
    """
    files = rows.files_with_offsets()
    if files is None:
        return _scanned(rows, reader)
    entry = _Entry(files, reader)
    folder = entry.folder(file, kind, place)
    index = None if folder is None else read_index(folder)
    if index is None:
        entry.read_first_row()
        written = None if folder is None else IndexWriter(
            folder, entry.units, entry.read_unit, sizes=entry.sizes, what=file.path, place=place).write()
        return index_in_memory(entry.units, entry.read_unit) if written is None else written
    entry.trust(index)
    return index


def _scanned(rows: RawRows, reader: RowReader) -> RowIndex:
    """The index of rows without offsets, such as those of a table."""
    parts: list[Part] = []
    writer = UnitWriter(0, lambda info, data: parts.append(Part(info, data)))
    for row, source in rows.scan():
        writer.add(reader.read(row, source))
    writer.summary.columns = set(reader.columns.present)
    return RowIndex([writer.finish()], parts)


class _Entry:
    """The files of an entry of `data.train`, in units."""

    def __init__(self, files: list[IndexedRows], reader: RowReader) -> None:
        self._files, self._reader = files, reader
        self.units: list[Unit] = []
        self.sizes: list[int] = []
        for index, rows in enumerate(files):
            try:
                status = os.stat(rows.path)
            except OSError:
                next(rows.read(), None)  # raises the error that names the key
                raise
            rows.stamp = stamp_of(status)
            step = UNIT_BYTES if rows.can_be_divided else max(1, status.st_size)
            begins = range(0, max(1, status.st_size), step)
            self.units += [Unit(index, begin, begin + step if rows.can_be_divided else None) for begin in begins]
            self.sizes += [min(step, status.st_size - begin) for begin in begins]

    def folder(self, file: TrainFile, kind: Kind | None, place: IndexPlace) -> Path | None:
        """See `folder_of`."""
        settings: dict[str, Any] = {"kind": kind, "columns": file.columns, "score_range": file.score_range,
                                    "instruction": file.instruction}
        if file.corpus is not None and not os.path.isfile(file.corpus):
            return None  # nothing says whether it has changed
        if file.corpus is not None:
            settings["corpus"] = [os.path.abspath(file.corpus), *stamp_of(os.stat(file.corpus))]
        return folder_of(place, [rows.path for rows in self._files], settings)

    def read_first_row(self) -> None:
        """Let the first row decide the format, whichever unit is read first. Raises DataError if it cannot be used."""
        for rows in self._files:
            for line_number, _, raw in rows.read():
                if raw.strip(BLANK):
                    source = f"{rows.path}:{line_number}"
                    self._reader.read(rows.parse(raw, source, trusted=False), source)
                    return

    def trust(self, index: RowIndex) -> None:
        """Take over from an index what reading all rows would tell."""
        self._reader.format = next((form for form in FORMATS if form.name == index.summary.format), None)
        self._reader.ignored = set(index.summary.ignored)
        for rows in self._files:
            rows.prepare()

    def read_unit(self, unit: Unit, first_line: int, store: Store) -> IndexedUnit:
        """See `ReadUnit`."""
        rows, reader, writer = self._files[unit.file], self._reader, UnitWriter(unit.file, store)
        digest, path, line_number = writer.summary.digest, self._files[unit.file].path, first_line - 1
        lines_before, instruction = first_line - 1, reader.default_instruction
        for line_number, start, raw in rows.read(unit.begin, unit.end, first_line):
            stripped = raw.strip()
            if not stripped and not raw.strip(BLANK):
                continue
            source, position = f"{path}:{line_number}", (line_number - lines_before, start, start + len(raw))
            row = rows.parse(raw, source, trusted=False)
            if (plain := reader.plain_texts(row)) is not None:
                writer.add_plain(*plain, instruction, position)
            else:
                writer.add(reader.read(row, source), position)
            digest.add(stripped)
        try:
            is_changed = stamp_of(os.stat(path)) != rows.stamp
        except OSError:
            is_changed = True
        if is_changed:
            raise DataError(f"{path}:1: the file was changed while it was read; start the run again")
        writer.summary.lines = line_number - lines_before
        writer.summary.ignored = set(reader.ignored)
        writer.summary.columns = set(reader.columns.present)
        writer.summary.format = None if reader.format is None else reader.format.name
        return writer.finish()
