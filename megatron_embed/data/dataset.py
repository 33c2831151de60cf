"""`data.train` opened: every file validated whole, rows read again one at a time, some held out for validation."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice

import numpy as np
from numpy.typing import NDArray

from megatron_embed.config.data import TrainFile
from megatron_embed.data.beir import BeirRows, is_beir_folder
from megatron_embed.data.corpus import text_of_document
from megatron_embed.data.formats import RowReader
from megatron_embed.data.jsonl import check_text, parse_object, read_lines
from megatron_embed.data.records import AnyRecord, Kind, Record, Records, RerankRecord, text_id
from megatron_embed.data.row_fields import check_keys
from megatron_embed.data.row_source import nothing_to_stream, open_rows
from megatron_embed.errors import ConfigError, DataError

__all__ = ["AnyRecord", "Kind", "Record", "RecordFile", "RecordSet", "RerankRecord", "hold_out", "open_records",
           "place_of_text", "read_texts", "text_id", "validation_shares"]

logger = logging.getLogger(__name__)


class _Source(Records[AnyRecord]):
    """Records of one `data.train` entry.

    Attributes:
        path: as it was given.
        instructions: each distinct instruction (None: rows without one), with the source of its first row.
        digest: hash of the rows; blank lines and line endings do not count.
        most_positives: positives of the row that has the most, of lists documents with a label above 0.
        most_negatives: negatives of the row that has the most; 0 where rows are lists with labels.
        most_documents: documents of the row that has the most.
    """

    path: str
    digest: str

    def __init__(self, file: TrainFile) -> None:
        self.path = file.path
        self.file = file
        self.instructions: dict[str | None, str] = {}
        self.most_positives = 0
        self.most_negatives = 0
        self.most_documents = 0

    def _note(self, record: AnyRecord) -> None:
        self.instructions.setdefault(record.instruction, record.source)
        if isinstance(record, Record):
            self.most_positives = max(self.most_positives, len(record.positive))
            self.most_negatives = max(self.most_negatives, len(record.negatives))
            self.most_documents = max(self.most_documents, len(record.positive) + len(record.negatives))
        else:
            self.most_positives = max(self.most_positives, sum(label > 0 for label in record.labels))
            self.most_documents = max(self.most_documents, len(record.documents))


class RecordFile(_Source):
    """The rows of one file or table, validated whole at construction and read again at each access.

    Memory: 16 bytes per row of a JSONL file, 8 of a stream, none of a table: all may be larger than memory.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used (`FILE:LINE: ` and the reason), or there is no row.
    """

    def __init__(self, file: str | TrainFile, kind: Kind | None = "contrastive", key: str = "data.train") -> None:
        super().__init__(TrainFile(path=file) if isinstance(file, str) else file)
        self._reader = RowReader(self.file, kind)
        self._rows = open_rows(self.path, key, streaming=self.file.streaming, rows=self.file.rows)
        for row, source in self._rows.scan():
            self._note(self._reader.read(row, source))
        if self._reader.format is None:
            raise DataError(f"{self.path}:1: no rows; a row is one line such as "
                            '{"query": "...", "positive": ["..."], "negatives": ["..."]}')
        self.digest = self._rows.digest
        logger.info("%s: %d rows of the format %s", self.path, len(self), self._reader.format.name)
        _report_ignored(self.path, self._reader.ignored)

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, index: int) -> AnyRecord:
        return self._reader.read(*self._rows.row(index))


class BeirFile(_Source):
    """The training queries of a BEIR folder, validated whole at construction."""

    def __init__(self, file: TrainFile, kind: Kind | None = "contrastive", key: str = "data.train") -> None:
        super().__init__(file)
        if file.streaming:
            raise nothing_to_stream(file.path, key)
        self._reader = RowReader(file, kind)
        self._rows = BeirRows(file.path, key)
        self.digest = self._rows.digest
        for index in range(len(self._rows)):
            self._note(self._record(index))
        logger.info("%s: %d rows of the format BEIR (corpus.jsonl, queries.jsonl, qrels/train.tsv)", file.path,
                    len(self))
        if self._rows.num_without_positive:
            logger.warning("%s: left out %d queries without a document of a score above 0", file.path,
                           self._rows.num_without_positive)

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, index: int) -> AnyRecord:
        return self._reader.finished(self._rows.record(index))


class _Part(_Source):
    """Some of an entry's records."""

    def __init__(self, whole: _Source, rows: NDArray[np.int64]) -> None:
        super().__init__(whole.file)
        self.instructions, self.digest = whole.instructions, whole.digest
        self.most_positives, self.most_negatives = whole.most_positives, whole.most_negatives
        self.most_documents = whole.most_documents
        self._whole = whole
        self._numbers = rows

    def __len__(self) -> int:
        return len(self._numbers)

    def _record(self, index: int) -> AnyRecord:
        return self._whole[int(self._numbers[index])]


