"""Rows of a file that are found again by their byte offsets: the base of all sources of rows, and JSONL files."""

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.jsonl import (
    BLANK,
    is_compressed,
    open_file,
    parse_object,
    parse_trusted_object,
    read_lines_between,
)
from megatron_embed.data.row_fields import Row
from megatron_embed.errors import DataError

_COPY_BYTES = 1 << 20


class RawRows(ABC):
    """Rows of one file or table.

    Attributes:
        path: as it was given.
        digest: hash of the rows, once `scan` has ended.
        detects_changes: whether `row` refuses a row of a file that changed since `scan`. Its other rows can be trusted
            to be those that were checked then.
        holds_texts: whether the values are texts, in which numbers and lists are still to be read (csv_rows.typed).
    """

    path: str
    digest: str
    detects_changes: bool
    holds_texts: bool = False

    @abstractmethod
    def scan(self) -> Iterator[tuple[Row, str]]:
        """Every row in order, with its FILE:LINE (a table: FILE:ROW, from 1). Call it first, once, to its end.

        Raises:
            ConfigError: the file cannot be opened.
            DataError: a line cannot be read.
        """

    @abstractmethod
    @abstractmethod
    def source(self, index: int) -> str:
        """FILE:LINE of row `index`, from 0."""

    def files_with_offsets(self) -> "list[IndexedRows] | None":
        """The files, if all of them are read line by line, so that `read_at` finds a row; None otherwise."""
        return None

    @abstractmethod
    def row(self, index: int) -> tuple[Row, str]:
        """Row `index`, from 0, and its FILE:LINE.

        Raises:
            DataError: the file changed since `scan`, or is gone.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows; known once `scan` has ended."""


class DescriptorRows(RawRows):
    """Rows that are read through a file descriptor, which is closed with this object."""

    detects_changes = True

    _descriptor: int | None = None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


class IndexedRows(DescriptorRows):
    """Rows of a file of lines that `read` finds and `parse` reads. Memory, once scanned: 16 bytes per row.

    A compressed file is unpacked into a nameless temporary file (TMPDIR) at the first access by index.
    """

    stamp: tuple[int, int]
    """Size and time of change of the file when it was read."""

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._key = key

    @property
    def can_be_divided(self) -> bool:
        """Whether rows can be read from the middle of the file on."""
        return False

    @abstractmethod
    def read(self, begin: int = 0, end: int | None = None, first_line: int = 1) -> Iterator[tuple[int, int, bytes]]:
        """(line number, byte offset, bytes) of every row, in order; blank lines may be among them.

        Args:
            begin, end: of a file that can be divided: rows that begin there or behind, and before the end (None: all).
            first_line: number of the first line read.
        Raises:
            ConfigError: the file cannot be opened.
            DataError: a line cannot be read.
        """

    def prepare(self) -> None:
        """Read what `parse` needs besides the bytes of a row, if `read` has not."""

    @abstractmethod
    def parse(self, raw: bytes, source: str, *, trusted: bool) -> Row:
        """The row of these bytes; `trusted`: they were read before and have not changed."""

    def scan(self) -> Iterator[tuple[Row, str]]:
        starts, line_numbers, end = array("q"), array("q"), 0
        digest = hashlib.blake2b(digest_size=16)
        for line_number, start, raw in self.read():
            if not raw.strip(BLANK):
                continue
            digest.update(raw.strip() + b"\n")
            source = f"{self.path}:{line_number}"
            yield self.parse(raw, source, trusted=False), source
            starts.append(start)
            line_numbers.append(line_number)
            end = start + len(raw)
        starts.append(end)
        self._starts: NDArray[np.int64] = np.frombuffer(starts, dtype=np.int64)
        self._line_numbers: NDArray[np.int64] = np.frombuffer(line_numbers, dtype=np.int64)
        self.stamp = stamp_of(os.stat(self.path))
        self.digest = digest.hexdigest()

    def files_with_offsets(self) -> "list[IndexedRows]":
        return [self]

    def __len__(self) -> int:
        return len(self._line_numbers)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def source(self, index: int) -> str:
        return f"{self.path}:{self._line_numbers[index]}"

    def row(self, index: int) -> tuple[Row, str]:
        return self.read_at(int(self._starts[index]), int(self._starts[index + 1]), int(self._line_numbers[index]))

    def read_at(self, start: int, end: int, line_number: int) -> tuple[Row, str]:
        """The row between two bytes of a file that was read before, and its FILE:LINE.

        Raises:
            DataError: the file changed since, or is gone.
        """
        raw, source = self.bytes_at(start, end, line_number)
        return self.parse(raw, source, trusted=True), source

    def bytes_at(self, start: int, end: int, line_number: int) -> tuple[bytes, str]:
        """The same as its bytes, none where the file has none there, and FILE:LINE."""
        source = f"{self.path}:{line_number}"
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            # Of a compressed file the descriptor is that of our own unpacked copy, which nothing changes.
            unchanged = is_compressed(self.path) or stamp_of(os.fstat(self._descriptor)) == self.stamp
            # pread keeps no position: threads and forked processes may share the descriptor.
            raw = os.pread(self._descriptor, end - start, start) if 0 <= start < end <= os.fstat(
                self._descriptor).st_size else b""
        except OSError as error:
            raise DataError(f"{source}: cannot be read again: {error.strerror}; "
                            "keep the file until the run ends") from None
        if not unchanged:
            raise DataError(f"{source}: the file was changed after it was checked; start the run again")
        return raw, source

    def _open(self) -> int:
        if not is_compressed(self.path):
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        if stamp_of(os.stat(self.path)) != self.stamp:
            raise DataError(f"{self.path}:1: the file was changed after it was checked; start the run again")
        try:
            with open_file(self.path, self._key) as packed, tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(packed, unpacked, _COPY_BYTES)
                unpacked.flush()
                return os.dup(unpacked.fileno())
        except OSError as error:
            raise DataError(f"{self.path}:1: cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}; free "
                            "space there, set TMPDIR to another directory, or unpack the file") from None


class JsonlRows(IndexedRows):
    """The rows of a JSONL file."""

    @property
    def can_be_divided(self) -> bool:
        return not is_compressed(self.path)

    def read(self, begin: int = 0, end: int | None = None, first_line: int = 1) -> Iterator[tuple[int, int, bytes]]:
        return read_lines_between(self.path, self._key, begin, end, first_line)

    def parse(self, raw: bytes, source: str, *, trusted: bool) -> Row:
        return parse_trusted_object(raw, source) if trusted else parse_object(raw, source)


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """Size and time of the last change of a file: at least one changes when it is written."""
    return status.st_size, status.st_mtime_ns
