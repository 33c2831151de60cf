"""The data sets of a run: every file is validated whole when it is opened, and its rows are read one at a time."""

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
from megatron_embed.data.records import AnyRecord, Kind, Record, Records, text_id
from megatron_embed.data.row_fields import check_keys
from megatron_embed.data.row_source import nothing_to_stream, open_rows
from megatron_embed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


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


class RecordFile(DataEntry):
    """The rows of one file or table, validated whole at construction. Each access reads its row again, and trusts it.

    A file that changes after its validation is refused. Only a table does not detect that: its rows are validated at
    each access. Memory: 16 bytes per row of a JSONL file, 8 of a stream, none of a table; all may exceed memory.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used (`FILE:LINE: ` and the reason), or there are no rows.
    """

    def __init__(self, file: str | TrainFile, kind: Kind | None = "contrastive", key: str = "data.train") -> None:
        super().__init__(TrainFile(path=file) if isinstance(file, str) else file)
        self._rows = open_rows(self.path, key, streaming=self.file.streaming, rows=self.file.rows)
        self._reader = RowReader(self.file, kind, holds_texts=self._rows.holds_texts)
        for row, source in self._rows.scan():
            self._note(self._reader.read(row, source))
        if self._reader.format is None:
            raise DataError(f"{self.path}:1: no rows; a row is one line such as "
                            '{"query": "...", "positive": ["..."], "negatives": ["..."]}')
        self.digest = _as_read(self._rows.digest, self.file)
        logger.info("%s: %d rows of the format %s", self.path, len(self), self._reader.format.name)
        _report_ignored(self.path, self._reader.ignored)

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, index: int) -> AnyRecord:
        return self._reader.read(*self._rows.row(index), trusted=self._rows.detects_changes)


class BeirFile(DataEntry):
    """The training queries of a BEIR folder, validated whole at construction."""

    def __init__(self, file: TrainFile, kind: Kind | None = "contrastive") -> None:
        super().__init__(file)
        if file.streaming:
            raise nothing_to_stream(file.path, "data.train")
        for name, value in (("columns", file.columns), ("score_range", file.score_range)):
            if value:
                raise ConfigError(f"data.train.{name} = {value!r}: {file.path!r} is a BEIR folder, whose files have "
                                  "fixed columns and labels; remove it", key=f"data.train.{name}")
        self._reader = RowReader(file, kind)
        self._rows = BeirRows(file.path, "data.train")
        self.digest = self._rows.digest
        for index in range(len(self._rows)):
            self._note(self._reader.apply_defaults(self._rows.record(index)))
        logger.info("%s: %d rows of the format BEIR (corpus.jsonl, queries.jsonl, qrels/train.tsv)", file.path,
                    len(self))
        if self._rows.num_without_positive:
            logger.warning("%s: left out %d queries without a document of a score above 0", file.path,
                           self._rows.num_without_positive)

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, index: int) -> AnyRecord:
        return self._reader.apply_defaults(self._rows.record(index), trusted=True)


class _Part(DataEntry):
    """Some of an entry's records."""

    def __init__(self, whole: DataEntry, rows: NDArray[np.int64]) -> None:
        super().__init__(whole.file)
        self.instructions, self.digest = whole.instructions, whole.digest
        self.most_positives, self.most_negatives = whole.most_positives, whole.most_negatives
        self.most_documents = whole.most_documents
        self._whole = whole
        self._indices = rows

    def __len__(self) -> int:
        return len(self._indices)

    def _record(self, index: int) -> AnyRecord:
        return self._whole[int(self._indices[index])]


class RecordSet(Records[AnyRecord]):
    """The rows of several entries, one entry after the other."""

    def __init__(self, files: Sequence[DataEntry]) -> None:
        self.files = tuple(files)
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def instructions(self) -> dict[str | None, str]:
        """Each distinct instruction (None: rows without one), with the FILE:LINE of its first row."""
        first: dict[str | None, str] = {}
        for file in self.files:
            for instruction, source in file.instructions.items():
                first.setdefault(instruction, source)
        return first

    @property
    def most_positives(self) -> int:
        """Positives of the row with the most."""
        return max(file.most_positives for file in self.files)

    @property
    def most_negatives(self) -> int:
        """Negatives of the row with the most; rows that are held out count, too."""
        return max(file.most_negatives for file in self.files)

    @property
    def most_documents(self) -> int:
        """Documents of the row with the most."""
        return max(file.most_documents for file in self.files)

    def most_in_use(self, num_positives: int, num_negatives: int) -> int:
        """Most documents that a step takes of a row, with at most this many positives and negatives."""
        return min(num_positives, self.most_positives) + min(num_negatives, self.most_negatives)

    def most_in_list(self, num_negatives: int) -> int:
        """Most documents that a step takes of a list with labels; `num_negatives` 0: all negatives."""
        return min(self.most_documents, self.most_positives + num_negatives) if num_negatives else self.most_documents

    @property
    def digest(self) -> str:
        """Hash of all rows: the same for the same rows in the same order, divided into files in the same way."""
        return hashlib.blake2b("".join(file.digest for file in self.files).encode(), digest_size=16).hexdigest()

    def file_of(self, index: int) -> int:
        """Index of the entry that row `index` belongs to."""
        return bisect_right(self._ends, index)

    def first_row(self, file: int) -> int:
        """Index of the first row of entry `file`."""
        return self._ends[file - 1] if file else 0

    def _record(self, index: int) -> AnyRecord:
        file = self.file_of(index)
        return self.files[file][index - self.first_row(file)]


