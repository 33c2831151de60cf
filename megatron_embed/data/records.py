"""Training rows: `{"query": str, "positive": [str, ...], "negatives": [str, ...], "instruction": str}`."""

import difflib
import hashlib
import logging
import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.jsonl import check_text, is_gzip, parse_object, read_lines, shortened
from megatron_embed.errors import DataError

logger = logging.getLogger(__name__)

_FIELDS = ("query", "positive", "negatives", "instruction")
_OTHER_WORDS = {"pos": "positive", "positives": "positive", "positive_passages": "positive", "answer": "positive",
                "document": "positive", "neg": "negatives", "negs": "negatives", "hard_negatives": "negatives",
                "negative_passages": "negatives", "question": "query", "anchor": "query", "instruct": "instruction"}
_NOT_TEXT = ("_id", "_ids", "_score", "_scores", "_label", "_labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One query with the documents it was given."""

    query: str
    positive: tuple[str, ...]
    """At least one; training takes the first."""
    negatives: tuple[str, ...]
    """Hard negatives, best first; may be empty."""
    instruction: str | None
    """Replaces `{instruction}` in the query's prompt."""
    source: str
    """FILE:LINE, for messages."""


def text_id(text: str) -> int:
    """Signed 64-bit hash of a text: equal text, equal number, on every machine and in every run."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@lru_cache(maxsize=4096)
def _meant_field(key: str, known: tuple[str, ...], absent: tuple[str, ...]) -> str | None:
    """The absent field that an unknown key looks like, if any."""
    name = key.lower().strip()
    if name.endswith(_NOT_TEXT):
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    meant = _OTHER_WORDS.get(name) or (close[0] if close else None)
    return meant if meant in absent else None


def _check_keys(row: dict[str, object], required: tuple[str, ...], known: tuple[str, ...], source: str) -> None:
    """Refuse a row without a required field, or with a misspelt one."""
    absent = tuple(name for name in known if name not in row)
    for key in row.keys() - set(known):
        meant = _meant_field(key, known, absent)
        if meant is not None:
            raise DataError(f"{source}: unknown key {shortened(key)} = {shortened(row[key])}; did you mean {meant!r}?")
    for name in required:
        if name in absent:
            keys = ", ".join(shortened(key, 40) for key in list(row)[:10]) or "no keys"
            raise DataError(f"{source}: {name} is missing; the row has {keys}; add {name!r}")


def _texts(value: object, name: str, source: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (check_text(value, name, source),)
    if not isinstance(value, list):
        raise DataError(f"{source}: {name} = {shortened(value)}: it must be a string or a list of strings")
    return tuple(check_text(text, f"{name}[{index}]", source) for index, text in enumerate(value))


def parse_record(row: dict[str, object], source: str) -> Record:
    """The record of one row.

    Raises:
        DataError: beginning with `source`, naming the field, its value and the remedy.
    """
    _check_keys(row, ("query", "positive"), _FIELDS, source)
    positive = _texts(row["positive"], "positive", source)
    if not positive:
        raise DataError(f"{source}: positive = [] is empty; give it at least one text or remove the row")
    negatives, instruction = row.get("negatives"), row.get("instruction")
    return Record(
        query=check_text(row["query"], "query", source),
        positive=positive,
        negatives=() if negatives is None else _texts(negatives, "negatives", source),
        instruction=None if instruction is None else check_text(instruction, "instruction", source),
        source=source,
    )


def _report_ignored(path: str, ignored: set[str]) -> None:
    if ignored:
        logger.info("%s: ignored keys: %s", path, ", ".join(sorted(ignored)))


class _Records(Sequence[Record]):
    """A sequence given by `__len__` and `_record`."""

    @abstractmethod
    def _record(self, index: int) -> Record:
        """Record `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._record(index % len(self))


class RecordFile(_Records):
    """The rows of one JSONL file, validated whole at construction and read again at each access.

    Memory: 16 bytes per row, so that a file may be larger than it; the records themselves for .gz.

    Attributes:
        instructions: each distinct instruction (None: rows without one), with the source of its first row.
        digest: hash of the lines; blank lines and line endings do not count.
        most_positives: positives of the row that has the most.

    Raises:
        ConfigError: the file cannot be opened.
        DataError: a row cannot be used (`FILE:LINE: ` and the reason), or there is no row.
    """

    def __init__(self, path: str, instruction: str | None = None, key: str = "data.train") -> None:
        self.path = path
        self.instructions: dict[str | None, str] = {}
        self.most_positives = 0
        self._instruction = instruction
        self._in_memory: list[Record] = []
        self._descriptor: int | None = None
        starts, numbers, end, ignored = [], [], 0, set[str]()
        digest = hashlib.blake2b(digest_size=16)
        for line in read_lines(path, key):
            digest.update(line.raw.strip() + b"\n")
            source = f"{path}:{line.number}"
            row = parse_object(line.raw, source)
            record = self._with_instruction(parse_record(row, source))
            self.instructions.setdefault(record.instruction, source)
            self.most_positives = max(self.most_positives, len(record.positive))
            ignored.update(row.keys() - set(_FIELDS))
            starts.append(line.start)
            numbers.append(line.number)
            end = line.start + len(line.raw)
            if is_gzip(path):
                self._in_memory.append(record)
        if not starts:
            raise DataError(f"{path}:1: no rows; a row is one line such as "
                            '{"query": "...", "positive": ["..."], "negatives": ["..."]}')
        _report_ignored(path, ignored)
        self._starts: NDArray[np.int64] = np.array([*starts, end], dtype=np.int64)
        self._numbers: NDArray[np.int64] = np.array(numbers, dtype=np.int64)
        self._stamp = self._file_stamp(os.stat(path))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        # An exception in __init__ can come before the attribute exists.
        descriptor = self.__dict__.get("_descriptor")
        if descriptor is not None:
            os.close(descriptor)

    @staticmethod
    def _file_stamp(status: os.stat_result) -> tuple[int, int]:
        return status.st_size, status.st_mtime_ns

    def _with_instruction(self, record: Record) -> Record:
        if record.instruction is None and self._instruction is not None:
            return replace(record, instruction=self._instruction)
        return record

    def _record(self, index: int) -> Record:
        if self._in_memory:
            return self._in_memory[index]
        source = f"{self.path}:{self._numbers[index]}"
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            unchanged = self._file_stamp(os.fstat(self._descriptor)) == self._stamp
            # pread keeps no position: threads and forked processes may share the descriptor.
            start = int(self._starts[index])
            raw = os.pread(self._descriptor, int(self._starts[index + 1]) - start, start)
        except OSError as error:
            raise DataError(f"{source}: cannot be read again: {error.strerror}; "
                            "keep the file until the run ends") from None
        if not unchanged:
            raise DataError(f"{source}: the file was changed after it was checked; start the run again")
        return self._with_instruction(parse_record(parse_object(raw, source), source))


class RecordSet(_Records):
    """The rows of several files, one file after the other."""

    def __init__(self, files: Sequence[RecordFile]) -> None:
        self.files = tuple(files)
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def instructions(self) -> dict[str | None, str]:
        """Each distinct instruction (None: rows without one), with the source of its first row."""
        first: dict[str | None, str] = {}
        for file in self.files:
            for instruction, source in file.instructions.items():
                first.setdefault(instruction, source)
        return first

    @property
    def most_positives(self) -> int:
        """Positives of the row that has the most."""
        return max(file.most_positives for file in self.files)

    @property
    def digest(self) -> str:
        """Hash of all lines: equal rows in equal order, equal digest, if the files divide them alike."""
        return hashlib.blake2b("".join(file.digest for file in self.files).encode(), digest_size=16).hexdigest()

    def _record(self, index: int) -> Record:
        file = bisect_right(self._ends, index)
        return self.files[file][index - (self._ends[file - 1] if file else 0)]


def open_records(files: tuple[TrainFile, ...]) -> RecordSet:
    """The rows of `data.train`, every file validated whole.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a row cannot be used.
    """
    return RecordSet([RecordFile(file.path, instruction=file.instruction) for file in files])


def read_texts(path: str, key: str = "--input") -> list[str]:
    """The texts of rows `{"text": str}`, in file order.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or there is no row.
    """
    texts, ignored = [], set[str]()
    for line in read_lines(path, key):
        source = f"{path}:{line.number}"
        row = parse_object(line.raw, source)
        _check_keys(row, ("text",), ("text",), source)
        texts.append(check_text(row["text"], "text", source))
        ignored.update(row.keys() - {"text"})
    if not texts:
        raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
    _report_ignored(path, ignored)
    return texts


def place_of_text(path: str, row: int, key: str = "--input") -> str:
    """FILE:LINE of text `row`, from 0, of `read_texts`; reads the file again."""
    return f"{path}:{next(islice(read_lines(path, key), row, None)).number}"
