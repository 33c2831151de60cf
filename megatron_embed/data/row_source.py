"""Rows of a file or table as plain objects with their FILE:LINE: read once in order, then one at a time.

JSONL, JSON arrays and CSV are read by our own readers, so that every error names a line; Parquet, Arrow and data sets
of the hub are read by `datasets`.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_embed.data.csv_rows import CSV_ENDINGS, CsvRows
from megatron_embed.data.indexed_rows import DescriptorRows, JsonlRows, RawRows
from megatron_embed.data.jsonl import ENDINGS, LONGEST_LINE, is_array, open_file, parse_array
from megatron_embed.data.row_fields import Row
from megatron_embed.data.several_rows import SeveralRows
from megatron_embed.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

RowsKind = Literal["jsonl", "csv", "table", "hub", "files"]
"""How rows are read: by our own readers, by `datasets` from this machine or from the hub, or from several files."""
TABLE_ENDINGS = (".parquet", ".arrow")
FILE_ENDINGS = (*ENDINGS, *CSV_ENDINGS, *TABLE_ENDINGS)
"""Ends of the names of files of rows."""
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods")
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[^/:]+)(/(?P<split>[^/:]+))?)?")
_LOCAL_NAME = re.compile(r"(?P<repository>[^:]+)(:(?P<config>[^/:]+)(/(?P<split>[^/:]+))?)?")
"""The same for a directory that holds a copy of a data set of the hub."""
_TABLE_ROWS = 1000


class TableRows(RawRows):
    """The rows of a table, memory-mapped by `datasets` from its Arrow files (of Parquet: from its cache of them)."""

    detects_changes = False

    def __init__(self, path: str, table: "Dataset") -> None:
        self.path = path
        self._table = table

    def scan(self) -> Iterator[tuple[Row, str]]:
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self._table), _TABLE_ROWS):
            try:
                columns = self._table[start:start + _TABLE_ROWS]
            except Exception as error:  # pyarrow's errors have no common class, MemoryError among them
                raise DataError(f"{self.path}:{start + 1}: cannot be read: {first_line(error)}; the file is damaged; "
                                "download or create it again") from error
            for row_number, values in enumerate(zip(*columns.values(), strict=True), start=start + 1):
                row = dict(zip(columns, values, strict=True))
                digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
                yield row, f"{self.path}:{row_number}"
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._table)

    def source(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def row(self, index: int) -> tuple[Row, str]:
        return self._table[index], self.source(index)


class StreamedRows(DescriptorRows):
    """Rows of a data set of the hub that are fetched while they are read, instead of the whole set first.

    They are kept as JSON in a nameless temporary file (TMPDIR) of this process. Memory: 16 bytes per row.
    """

    def __init__(self, path: str, stream: "IterableDataset") -> None:
        self.path = path
        self._stream = stream

    def scan(self) -> Iterator[tuple[Row, str]]:
        digest, ends, numbers = hashlib.blake2b(digest_size=16), array("q", [0]), array("q")
        try:
            with tempfile.TemporaryFile() as kept:
                for row, source in self._fetched():
                    yield row, source
                    digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
                    numbers.append(int(source.rpartition(":")[2]))
                    ends.append(ends[-1] + kept.write(json.dumps(row, default=repr).encode()))
                kept.flush()
                self._descriptor = os.dup(kept.fileno())
        except OSError as error:
            raise DataError(f"{self.path}:{len(ends)}: cannot be kept in {tempfile.gettempdir()}: {error.strerror}; "
                            "free space there, set TMPDIR to another directory, or give fewer `rows`") from None
        self._ends, self._numbers, self.digest = ends, numbers, digest.hexdigest()

    def _fetched(self) -> Iterator[tuple[Row, str]]:
        rows = iter(self._stream)
        for row_number in itertools.count(1):
            source = f"{self.path}:{row_number}"
            try:
                row = next(rows, None)
            except Exception as error:  # errors of datasets, pyarrow, fsspec and the hub's client, as in `_open_table`
                raise DataError(f"{source}: cannot be fetched: {first_line(error)}; look at the network, then start "
                                "the run again") from error
            if row is None:
                return
            yield row, source

    def __len__(self) -> int:
        return len(self._ends) - 1

    def source(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"

    def row(self, index: int) -> tuple[Row, str]:
        assert self._descriptor is not None, "scan comes first"
        start = self._ends[index]
        raw = os.pread(self._descriptor, self._ends[index + 1] - start, start)
        row: Row = json.loads(raw)
        return row, self.source(index)


def _is_saved(path: str) -> bool:
    """Whether the path is a directory that `datasets` saved."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