class RecordSet(Records[AnyRecord]):
    """The rows of several entries, one entry after the other."""

    def __init__(self, files: Sequence[_Source]) -> None:
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
    def most_negatives(self) -> int:
        """Negatives of the row that has the most; held-out rows count with those that are kept."""
        return max(file.most_negatives for file in self.files)

    @property
    def most_documents(self) -> int:
        """Documents of the row that has the most."""
        return max(file.most_documents for file in self.files)

    def most_in_use(self, num_positives: int, num_negatives: int) -> int:
        """Documents that a step takes of a row, at most, of the first so many positives and negatives of each."""
        return min(num_positives, self.most_positives) + min(num_negatives, self.most_negatives)

    def most_in_list(self, num_negatives: int) -> int:
        """Of lists with labels: documents that a step takes of a row, at most; 0: all negatives."""
        return min(self.most_documents, self.most_positives + num_negatives) if num_negatives else self.most_documents

    @property
    def digest(self) -> str:
        """Hash of all lines: equal rows in equal order, equal digest, if the files divide them alike."""
        return hashlib.blake2b("".join(file.digest for file in self.files).encode(), digest_size=16).hexdigest()

    def file_of(self, index: int) -> int:
        """Number of the entry, from 0, that row `index` belongs to."""
        return bisect_right(self._ends, index)

    def first_row(self, file: int) -> int:
        """Row number of the first row of entry `file`."""
        return self._ends[file - 1] if file else 0

    def _record(self, index: int) -> AnyRecord:
        file = self.file_of(index)
        return self.files[file][index - self.first_row(file)]


def open_records(files: tuple[TrainFile, ...], kind: Kind | None = "contrastive") -> RecordSet:
    """The rows of `data.train`, every file validated whole: `Record`s, or `RerankRecord`s where `kind` is rerank, or
    each as it comes where it is null.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a row cannot be used.
    """
    return RecordSet([BeirFile(file, kind) if is_beir_folder(file.path) else RecordFile(file, kind) for file in files])


def hold_out(records: RecordSet, fraction: float, seed: int) -> tuple[RecordSet, RecordSet | None]:
    """(rows to train on, rows to validate on), the latter a fraction of each entry; null where the fraction is 0.

    Which rows follows from their queries' texts and the seed alone: rows with one query stay together, and a run that
    is resumed, under whatever layout, holds out the same.

    Raises:
        ConfigError: an entry has too few different queries to give to both.
    """
    if not fraction:
        return records, None
    kept, held = [], []
    for file in records.files:
        marks = np.array([text_id(f"{seed}\0{record.query}") for record in file], dtype=np.int64)
        ordered = np.sort(marks)
        wanted = max(1, round(fraction * len(marks)))
        is_held = marks <= ordered[wanted - 1]
        if is_held.all():
            raise ConfigError(f"data.validation_fraction = {fraction}: {file.path} has {len(file)} rows and "
                              f"{len(np.unique(marks))} different queries, too few to train and to validate on; set it "
                              "to 0 or add rows", key="data.validation_fraction")
        held.append(_Part(file, np.flatnonzero(is_held)))
        kept.append(_Part(file, np.flatnonzero(~is_held)))
    return RecordSet(kept), RecordSet(held)


def validation_shares(records: RecordSet, *, global_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """Row numbers of this rank's share of every validation batch; the ranks' shares differ by one row at most.

    A batch is of one entry, whose rows are divided evenly, in order, over as few batches as hold `global_batch_size`
    rows each: a query has about as many negatives in all of them.

    Raises:
        ConfigError: an entry has fewer rows than there are ranks.
    """
    shares: list[list[int]] = []
    for number, file in enumerate(records.files):
        if len(file) < dp_size:
            raise ConfigError(f"{len(file)} rows of {file.path} are held out for validation, fewer than the {dp_size} "
                              "data-parallel ranks that share them; raise data.validation_fraction, or add rows")
        num_batches = min(-(-len(file) // global_batch_size), len(file) // dp_size)
        for rows in np.array_split(records.first_row(number) + np.arange(len(file)), num_batches):
            shares.append(np.array_split(rows, dp_size)[dp_rank].tolist())
    return shares


def _report_ignored(path: str, ignored: set[str]) -> None:
    if ignored:
        logger.info("%s: ignored keys: %s", path, ", ".join(sorted(ignored)))


def read_texts(path: str, key: str = "--input") -> list[str]:
    """The texts of rows `{"text": str, "title"?: str}`, in file order: `title + " " + text` where there is one.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or there is no row.
    """
    texts, ignored, with_title = [], set[str](), 0
    for line in read_lines(path, key):
        source = f"{path}:{line.number}"
        row = parse_object(line.raw, source)
        check_keys(row, ("text",), ("text",), source)
        text = text_of_document(row, source)
        texts.append(text if text.strip() else check_text(text, "text", source))
        with_title += text != row["text"]
        ignored.update(row.keys() - {"text", "title"})
    if not texts:
        raise DataError(f'{path}:1: no rows; a row is one line such as {{"text": "..."}}')
    if with_title:
        logger.info("%s: %d of %d rows have a title, which stands before their text", path, with_title, len(texts))
    _report_ignored(path, ignored)
    return texts


def place_of_text(path: str, row: int, key: str = "--input") -> str:
    """FILE:LINE of text `row`, from 0, of `read_texts`; reads the file again."""
    return f"{path}:{next(islice(read_lines(path, key), row, None)).number}"
