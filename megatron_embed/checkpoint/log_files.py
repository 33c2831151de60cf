"""Logs of lines of JSON: a run appends to them, a resumed run continues them, and a long one is several files.

The newest lines are in NAME.jsonl, older ones in NAME.000001.jsonl, NAME.000002.jsonl, ... A kill between any two
calls of the file system leaves a log that can be read and continued.
"""

import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_embed.config.json_file import json_value, open_ordinary

logger = logging.getLogger(__name__)

LONGEST_LINE = 16 << 20
"""Bytes of a line that is read; a save's names every tensor of the model."""
LARGEST_LOG = 2 << 30
"""Bytes of a log whose lines are kept in memory: two million steps and more."""
_BLOCK = 1 << 16
_NUMBER = "[0-9]" * 6


class LogWriter:
    """Appends records to a log; each is in the file when `append` returns.

    Raises OSError from every method if the log cannot be written.
    """

    def __init__(self, path: Path, *, first_step: int, max_mib: int) -> None:
        """Continue the log after optimizer step `first_step`; 0: a new log, an earlier run's is kept.

        Args:
            path: of the newest file.
            max_mib: MiB above which a file is renamed and a new one begins; 0: never.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if first_step:
            cut_after(path, first_step)
        else:
            move_aside(path)
        self._path, self._file = path, open_to_append(path)
        status = os.fstat(self._file.fileno())
        self._size, self._max_size = status.st_size, max_mib * 2**20 if stat.S_ISREG(status.st_mode) else 0

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write a record as one line. Returns whether it is the first of a new file."""
        line = (json.dumps(record) + "\n").encode()
        is_first = 0 < self._max_size < self._size + len(line) and self._size > 0
        if is_first:
            self._begin_file()
        self._file.write(line)
        self._file.flush()
        self._size += len(line)
        return is_first

    def close(self) -> None:
        self._file.close()

    def _begin_file(self) -> None:
        older = older_files(self._path)
        next_number = int(older[-1].stem.rpartition(".")[2]) + 1 if older else 1
        self._path.rename(_numbered(self._path, f"{next_number:06d}"))
        full, self._file, self._size = self._file, open_to_append(self._path), 0
        full.close()


def open_to_append(path: Path) -> BinaryIO:
    """The file, made if it is not there. Raises OSError, also for a pipe that nobody reads, which would wait, and for a
    link to a file."""
    _refuse_link(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "ab")


def older_files(path: Path) -> list[Path]:
    """The files of a log beside its newest one, oldest first."""
    return sorted(path.parent.glob(f"{path.stem}.{_NUMBER}{path.suffix}"))


def log_exists(path: Path) -> bool:
    """Whether there is such a log, its newest file or, after a kill at the wrong moment, an older one."""
    return path.is_file() or bool(older_files(path))


def lines_of_log(path: Path, largest: int | None = None) -> Iterator[tuple[Path, int, bytes]]:
    """(file, number of the line in it, line with its end) of all lines of a log, oldest first. The run may go on.

    Args:
        largest: bytes of all files together; None: any number.
    Raises:
        OSError: there is no such log, or it cannot be read: it is not a regular file, or too large.
    """
    total = 0
    for part, file in _files_of_log(path):
        for line_number, line in _numbered_lines(part, file):
            total += len(line)
            if largest is not None and total > largest:
                raise OSError(errno.EFBIG, f"longer than {largest >> 20} MiB", str(part))
            yield part, line_number, line


def _files_of_log(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """(path, open file) of the files of a log, oldest first. Raises OSError if there is none, or one is not regular."""
    with contextlib.ExitStack() as stack:
        try:
            # Opened first: if the run renames it from now on, it is found by its new name, and is still the last.
            newest = stack.enter_context(open_ordinary(path))
        except FileNotFoundError:
            newest = None
        older = older_files(path)
        if newest is None and not older:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        for part in older:
            with open_ordinary(part) as file:
                if newest is not None and os.path.sameopenfile(file.fileno(), newest.fileno()):
                    break
                yield part, file
        if newest is not None:
            yield path, newest


def _numbered_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number, line) of all lines of an open file. Raises OSError for one of more than LONGEST_LINE bytes."""
    line_number = 0
    while line := file.readline(LONGEST_LINE + 1):
        line_number += 1
        if len(line) > LONGEST_LINE:
            raise OSError(errno.EFBIG, f"line {line_number} has more than {LONGEST_LINE >> 20} MiB", str(path))
        yield line_number, line


def objects_of_log(path: Path, largest: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a log's lines, as `lines_of_log`; other lines, such as one that a kill cut short, are left out."""
    for _, _, line in lines_of_log(path, largest):
        try:
            value = json_value(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def move_aside(path: Path) -> None:
    """Keep an earlier run's log as NAME.1.jsonl, NAME.2.jsonl, ... when a new run starts in its directory."""
    _restore_newest(path)
    if path.exists() and path.stat().st_size:
        suffix = 1
        while (kept := _numbered(path, str(suffix))).exists():
            suffix += 1
        for part in older_files(path):  # before the newest, which shows that the move is complete
            part.rename(_numbered(kept, part.stem.rpartition(".")[2]))
        path.rename(kept)
        logger.info("kept the %s of an earlier run as %s", path.stem, kept)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a log after optimizer step `step`, which a resumed run writes again, and a last line that a
    kill cut short. Reads from the end, only what is dropped: a run of a million steps resumes at once."""
    _restore_newest(path)
    while path.is_file():
        _refuse_link(path)
        end = path.stat().st_size
        for start, line in _lines_from_end(path):
            if line.endswith(b"\n") and _step_of(line) <= step:
                break
            end = start
        if end < path.stat().st_size:
            os.truncate(path, end)
        if end or not _restore_newest(path):
            return


def _refuse_link(path: Path) -> None:
    """Raises OSError for a link, except one to a pipe or a device: in a directory from somebody else it may lead to any
    file, of which lines would be cut off."""
    if path.is_symlink() and (path.is_file() or not path.exists()):
        raise OSError(errno.ELOOP, f"{path.name} is a link to another file, which is not written through it; remove "
                      "the link", str(path))


def _numbered(path: Path, digits: str) -> Path:
    return path.with_name(f"{path.stem}.{digits}{path.suffix}")


def _restore_newest(path: Path) -> bool:
    """Rename the last of the older files to the newest if that is empty or missing. Returns whether it did."""
    older = older_files(path)
    if not older or (path.exists() and path.stat().st_size):
        return False
    older[-1].replace(path)
    return True


def _step_of(line: bytes) -> float:
    """The step of a line; more than any for one that is none."""
    try:
        record = json_value(line)
    except ValueError:
        return float("inf")
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int | float) and step == step else float("inf")


def _lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of every line, the last first. Raises OSError for one longer than LONGEST_LINE."""
    with open_ordinary(path) as file:
        position, rest = file.seek(0, os.SEEK_END), b""
        while position:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            rest = file.read(size) + rest
            if len(rest) > LONGEST_LINE + _BLOCK:
                raise OSError(errno.EFBIG, f"a line of more than {LONGEST_LINE >> 20} MiB", str(path))
            lines = rest.splitlines(keepends=True)
            rest, offset = lines[0], position + len(rest)
            for line in reversed(lines[1:]):
                offset -= len(line)
                yield offset, line
        if rest:
            yield 0, rest
