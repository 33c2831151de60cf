"""Checks of names and files in an untrusted model directory.

A name in a file becomes a path only through `plain_name`; `check_files` inspects a directory before anything in it is
read; `open_regular` opens its files.
"""

import io
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.key_table import shown_value

MARKS = ("config.json", "modules.json", "adapter_config.json", "megatron_embed.json")
"""A directory with none of these is not a model directory, and is not inspected."""
NOT_READ = (".git", ".cache")
"""Folders of other programs, which are never read."""
_MOST_FILES = 200_000
_LONGEST_NAME = 255
"""Bytes of a name that file systems allow."""
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files")
"""Keys of tokenizer_config.json whose values Transformers reads as files of the directory."""
_TOKENIZER_CONTENTS = ("vocab", "merges", "gguf_file")
"""Keys whose values, where they are texts, it opens as files of any place. Nobody's files hold them so."""


def plain_name(name: object, source: str) -> str:
    """The name, if it can only be that of a file or folder directly in the directory.

    Args:
        source: file and key, for the message.
    Raises:
        CheckpointError: it is empty, `.`, `..`, has a separator, or is not a string, so it could lead elsewhere; or it
            is too long for a file.
    """
    good = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and (
        name.isprintable() and len(name.encode()) <= _LONGEST_NAME)
    if not isinstance(name, str) or not good:
        # What a pickle holds in place of a text may be many times larger in print.
        shown = shown_value(name) if isinstance(name, str | int | float | None) else f"a {type(name).__name__}"
        raise CheckpointError(f"{source} = {shown}: must be the plain name of one file or folder in that directory; "
                              "a name that could lead elsewhere is not followed: correct it, or fetch the directory "
                              "again from a source that you trust")
    return name


def check_files(directory: str | Path) -> None:
    """Check, before a model directory or checkpoint is read, that every file in it is a regular file, or a link to a
    regular file inside it. No file is opened.

    The Hugging Face hub's cache (`snapshots/REVISION/FILE -> ../../blobs/HASH`) may link to its own `blobs`, which
    must be a folder: as a link, it would open whatever it leads to.

    Raises:
        CheckpointError: a link that leads elsewhere or nowhere, a device, a pipe or a socket.
    """
    folder = Path(directory)
    if not any(os.path.lexists(folder / mark) for mark in MARKS):
        return
    allowed = [folder.resolve()]
    for snapshot in {Path(os.path.abspath(folder)), allowed[0]}:  # a link to a snapshot has a name of its own
        blobs = snapshot.parent.parent.resolve() / "blobs"
        if snapshot.parent.name == "snapshots" and not blobs.is_symlink():
            allowed.append(blobs)
    for index, entry in enumerate(_entries(folder)):
        if index > _MOST_FILES:
            raise CheckpointError(f"{folder}: has more than {_MOST_FILES} files, too many for a model directory; give "
                                  "the directory that holds config.json and the weights alone")
        if entry.is_symlink():
            _check_link(Path(entry.path), allowed)
        elif not entry.is_dir(follow_symlinks=False) and not entry.is_file(follow_symlinks=False):
            raise _refusal(Path(entry.path), _kind(entry.stat(follow_symlinks=False).st_mode))


def check_tokenizer_names(directory: str | Path) -> None:
    """Check that tokenizer_config.json names no existing file outside the directory, which Transformers would read.

    Many of these files still hold paths on their author's machine, which do no harm where they do not exist.

    Raises:
        CheckpointError: it names such a file, or has a text where Transformers would open any file.
    """
    folder = Path(directory)
    file = folder / "tokenizer_config.json"
    try:
        values = read_json_file(file) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # the tokenizer's own reader reports it
    for key in _TOKENIZER_FILES if isinstance(values, dict) else ():
        named = values.get(key)
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, str) and os.path.lexists(folder / name) and Path(name).name != name:
                plain_name(name, f"{file}: {key}")
    for key in _TOKENIZER_CONTENTS if isinstance(values, dict) else ():
        if isinstance(values.get(key), str):
            raise CheckpointError(f"{file}: {key} = {shown_value(values[key])}: Transformers would open that file, "
                                  "wherever it is; remove the key, and put the tokenizer's files into the directory")


def open_regular(path: Path) -> io.FileIO:
    """A regular file, opened for reading; opening or reading a pipe or device might never end.

    Raises:
        CheckpointError: it is not a regular file.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would block for ever. It has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _refusal(path, _kind(mode))
    file = io.FileIO(descriptor)
    file.name = str(path)
    return file


def refuse_compressed(file: BinaryIO) -> None:
    """Check a file of `torch.save`, a zip archive, before it is read: torch writes no compressed entries, and reads
    them, so that a small file would fill the memory. The position in the file stays.

    Raises:
        ValueError: its entries are compressed, or together longer than the file.
    """
    start = file.tell()
    file.seek(0, os.SEEK_END)
    length = file.tell()
    try:
        with zipfile.ZipFile(io.BufferedReader(_FromStart(file, length))) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        entries = []
    file.seek(start)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > length):
        raise ValueError("it is compressed, and torch writes no such file")


class _FromStart(io.RawIOBase):
    """A file whose positions are sought from its start alone: torch's view of a part of a file counts those from its
    end the wrong way round (2.13)."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length, self._position = file, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, begin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or reach the end."""
        self._file.seek(self._position)
        data = self._file.read(max(0, min(len(buffer), self._length - self._position)))
        buffer[:len(data)] = data
        self._position += len(data)
        return len(data)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder; links are not followed, and folders that cannot be listed are skipped."""
    pending = [str(folder)]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:
            continue
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False) and entry.name not in NOT_READ:
                pending.append(entry.path)


def _check_link(path: Path, allowed: list[Path]) -> None:
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        if path.name in MARKS or path.suffix in (".json", ".safetensors"):
            raise CheckpointError(f"{path}: is a link to a file that is not there ({os.readlink(path)}); fetch the "
                                  "directory again") from None
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _refusal(path, f"a link to {_kind(mode)}")
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise _refusal(path, f"a link to {target}, outside of the directory")


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is {what}, which is not read; put an ordinary file there (`cp -L` copies a "
                           "directory with what its links lead to)")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket",
             stat.S_ISDIR: "a directory"}
    return next((name for test, name in kinds.items() if test(mode)), "not a regular file")
