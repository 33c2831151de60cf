"""The data sets of a run: every file is validated whole when it is opened, and its rows are read one at a time."""

import contextlib
import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megatron_embed.config.data import TrainFile
from megatron_embed.data.beir import BeirRows, is_beir_folder
from megatron_embed.data.columns import COLUMNS_SETTING
from megatron_embed.data.entries import DataEntry, EntryPart, IndexedEntry
from megatron_embed.data.entry_index import open_index
from megatron_embed.data.formats import RowReader
from megatron_embed.data.index_parts import Part, hashes_of, texts_of
from megatron_embed.data.index_store import IndexPlace
from megatron_embed.data.indexed_rows import IndexedRows
from megatron_embed.data.jsonl import BLANK
from megatron_embed.data.permutation import mixed
from megatron_embed.data.records import AnyRecord, Kind, Records, text_id
from megatron_embed.data.row_fields import Row
from megatron_embed.data.row_index import RowIndex, TextIds, UnitWriter, gather_by_group
from megatron_embed.data.row_source import nothing_to_stream, open_rows
from megatron_embed.data.sampler import ORDER_VERSION
from megatron_embed.data.several_rows import SeveralRows
from megatron_embed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

NOT_KEPT = IndexPlace()
_BLOCK_ROWS = 1 << 20
"""Rows whose hashes are looked at together."""


class RecordFile(IndexedEntry):
    """The rows of one file or table, validated whole at construction or, with an index of an earlier start, then. Each
    access reads its row again, and trusts it.

    A file that changes after its validation is refused. Only a table does not detect that: its rows are validated at
    each access. Memory: none per row of files that are read by lines or of a table, 16 bytes of a stream; all may
    exceed memory.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used (`FILE:LINE: ` and the reason), there are no rows, or none has one of the
            columns of `file`; the message names `columns_key`.
    """

    def __init__(self, file: str | TrainFile, kind: Kind | None = "contrastive", key: str = "data.train",
                 place: IndexPlace = NOT_KEPT, *, columns_key: str | None = COLUMNS_SETTING) -> None:
        super().__init__(TrainFile(path=file) if isinstance(file, str) else file)
        self._rows = open_rows(self.path, key, streaming=self.file.streaming, rows=self.file.rows)
        self._reader = RowReader(self.file, kind, holds_texts=self._rows.holds_texts, columns_key=columns_key)
        self._files = self._rows.files_with_offsets()
        index = open_index(self._rows, self._reader, self.file, kind, place)
        if self._reader.format is None:
            raise DataError(f"{self.path}:1: no rows; a row is one line such as "
                            '{"query": "...", "positive": ["..."], "negatives": ["..."]}')
        self.take_index(index)
        self._reader.require_columns(index.summary.columns, lambda: self._written(0))
        self.digest = _as_read(self._rows.digest if self._files is None else _of_several(
            [digest.hexdigest() for digest in index.file_digests], isinstance(self._rows, SeveralRows)), self.file)
        logger.info("%s: %d rows of the format %s", self.path, len(self), self._reader.format.name)
        _report_ignored(self.path, self._reader.ignored)

    def __len__(self) -> int:
        return len(self.row_index)

    @property
    def digest_of_order_1(self) -> str:
        """Reads all lines of files that are read by lines."""
        if self._files is None:
            return self.digest
        digests = []
        for rows in self._files:
            digest = hashlib.blake2b(digest_size=16)
            for _, _, raw in rows.read():
                if raw.strip(BLANK):
                    digest.update(raw.strip() + b"\n")
            digests.append(digest.hexdigest())
        return _as_read(_of_several(digests, isinstance(self._rows, SeveralRows)), self.file)

    def _source(self, index: int) -> str:
        if self._files is None:
            return self._rows.source(index)
        file, line_number, _, _ = self.row_index.locate(index)
        return f"{self._files[file].path}:{line_number}"

    def _written(self, index: int) -> tuple[Row, str]:
        """A row as it is written, and its FILE:LINE."""
        if self._files is None:
            return self._rows.row(index)
        file, line_number, start, end = self.row_index.locate(index)
        return self._files[file].read_at(start, end, line_number)

    def _record(self, index: int) -> AnyRecord:
        if self._files is not None and self.row_index.folder is not None:
            return self._record_as_indexed(self._files, index)
        row, source = self._written(index)
        return self._reader.read(row, source, trusted=self._files is not None or self._rows.detects_changes)

    def _record_as_indexed(self, files: list[IndexedRows], index: int) -> AnyRecord:
        """A record whose texts have the hashes in the index of this or an earlier start."""
        file, line_number, start, end = self.row_index.locate(index)
        raw, source = files[file].bytes_at(start, end, line_number)
        try:
            record = self._reader.read(files[file].parse(raw, source, trusted=True), source, trusted=True)
            is_indexed = hashes_of(text.encode() for text in texts_of(record)) == self.row_index.hashes(index)
        except (DataError, LookupError, TypeError, ValueError, AttributeError):  # trusted rows are hardly checked
            is_indexed = False
        if not is_indexed:
            raise DataError(f"{files[file].path}: row {index + 1} is not the one that its index was made of: the file "
                            f"was changed and kept its size and time, or the index is damaged; remove the folder "
                            f"{self.row_index.folder}, then start the run again")
        return record