class JsonArrayRows(StreamedRows):
    """The objects of a JSON array, kept as StreamedRows keeps a stream."""

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._key = key

    def _fetched(self) -> Iterator[tuple[Row, str]]:
        return parse_array(self.path, self._key)


def files_of(path: str) -> list[str]:
    """The files of rows that a pattern matches or a directory holds, by name; empty for any other path."""
    if not os.path.exists(path) and glob.has_magic(path):
        return sorted(name for name in glob.glob(path, recursive=True) if name.endswith(FILE_ENDINGS))
    if not os.path.isdir(path):
        return []
    return sorted(os.path.join(path, name) for name in os.listdir(path)
                  if name.endswith(FILE_ENDINGS) and not name.startswith("."))


def is_hub_name(path: str) -> bool:
    """Whether the path names a data set of the hub (org/name, org/name:config, org/name:config/split)."""
    return (HUB_NAME.fullmatch(path) is not None and not os.path.exists(path)
            and not glob.has_magic(path) and not path.endswith((*FILE_ENDINGS, *_SPREADSHEETS)))


def is_copy_of_hub(path: str) -> bool:
    """Whether the path is a directory with a copy of a data set of the hub: one with a README.md, which they all have.
    It takes :config/split as the hub's names do."""
    name = _LOCAL_NAME.fullmatch(path)
    return name is not None and (Path(name["repository"]) / "README.md").is_file()


def nothing_to_stream(path: str, key: str) -> ConfigError:
    """The error for `streaming` of a file or directory on this machine."""
    return ConfigError(f"{key}.streaming = True: {path!r} is not a data set of the hub, and what lies on this "
                       "machine needs no fetching; remove it", key=f"{key}.streaming")


def open_rows(path: str, key: str, *, streaming: bool = False, rows: int | None = None) -> RawRows:
    """The rows of a JSONL file, a Parquet or Arrow file, a directory that `datasets` saved, or a hub data set.

    Args:
        key: names the path in messages.
        streaming: take the rows of a hub data set as they come, instead of fetching it first.
        rows: most rows taken of a stream; None: all.
    Raises:
        ConfigError: naming `key`, if it is none of these or cannot be opened.
    """
    kind = _kind_of(path, key, streaming=streaming)
    if streaming:
        stream = _open_table(path, key, streaming=True)
        return StreamedRows(path, stream if rows is None else stream.take(rows))
    if kind == "files":
        return SeveralRows(path, [open_rows(name, key) for name in files_of(path)])
    if kind == "csv":
        return CsvRows(path, key)
    if kind == "jsonl":
        return JsonArrayRows(path, key) if is_array(path, key) else JsonlRows(path, key)
    return TableRows(path, _open_table(path, key))


def require_rows(path: str, key: str, *, streaming: bool = False) -> RowsKind:
    """The way `open_rows` would read the rows. Opens a JSONL file; reads and fetches nothing, loads no library.

    Raises:
        ConfigError: naming `key`, if there is nothing to read.
    """
    kind = _kind_of(path, key, streaming=streaming)
    if kind in ("jsonl", "csv"):
        open_file(path, key).close()
    elif kind == "files":
        for name in files_of(path):
            require_rows(name, key)
    elif kind == "table" and not (os.access(path, os.R_OK) or is_copy_of_hub(path)):
        what = "cannot be read" if os.path.exists(path) else "no such file"
        raise ConfigError(f"{key} = {path!r}: {what}; the current directory is {str(Path.cwd())!r}", key=key)
    return kind


