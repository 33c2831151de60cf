"""The index of a file of rows, kept beside the data: written once by all ranks together, found again at every start.

No process group is needed: ranks meet in the directory. Each takes the next unit of bytes that nobody has locked, and
leaves its parts under their final names. A rank that dies loses its locks, so that another rank, or the next start,
takes the units that it has not finished.
"""

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_embed.config.json_file import LARGEST_TOKENIZER, read_json_file
from megatron_embed.data.index_parts import Part, PartInfo
from megatron_embed.data.row_index import IndexedUnit, RowIndex, Store
from megatron_embed.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

READER_VERSION = 3
"""Raise it when other rows are accepted, or other values are read from them."""
NO_DIRECTORY = "none"
"""Value of data.index_directory for an index that is not kept."""
SMALLEST_KEPT = 16 << 20
"""Bytes of an entry from which its index is kept in the default directory; smaller files are read in a second."""
_DEFAULT_UNWRITABLE = "%s: cannot be written (%s), so every start reads all rows; set data.index_directory"
_SUMMARY = "index.json"
_LOCKS = "locks"
_POLL_SECONDS = 0.05
_LONGEST_POLL_SECONDS = 1.0
_REPORT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class IndexPlace:
    """The directory of the indexes, and the ranks that write them."""

    directory: str | None = NO_DIRECTORY
    """`data.index_directory`; None: the cache directory."""
    rank: int = 0
    world_size: int = 1


class Unit(NamedTuple):
    """Rows of one file that one process reads."""

    file: int
    """Index of the file in the entry."""
    begin: int
    end: int | None
    """Rows that begin at byte `begin` or behind it and before byte `end`; None: to the end of the file."""


ReadUnit = Callable[[Unit, int, Store], IndexedUnit]
"""(unit, number of its first line, what keeps a part) -> what is known of the unit. Raises DataError for a row."""


def default_directory() -> Path:
    """The cache directory, in which indexes lie by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_embed" / "index"


def folder_of(place: IndexPlace, files: Sequence[str], settings: dict[str, Any]) -> Path | None:
    """The folder of an entry's index, made if it is new; None: the index is not kept.

    Args:
        files: of the entry; their absolute paths, sizes and times of change belong to the folder's name.
        settings: what else decides how the rows are read.
    Raises:
        ConfigError: data.index_directory cannot be written.
        OSError: a file is gone.
    """
    stamps = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    is_default = place.directory is None
    if place.directory == NO_DIRECTORY or (is_default and sum(size for size, _ in stamps) < SMALLEST_KEPT):
        return None
    parent = default_directory() if place.directory is None else Path(place.directory)
    name = _hash([READER_VERSION, [os.path.abspath(file) for file in files], settings])
    folder = parent / f"{Path(files[0]).name.split('.')[0][:40]}-{name}-{_hash(stamps)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _SUMMARY).is_file():
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if is_default:
            logger.warning(_DEFAULT_UNWRITABLE, folder, error.strerror or error)
            return None
        raise ConfigError(f"data.index_directory = {place.directory!r}: cannot be written ({error.strerror}); choose "
                          f"a directory that can, or {NO_DIRECTORY!r} to read all rows at every start",
                          key="data.index_directory") from error
    return folder


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_index(folder: Path) -> RowIndex | None:
    """The finished index that the folder holds; None if there is none, or a part is missing."""
    try:
        units = [IndexedUnit.from_json(unit) for unit in _read_sealed(folder / _SUMMARY)]
        return _opened(folder, units) if all(
            _is_whole(folder, number, unit) for number, unit in enumerate(units)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sealed(path: Path, values: Any) -> bytes:
    """The JSON file that `_read_sealed` reads: values with a hash of them and of the file's place."""
    return json.dumps({"hash": _hash([path.parent.name, path.name, values]), "values": values}).encode()


def _read_sealed(path: Path) -> Any:
    """The values of a JSON file. Raises OSError or ValueError: it cannot be read, or is not as it was written there."""
    content = read_json_file(path, LARGEST_TOKENIZER)
    if not isinstance(content, dict) or content.get("hash") != _hash([path.parent.name, path.name,
                                                                     content.get("values")]):
        raise ValueError("damaged, or of another index")
    return content["values"]


