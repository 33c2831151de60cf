"""Parts of the index of a file of rows: what set-up and sampler need of each row, as arrays that are memory-mapped.

A part holds, for consecutive rows: the byte offset of each row and the end of the last; hashes of its texts (query,
positives, negatives) and of its documents' ids; where they end and how many positives there are, unless all rows of
the part have the same numbers; and line numbers, unless no line between the rows is blank.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.file_mapping import map_file
from megatron_embed.data.records import AnyRecord, Record
from megatron_embed.errors import ConfigError

ROWS_OF_PART = 1 << 19
"""Rows after which a part ends, so that the one being written takes little memory."""
_IN_MEMORY = 1 << 20
"""Bytes up to which a part without a directory stays in memory instead of a nameless temporary file."""
_MODULUS = (1 << 127) - 1
_FACTOR = 0x5E3B_9C0D_71A4_2F86_E1D7_48B3_950C_6A2F
_LITTLE_INT64 = np.dtype("<i8")


@dataclass(kw_only=True)
class RowsDigest:
    """Hash of rows in order: a polynomial of the rows' own hashes, so that digests of parts give that of the whole."""

    value: int = 0
    rows: int = 0

    def add(self, raw: bytes) -> None:
        """Take one row behind the others."""
        own = int.from_bytes(hashlib.blake2b(raw, digest_size=16).digest(), "little")
        self.value = (self.value * _FACTOR + own) % _MODULUS
        self.rows += 1

    def extend(self, value: int, rows: int) -> None:
        """Take the rows of another digest behind the others."""
        self.value = (self.value * pow(_FACTOR, rows, _MODULUS) + value) % _MODULUS
        self.rows += rows

    def hexdigest(self) -> str:
        """As text."""
        return hashlib.blake2b(f"{self.rows}:{self.value}".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """Size and shape of a part."""

    rows: int
    texts: int
    """Hashes of texts and ids."""
    shape: tuple[int, int, bool] | None
    """Positives, negatives and whether there are ids, where all rows have the same; None: they differ."""
    has_starts: bool
    """Whether rows are found by their byte offsets."""
    has_lines: bool
    """Whether line numbers are stored; otherwise they count up from 1."""

    @property
    def lengths(self) -> dict[str, int]:
        """Elements of each array, in the order in which they are stored; all are int64."""
        ragged = 0 if self.shape is not None else self.rows
        return {"starts": self.rows + 1 if self.has_starts else 0, "texts": self.texts, "text_ends": ragged,
                "positives": ragged, "documents": ragged, "lines": self.rows if self.has_lines else 0}

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored part."""
        return 8 * sum(self.lengths.values())

    def as_json(self) -> dict[str, Any]:
        """Arguments of a new one."""
        return asdict(self)


def texts_of(record: AnyRecord) -> list[str]:
    """The texts whose hashes a part holds: the query, and the documents that may be in a batch with others'."""
    return [record.query, *record.positive, *record.negatives] if isinstance(record, Record) else [record.query]


def hashes_of(texts: Iterable[bytes]) -> bytes:
    """The texts' hashes, 8 bytes each."""
    blake2b = hashlib.blake2b
    return b"".join([blake2b(text, digest_size=8).digest() for text in texts])


class PartWriter:
    """Collects the rows of one part."""

    def __init__(self) -> None:
        self.rows = 0
        self._starts, self._lines = array("q"), array("q")
        self._texts = bytearray()
        self._ends, self._positives, self._documents = array("q"), array("q"), array("q")
        self._shape: tuple[int, int, bool] | None = None
        self._is_uniform = True
        self._counted = True
        self._end = 0

    def add(self, record: AnyRecord, position: tuple[int, int, int] | None) -> None:
        """Take a row.

        Args:
            position: number of its line in the unit, from 1, first byte, and the byte behind the last; None: a source
                without offsets.
        """
        texts, shape = texts_of(record), (0, 0, False)
        if isinstance(record, Record):
            ids = record.document_ids
            shape = (len(record.positive), len(record.negatives), ids is not None)
            if ids is not None:
                file = record.source.rpartition(":")[0]  # in which ids are unique
                texts += [f"\0{file}\0{name}" for name in ids]
        self.add_texts([text.encode() for text in texts], shape, position)

    def add_texts(self, texts: Sequence[bytes], shape: tuple[int, int, bool],
                  position: tuple[int, int, int] | None) -> None:
        """Take a row by its texts and ids. `shape`: see PartInfo."""
        self._texts += hashes_of(texts)
        if shape != self._shape:
            self._note_shape(shape)
        if not self._is_uniform:
            self._append_shape(shape)
        self.rows += 1
        if position is not None:
            line, start, self._end = position
            self._starts.append(start)
            if self._counted and line != self.rows:
                self._counted, self._lines = False, array("q", range(1, self.rows))
            if not self._counted:
                self._lines.append(line)

    def _note_shape(self, shape: tuple[int, int, bool]) -> None:
        """The first row's shape, or the end of uniformity."""
        if self._shape is None:
            self._shape = shape
        elif self._is_uniform:
            self._is_uniform, same = False, self._shape
            for _ in range(self.rows):
                self._append_shape(same)

    def _append_shape(self, shape: tuple[int, int, bool]) -> None:
        positives, negatives, has_ids = shape
        documents = positives + negatives
        before = self._ends[-1] if self._ends else 0
        self._ends.append(before + 1 + documents * (2 if has_ids else 1))
        self._positives.append(positives)
        self._documents.append(documents)

    def finish(self) -> tuple[PartInfo, bytes]:
        """The part's description and its arrays."""
        has_starts = len(self._starts) > 0
        if has_starts:
            self._starts.append(self._end)
        info = PartInfo(rows=self.rows, texts=len(self._texts) // 8, has_lines=not self._counted,
                        shape=self._shape if self._is_uniform else None, has_starts=has_starts)
        numbers = (self._starts, None, self._ends, self._positives, self._documents, self._lines)
        return info, b"".join(bytes(self._texts) if column is None else
                              np.asarray(column, dtype=_LITTLE_INT64).tobytes() for column in numbers)


class Part:
    """A part, memory-mapped at once, so that its file may be deleted while it is used.

    Args:
        data: its file, or its bytes, which are kept in a nameless temporary file (TMPDIR) if they are many.
    """

    def __init__(self, info: PartInfo, data: Path | bytes) -> None:
        self.info = info
        self._path = data if isinstance(data, Path) else None
        self._arrays: dict[str, NDArray[np.int64]] | None = self._divided(
            _mapped(data) if isinstance(data, bytes) else self._map())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": None if self._path is not None else self._arrays}

    def _divided(self, numbers: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        lengths = self.info.lengths
        ends = np.cumsum(list(lengths.values()))
        return {name: numbers[end - length:end] for (name, length), end in zip(lengths.items(), ends, strict=True)}

    def _array(self, name: str) -> NDArray[np.int64]:
        if self._arrays is None:
            self._arrays = self._divided(self._map())
        return self._arrays[name]

    def _map(self) -> NDArray[np.int64]:
        assert self._path is not None
        with self._path.open("rb") as file:
            return map_file(file, _LITTLE_INT64)

    def location(self, row: int) -> tuple[int, int, int]:
        """(number of the line in its unit, first byte, byte behind the last) of a row."""
        starts = self._array("starts")
        line = int(self._array("lines")[row]) if self.info.has_lines else row + 1
        return line, int(starts[row]), int(starts[row + 1])

    def hashes(self, row: int) -> bytes:
        """See `hashes_of`: those of `texts_of` a row."""
        if self.info.shape is not None:
            begin, documents = row * (self.info.texts // self.info.rows), self.info.shape[0] + self.info.shape[1]
        else:
            begin, documents = int(self._array("text_ends")[row - 1]) if row else 0, int(self._array("documents")[row])
        return self._array("texts")[begin : begin + 1 + documents].tobytes()

    def query_ids(self, rows: slice) -> NDArray[np.int64]:
        """Hash of the query of some rows."""
        texts = self._array("texts")
        if self.info.shape is not None:
            return texts.reshape(self.info.rows, -1)[rows, 0]
        return texts[self._begins()[rows]]

    def _begins(self) -> NDArray[np.int64]:
        """First hash of each row, if rows have different numbers of them."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self._array("text_ends")[:-1]])

    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of the texts and ids in use of some rows, and the position in `rows` that each belongs to.

        Query, positives, the first `num_negatives` negatives, then the ids of these documents; row after row.
        """
        texts = self._array("texts")
        if self.info.shape is not None:
            positives, negatives, has_ids = self.info.shape
            used, documents = positives + min(negatives, num_negatives), positives + negatives
            columns = [*range(1 + used), *(range(1 + documents, 1 + documents + used) if has_ids else ())]
            chosen = texts.reshape(self.info.rows, -1)[rows][:, columns]
            return chosen.ravel(), np.repeat(np.arange(len(rows)), len(columns))
        ends, documents_of = self._array("text_ends")[rows], self._array("documents")[rows]
        begins = np.where(rows > 0, self._array("text_ends")[rows - 1], 0)
        positives_of = self._array("positives")[rows]
        used_of = positives_of + np.minimum(documents_of - positives_of, num_negatives)
        with_ids = ends - begins > 1 + documents_of
        first, first_owner = _ranges(begins, 1 + used_of)
        second, second_owner = _ranges(begins + 1 + documents_of, np.where(with_ids, used_of, 0))
        owner = np.concatenate([first_owner, second_owner])
        order = np.argsort(owner, kind="stable")
        return texts[np.concatenate([first, second])][order], owner[order]


def _mapped(data: bytes) -> NDArray[np.int64]:
    if len(data) <= _IN_MEMORY:
        return np.frombuffer(data, dtype=_LITTLE_INT64)
    try:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return map_file(file, _LITTLE_INT64)
    except OSError as error:
        raise ConfigError(f"the index of the rows cannot be kept in {tempfile.gettempdir()}: {error.strerror}; free "
                          "space there, set TMPDIR to another directory, or set data.index_directory",
                          key="data.index_directory") from error


def _ranges(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All numbers of the ranges begin, begin + 1, ... of these lengths, and which range each is of."""
    owner = np.repeat(np.arange(len(begins)), lengths)
    before = np.cumsum(lengths) - lengths
    return np.arange(len(owner)) - before[owner] + begins[owner], owner