def _kind_of(path: str, key: str, *, streaming: bool) -> RowsKind:
    is_saved = _is_saved(path)
    is_remote = not is_saved and (is_copy_of_hub(path) or is_hub_name(path))
    if streaming and not is_remote:
        raise nothing_to_stream(path, key)
    if is_remote:
        return "table" if is_copy_of_hub(path) else "hub"
    if not is_saved and files_of(path):
        return "files"
    if os.path.isdir(path) and not is_saved:
        raise ConfigError(f"{key} = {path!r}: a directory without a file of rows ({_readable()}) that is neither a "
                          "BEIR folder (corpus.jsonl, queries.jsonl, qrels/train.tsv) nor saved by `datasets` nor a "
                          "copy of a data set of the hub (with its README.md); name the directory that holds the files",
                          key=key)
    if not os.path.exists(path) and glob.has_magic(path):
        raise ConfigError(f"{key} = {path!r}: no file of rows matches ({_readable()}); the current directory is "
                          f"{str(Path.cwd())!r}", key=key)
    if is_saved or path.endswith(TABLE_ENDINGS):
        return "table"
    if path.endswith(ENDINGS):
        return "jsonl"
    if path.endswith(CSV_ENDINGS):
        return "csv"
    if path.lower().endswith(_SPREADSHEETS):
        raise ConfigError(f"{key} = {path!r}: a spreadsheet; save the sheet as CSV UTF-8 (`Save as` of the program "
                          "that wrote it, or pandas.read_excel(FILE).to_csv(\"rows.csv\", index=False)), with the "
                          "names of the columns in its first row", key=key)
    raise ConfigError(f"{key} = {path!r}: not a file of rows by its name; readable are {_readable()}, a directory of "
                      "such files, one that `datasets` saved, and a data set of the hub (org/name:config/split)",
                      key=key)


def _readable() -> str:
    return ", ".join((*ENDINGS, ".csv", ".tsv", *TABLE_ENDINGS))


def _open_table(path: str, key: str, *, streaming: bool = False) -> Any:
    """A `Dataset`, or an `IterableDataset` if it is to be streamed."""
    if path.endswith(TABLE_ENDINGS) and not os.path.exists(path):
        raise ConfigError(f"{key} = {path!r}: no such file; the current directory is {str(Path.cwd())!r}", key=key)
    import datasets

    try:
        table: Any = _load_stream(path) if streaming else _load_table(path)
    except Exception as error:  # all of them: datasets, pyarrow and the hub's client have no common class of errors
        raise ConfigError(f"{key} = {path!r}: cannot be read: {first_line(error)}; name a .parquet or "
                          ".arrow file, a directory that `datasets` saved, or a data set of the hub "
                          "(org/name:config/split)", key=key) from error
    if isinstance(table, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ConfigError(f"{key} = {path!r}: holds the splits {', '.join(table)}; name the directory of one of them",
                          key=key)
    return table if streaming else table.with_format(None)


def _load_table(path: str) -> Any:
    """The `Dataset` of a path; its tables stay on the disk."""
    import datasets

    if path.endswith(".parquet"):
        _refuse_large_rows(path)
        return datasets.Dataset.from_parquet(path, keep_in_memory=False)
    if path.endswith(".arrow"):
        return datasets.Dataset.from_file(path)
    if _is_saved(path):
        return datasets.load_from_disk(path, keep_in_memory=False)
    repository, config, split = _parts_of_name(path)
    return datasets.load_dataset(repository, config, split=split)


def _refuse_large_rows(path: str) -> None:
    """Raises ValueError if a Parquet file declares rows that are longer than a line may be."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if not 0 <= group.total_byte_size <= LONGEST_LINE * max(1, group.num_rows):
            raise ValueError(f"row group {index} says that its {group.num_rows} rows take {group.total_byte_size:,} "
                             f"bytes, more than {LONGEST_LINE >> 20} MiB each")


def _load_stream(path: str) -> Any:
    import datasets

    repository, config, split = _parts_of_name(path)
    return datasets.load_dataset(repository, config, split=split, streaming=True)


def _parts_of_name(path: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of a data set of the hub or a copy of one."""
    name = _LOCAL_NAME.fullmatch(path)
    assert name is not None
    return name["repository"], name["config"], name["split"] or "train"
