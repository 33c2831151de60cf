"""Checks of names and files in an untrusted model directory.

A name in a file becomes a path only through `plain_name`; `check_files` inspects a directory before anything in it is
read; `open_regular` opens its files.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError

MARKS = ("config.json", "modules.json", "adapter_config.json", "megatron_embed.json")
"""A directory with none of these is not a model directory, and is not inspected."""
NOT_READ = (".git", ".cache")
"""Folders of other programs, which are never read."""
_MOST_FILES = 200_000
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files")
"""Keys of tokenizer_config.json whose values Transformers reads as files."""


def plain_name(name: object, source: str) -> str:
    """The name, if it can only be that of a file or folder directly in the directory.

    Args:
        source: file and key, for the message.
    Raises:
        CheckpointError: it is empty, `.`, `..`, has a separator, or is not a string, so it could lead elsewhere.
    """
    good = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and (
        name.isprintable())
    if not isinstance(name, str) or not good:
        raise CheckpointError(f"{source} = {name!r}: must be the plain name of one file or folder in that directory; "
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
        CheckpointError: it names such a file.
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