class BeirFile(IndexedEntry):
    """The training queries of a BEIR folder, validated whole at construction."""

    def __init__(self, file: TrainFile, kind: Kind | None = "contrastive", *,
                 columns_key: str | None = COLUMNS_SETTING) -> None:
        super().__init__(file)
        if file.streaming:
            raise nothing_to_stream(file.path, "data.train")
        for key, value in ((columns_key, file.columns), ("data.train.score_range", file.score_range)):
            if value:
                raise ConfigError(f"{key} = {value!r}: {file.path!r} is a BEIR folder, whose files have "
                                  "fixed columns and labels; remove it", key=key)
        self._reader = RowReader(file, kind)
        self._rows = BeirRows(file.path, "data.train")
        self.digest = self._rows.digest
        parts: list[Part] = []
        writer = UnitWriter(0, lambda info, data: parts.append(Part(info, data)))
        for index in range(len(self._rows)):
            writer.add(self._reader.apply_defaults(self._rows.record(index)))
        self.take_index(RowIndex([writer.finish()], parts))
        logger.info("%s: %d rows of the format BEIR (corpus.jsonl, queries.jsonl, qrels/train.tsv)", file.path,
                    len(self))
        if self._rows.num_without_positive:
            logger.warning("%s: left out %d queries without a document of a score above 0", file.path,
                           self._rows.num_without_positive)

    def __len__(self) -> int:
        return len(self._rows)

    def _source(self, index: int) -> str:
        return self._rows.record(index).source

    def _record(self, index: int) -> AnyRecord:
        return self._reader.apply_defaults(self._rows.record(index), trusted=True)


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
        return _of_several([file.digest for file in self.files])

    @property
    def digest_of_order_1(self) -> str:
        """The digest in checkpoints of runs that began before ORDER_VERSION 2; reads rows."""
        return _of_several([file.digest_of_order_1 for file in self.files])

    def file_of(self, index: int) -> int:
        """Index of the entry that row `index` belongs to."""
        return bisect_right(self._ends, index)

    def first_row(self, file: int) -> int:
        """Index of the first row of entry `file`."""
        return self._ends[file - 1] if file else 0

    def check_once(self, settings: str, check: Callable[[], None]) -> None:
        """Run a check of all rows, unless an earlier start passed it with these settings and indexes are kept."""
        name = f"checked.{hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()}"
        marks = [None if file.index_folder is None else file.index_folder / name for file in self.files]
        if all(mark is not None and mark.exists() for mark in marks):
            return
        check()
        for mark in marks:
            with contextlib.suppress(OSError):  # as where the directory is only read
                if mark is not None:
                    mark.touch()

    def _record(self, index: int) -> AnyRecord:
        file = self.file_of(index)
        return self.files[file][index - self.first_row(file)]

    def text_ids(self, rows: NDArray[np.int64], num_negatives: int) -> TextIds:
        return gather_by_group(rows, np.asarray(self._ends), lambda file, local: self.files[file].text_ids(
            local, num_negatives))


def open_records(files: tuple[TrainFile, ...], kind: Kind | None = "contrastive",
                 place: IndexPlace = NOT_KEPT, *, columns_key: str = COLUMNS_SETTING) -> RecordSet:
    """The rows of `data.train`, every file validated whole: `Record`s, `RerankRecord`s if `kind` is rerank, or as the
    rows are written if it is None.

    Raises:
        ConfigError: a file cannot be opened.
        DataError: a row cannot be used.
    """
    return RecordSet([BeirFile(file, kind, columns_key=columns_key) if is_beir_folder(file.path) else
                      RecordFile(file, kind, place=place, columns_key=columns_key) for file in files])