def _opened(folder: Path, units: Sequence[IndexedUnit]) -> RowIndex:
    return RowIndex(units, [Part(info, _part_file(folder, number, index)) for number, unit in enumerate(units)
                            for index, info in enumerate(unit.parts)], folder)


def _part_file(folder: Path, unit: int, part: int) -> Path:
    return folder / f"{unit:06d}.{part:03d}.bin"


def _unit_file(folder: Path, unit: int) -> Path:
    return folder / f"{unit:06d}.json"


def _is_whole(folder: Path, number: int, unit: IndexedUnit) -> bool:
    """Whether the unit's parts have the sizes that they were written with."""
    try:
        return all(_part_file(folder, number, index).stat().st_size == info.num_bytes
                   for index, info in enumerate(unit.parts))
    except OSError:
        return False


def index_in_memory(units: Sequence[Unit], read: ReadUnit) -> RowIndex:
    """The index of an entry, read by this process alone and not kept."""
    indexed: list[IndexedUnit] = []
    parts: list[Part] = []
    for unit in units:
        lines = sum(before.summary.lines for before in indexed if before.file == unit.file)
        indexed.append(read(unit, lines + 1, lambda info, data: parts.append(Part(info, data))))
    return RowIndex(indexed, parts)


class IndexWriter:
    """Writes the index of an entry, together with all processes that do so in the same folder.

    Args:
        sizes: bytes of each unit, for the progress that is shown.
        what: names the rows in messages.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], read: ReadUnit, *, sizes: Sequence[int], what: str,
                 place: IndexPlace) -> None:
        self._folder, self._units, self._read = folder, units, read
        self._place = place
        self._done: dict[int, IndexedUnit] = {}
        self._refused: set[int] = set()
        self._progress = _Progress(sizes, what, place)

    def write(self) -> RowIndex | None:
        """The finished index; None: the default directory's disk is full, which a warning says.

        Raises:
            DataError: the first row that cannot be used, on every process alike.
            ConfigError: the folder, in a directory that the user named, cannot be written.
        """
        try:
            with _locks(self._folder / _LOCKS) as lock, self._progress:
                self._read_all(lock)
            self._raise_first_error()
            units = [unit for _, unit in sorted(self._done.items())]
            _write(self._folder / _SUMMARY, _sealed(self._folder / _SUMMARY, [unit.as_json() for unit in units]))
            index = _opened(self._folder, units)
        except OSError as error:
            if self._place.directory is None:
                logger.warning(_DEFAULT_UNWRITABLE, self._folder, error.strerror or error)
                return None
            raise ConfigError(f"data.index_directory = {self._place.directory!r}: {self._folder} cannot be written "
                              f"({error.strerror or error}); free space there, set another directory, or "
                              f"{NO_DIRECTORY!r} to read all rows at every start",
                              key="data.index_directory") from error
        self._remove_outdated()
        return index

    def _read_all(self, lock: Callable[[int], bool]) -> None:
        """Read units until all before the first bad row are done, by this process or another."""
        self._look()
        self._progress.begin(self._done)
        pause = _POLL_SECONDS
        while waited := self._missing():
            is_busy = False
            for number in waited:
                if lock(number):
                    self._look([number])
                    if number in self._missing():
                        self._read_unit(number)
                        is_busy = True
            self._look()
            self._progress.update(self._done)
            pause = _POLL_SECONDS if is_busy else min(2 * pause, _LONGEST_POLL_SECONDS)
            if not is_busy and self._missing():
                time.sleep(pause)

    def _missing(self) -> list[int]:
        """Units that nobody has finished, of those that count; this process begins at its own place among them."""
        end = min(self._refused, default=len(self._units))
        missing = [number for number in range(end) if number not in self._done]
        first = len(missing) * self._place.rank // self._place.world_size
        return missing[first:] + missing[:first]

    def _look(self, numbers: Sequence[int] | None = None) -> None:
        """Take note of what other processes have finished."""
        names = set(os.listdir(self._folder))
        for number in range(len(self._units)) if numbers is None else numbers:
            if number in self._done:
                continue
            if f"{number:06d}.refused" in names:
                self._refused.add(number)
            if f"{number:06d}.json" in names:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    unit = IndexedUnit.from_json(_read_sealed(_unit_file(self._folder, number)))
                    if _is_whole(self._folder, number, unit):
                        self._done[number] = unit

    def _read_unit(self, number: int) -> None:
        """Read a unit, and write its parts; a bad row is noted, for `_raise_first_error` of every process."""
        count = itertools.count()

        def store(_: PartInfo, data: bytes) -> None:
            _write(_part_file(self._folder, number, next(count)), data)

        try:
            unit = self._read(self._units[number], 1, store)
        except DataError:
            _write(self._folder / f"{number:06d}.refused", b"")
            self._refused.add(number)
            return
        path = _unit_file(self._folder, number)
        _write(path, _sealed(path, unit.as_json()))
        self._done[number] = unit
        self._progress.update(self._done)

    def _raise_first_error(self) -> None:
        """Read the first unit with a bad row again, with the right numbers of its lines."""
        if not self._refused:
            return
        number = min(self._refused)
        lines = sum(self._done[before].summary.lines for before in range(number)
                    if self._units[before].file == self._units[number].file)
        try:
            self._read(self._units[number], lines + 1, lambda info, data: None)
        finally:  # The next start may find the rows as they should be, though size and time are the same.
            with contextlib.suppress(OSError):
                (self._folder / f"{number:06d}.refused").unlink(missing_ok=True)
        raise DataError(f"{self._folder}: a row was refused and is now accepted; start the run again")

    def _remove_outdated(self) -> None:
        """Remove what killed processes had not finished, and the indexes of the same files as they were before."""
        for unfinished in self._folder.glob(".[0-9]*"):
            unfinished.unlink(missing_ok=True)
        prefix = glob.escape(self._folder.name.rpartition("-")[0])
        for other in self._folder.parent.glob(f"{prefix}-*"):
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _locks(path: Path) -> Iterator[Callable[[int], bool]]:
    """A function that locks a unit for this process, if no other has it; the locks end with the block or the process.

    Where the file system has no locks, every process has all: then they do the same work twice, with equal results.
    """
    with path.open("ab") as file:
        def lock(number: int) -> bool:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                return True
            return True

        yield lock


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there, whenever the process ends."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{os.uname().nodename}")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except FileNotFoundError:
        if not path.exists():
            raise  # else a process that has no locks either wrote the same and removed what it took for unfinished
    finally:
        unfinished.unlink(missing_ok=True)


class _Progress:
    """What the first rank says of the work of all: a bar on a terminal, otherwise a line at times."""

    def __init__(self, sizes: Sequence[int], what: str, place: IndexPlace) -> None:
        self._sizes, self._what, self._place = sizes, what, place
        self._is_shown = place.rank == 0
        self._bar: tqdm[Any] | None = None
        self._started = self._reported = time.monotonic()
        self._before = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, done: dict[int, IndexedUnit]) -> None:
        """Say what is to be done."""
        self._before = sum(self._sizes[number] for number in done)
        if not self._is_shown or len(done) == len(self._sizes):
            return
        total = sum(self._sizes)
        logger.info("%s: %.1f MB are read and checked for the index, once for all starts, by %d process%s%s",
                    self._what, (total - self._before) / 1e6, self._place.world_size,
                    "es" * (self._place.world_size > 1),
                    f" ({self._before / total:.0%} is there from before)" if self._before else "")
        self._bar = tqdm(total=total, initial=self._before, unit="B", unit_scale=True, desc="index", disable=None)

    def update(self, done: dict[int, IndexedUnit]) -> None:
        """Say how far it is."""
        if self._bar is None:
            return
        size, now = sum(self._sizes[number] for number in done), time.monotonic()
        if not self._bar.disable:
            self._bar.update(size - self._bar.n)
        elif now - self._reported > _REPORT_SECONDS and size > self._before:
            left = (sum(self._sizes) - size) * (now - self._started) / (size - self._before)
            logger.info("%s: %.0f%% of the index is there; about %.0f s to go", self._what,
                        100 * size / sum(self._sizes), left)
            self._reported = now