def open_records(files: tuple[TrainFile, ...], kind: Kind | None = "contrastive") -> RecordSet:
    """The rows of `data.train`, every file validated whole: `Record`s, `RerankRecord`s if `kind` is rerank, or as the
    rows are written if it is None.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a row cannot be used.
    """
    return RecordSet([BeirFile(file, kind) if is_beir_folder(file.path) else RecordFile(file, kind) for file in files])


def hold_out(records: RecordSet, fraction: float, seed: int) -> tuple[RecordSet, RecordSet | None]:
    """(rows to train on, rows to validate on), the latter a fraction of each entry, or None if the fraction is 0.

    The choice follows from the queries' texts and the seed alone: rows with the same query stay together, and a resumed
    run holds out the same rows at any layout.

    Raises:
        ConfigError: an entry has too few different queries to give to both.
    """
    if not fraction:
        return records, None
    training, validation = [], []
    for file in records.files:
        hashes = np.array([text_id(f"{seed}\0{record.query}") for record in file], dtype=np.int64)
        num_wanted = max(1, round(fraction * len(hashes)))
        is_held_out = hashes <= np.sort(hashes)[num_wanted - 1]
        if is_held_out.all():
            raise ConfigError(f"data.validation_fraction = {fraction}: {file.path} has {len(file)} rows and "
                              f"{len(np.unique(hashes))} different queries, too few to train and to validate on; set "
                              "it to 0 or add rows", key="data.validation_fraction")
        validation.append(_Part(file, np.flatnonzero(is_held_out)))
        training.append(_Part(file, np.flatnonzero(~is_held_out)))
    return RecordSet(training), RecordSet(validation)


def validation_shares(records: RecordSet, *, global_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """Row indices of this rank's share of every validation batch; the ranks' shares differ by one row at most.

    A batch holds rows of one entry. The entry's rows are divided evenly, in order, over the fewest batches of at most
    `global_batch_size` rows, so that a query has about as many negatives in each of them.

    Raises:
        ConfigError: an entry has fewer rows than there are ranks.
    """
    shares: list[list[int]] = []
    for index, file in enumerate(records.files):
        if len(file) < dp_size:
            raise ConfigError(f"{len(file)} rows of {file.path} are held out for validation, fewer than the {dp_size} "
                              "data-parallel ranks that share them; raise data.validation_fraction, or add rows")
        num_batches = min(-(-len(file) // global_batch_size), len(file) // dp_size)
        for rows in np.array_split(records.first_row(index) + np.arange(len(file)), num_batches):
            shares.append(np.array_split(rows, dp_size)[dp_rank].tolist())
    return shares


def _as_read(digest: str, file: TrainFile) -> str:
    """The digest of a file's rows, and of the settings that change what is read of them."""
    if not file.columns and not file.score_range:
        return digest
    settings = repr((sorted(file.columns.items()), file.score_range))
    return hashlib.blake2b(f"{digest}{settings}".encode(), digest_size=16).hexdigest()


def _report_ignored(path: str, ignored: set[str]) -> None:
    if ignored:
        logger.info("%s: ignored keys: %s", path, ", ".join(sorted(ignored)))


def read_texts(path: str) -> list[str]:
    """The texts of rows `{"text": str, "title"?: str}`, in file order: `title + " " + text` where there is one.

    Raises:
        ConfigError: the file cannot be opened; the message names the option --input.
        DataError: a row cannot be used, or there are no rows.
    """
    texts, ignored, with_title = [], set[str](), 0
    for line in read_lines(path, "--input"):
        source = f"{path}:{line.line_number}"
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


def source_of_text(path: str, row: int) -> str:
    """FILE:LINE of text `row`, from 0, of `read_texts`; reads the file again."""
    line = next(islice(read_lines(path, "--input"), row, None))
    return f"{path}:{line.line_number}"