def hold_out(records: RecordSet, fraction: float, seed: int, order: int = ORDER_VERSION) -> tuple[RecordSet,
                                                                                                RecordSet | None]:
    """(rows to train on, rows to validate on), the latter a fraction of each entry, or None if the fraction is 0.

    The choice follows from the queries' texts and the seed alone: rows with the same query stay together, and a resumed
    run holds out the same rows at any layout.

    Args:
        order: the ORDER_VERSION that the run began with. With 1 every row is read.
    Raises:
        ConfigError: an entry has too few different queries to give to both.
    """
    if not fraction:
        return records, None
    training, validation = [], []
    for file in records.files:
        held = _rows_held_out(file, max(1, round(fraction * len(file))), seed, order)
        if len(held) == len(file):
            queries = len(np.unique(file.query_ids(0, len(file))))
            raise ConfigError(f"data.validation_fraction = {fraction}: {file.path} has {len(file)} rows and "
                              f"{queries} different queries, too few to train and to validate on; set it to 0 or add "
                              "rows", key="data.validation_fraction")
        validation.append(EntryPart(file, held, complement=False))
        training.append(EntryPart(file, held, complement=True))
    return RecordSet(training), RecordSet(validation)


def _rows_held_out(file: DataEntry, num_wanted: int, seed: int, order: int) -> NDArray[np.int64]:
    """The rows whose queries have the `num_wanted` smallest mixed hashes, and those of equal queries; ascending.

    The hashes are taken block by block, twice: first their upper bits are counted.
    """
    if order == 1:
        texts = np.array([text_id(f"{seed}\0{record.query}") for record in file], dtype=np.int64)
        return np.flatnonzero(texts <= np.sort(texts)[num_wanted - 1])

    def blocks() -> Iterator[tuple[int, NDArray[np.uint64]]]:
        for first in range(0, len(file), _BLOCK_ROWS):
            ids = file.query_ids(first, min(first + _BLOCK_ROWS, len(file)))
            yield first, mixed(ids.view(np.uint64), seed)

    counts = np.zeros(1 << 16, dtype=np.int64)
    for _, hashes in blocks():
        counts += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    last = int(np.searchsorted(np.cumsum(counts), num_wanted))
    rows, kept = [], []
    for first, hashes in blocks():
        chosen = np.flatnonzero((hashes >> np.uint64(48)) <= np.uint64(last))
        rows.append(chosen + first)
        kept.append(hashes[chosen])
    all_rows: NDArray[np.int64] = np.concatenate(rows)
    all_kept = np.concatenate(kept)
    return all_rows[all_kept <= np.sort(all_kept)[num_wanted - 1]]


def validation_shares(records: RecordSet, *, global_batch_size: int, dp_rank: int, dp_size: int) -> list[range]:
    """Row indices of this rank's share of every validation batch; the ranks' shares differ by one row at most.

    A batch holds rows of one entry. The entry's rows are divided evenly, in order, over the fewest batches of at most
    `global_batch_size` rows, so that a query has about as many negatives in each of them.

    Raises:
        ConfigError: an entry has fewer rows than there are ranks.
    """
    shares: list[range] = []
    for index, file in enumerate(records.files):
        if len(file) < dp_size:
            raise ConfigError(f"{len(file)} rows of {file.path} are held out for validation, fewer than the {dp_size} "
                              "data-parallel ranks that share them; raise data.validation_fraction, or add rows")
        num_batches = min(-(-len(file) // global_batch_size), len(file) // dp_size)
        first = records.first_row(index)
        for batch in _divided(range(first, first + len(file)), num_batches):
            shares.append(_divided(batch, dp_size)[dp_rank])
    return shares


def _divided(rows: range, num_parts: int) -> list[range]:
    """The rows in so many parts, the first of which have one more if they do not divide evenly."""
    size, longer = divmod(len(rows), num_parts)
    ends = list(accumulate(size + (part < longer) for part in range(num_parts)))
    return [rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _as_read(digest: str, file: TrainFile) -> str:
    """The digest of a file's rows, and of the settings that change what is read of them."""
    if not file.columns and not file.score_range:
        return digest
    settings = repr((sorted(file.columns.items()), file.score_range))
    return hashlib.blake2b(f"{digest}{settings}".encode(), digest_size=16).hexdigest()


def _of_several(digests: Sequence[str], are_several: bool = True) -> str:
    """The digest of several, or the only one."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest() if are_several else digests[0]


def _report_ignored(path: str, ignored: set[str]) -> None:
    if ignored:
        logger.info("%s: ignored keys: %s", path, ", ".join(sorted(ignored)))
