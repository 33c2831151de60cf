"""Rows of a file that are found again by their byte offsets: the base of all sources of rows, and JSONL files."""

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.jsonl import is_compressed, open_file, parse_object, parse_trusted_object, read_lines
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
    """Rows of a file of lines that `_read` finds and `_parse` reads. Memory: 16 bytes per row.

    A compressed file is unpacked into a nameless temporary file (TMPDIR) at the first access by index.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._key = key

    @abstractmethod
    def _read(self) -> Iterator[tuple[int, int, bytes]]:
        """(line number, byte offset, bytes) of every row, in order.

        Raises:
            ConfigError: the file cannot be opened.
            DataError: a line cannot be read.
        """

    @abstractmethod
    def _parse(self, raw: bytes, source: str, *, trusted: bool) -> Row:
        """The row of these bytes; `trusted`: they were read before and have not changed."""

    def scan(self) -> Iterator[tuple[Row, str]]:
        starts, line_numbers, end = [], [], 0
        digest = hashlib.blake2b(digest_size=16)
        for line_number, start, raw in self._read():
            digest.update(raw.strip() + b"\n")
            source = f"{self.path}:{line_number}"
            yield self._parse(raw, source, trusted=False), source
            starts.append(start)
            line_numbers.append(line_number)
            end = start + len(raw)
        self._starts: NDArray[np.int64] = np.array([*starts, end], dtype=np.int64)
        self._line_numbers: NDArray[np.int64] = np.array(line_numbers, dtype=np.int64)
        self._stamp = _stamp(os.stat(self.path))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._line_numbers)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def row(self, index: int) -> tuple[Row, str]:
        source = f"{self.path}:{self._line_numbers[index]}"
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            # Of a compressed file the descriptor is that of our own unpacked copy, which nothing changes.
            unchanged = is_compressed(self.path) or _stamp(os.fstat(self._descriptor)) == self._stamp
            # pread keeps no position: threads and forked processes may share the descriptor.
            start = int(self._starts[index])
            raw = os.pread(self._descriptor, int(self._starts[index + 1]) - start, start)
        except OSError as error:
            raise DataError(f"{source}: cannot be read again: {error.strerror}; "
                            "keep the file until the run ends") from None
        if not unchanged:
            raise DataError(f"{source}: the file was changed after it was checked; start the run again")
        return self._parse(raw, source, trusted=True), source

    def _open(self) -> int:
        if not is_compressed(self.path):
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        if _stamp(os.stat(self.path)) != self._stamp:
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

    def _read(self) -> Iterator[tuple[int, int, bytes]]:
        yield from read_lines(self.path, self._key)

    def _parse(self, raw: bytes, source: str, *, trusted: bool) -> Row:
        return parse_trusted_object(raw, source) if trusted else parse_object(raw, source)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
