"""Names and files in a directory that somebody else made: what a name may be, and which files are opened.

A name that stands in a file becomes a path only through `plain_name`; a directory is looked through by `check_files`
before anything in it is read; what is then opened is opened by `open_regular`.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError

MARKS = ("config.json", "modules.json", "adapter_config.json", "megatron_embed.json")
"""A directory with none of these is no model directory, and is not looked through."""
NOT_READ = (".git", ".cache")
"""Folders of other programs, which no reader enters."""
_MOST_FILES = 200_000
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "fast_tokenizer_files")
"""Keys of tokenizer_config.json that Transformers takes for files to read."""


def plain_name(name: object, said_by: str) -> str:
    """A name that somebody's file gives, as the name of one file or folder directly in its directory.

    Args:
        said_by: file and key, for the message.
    Raises:
        CheckpointError: empty, `.`, `..`, with a separator, or no text at all: it could lead out of the directory.
    """
    good = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and (
        name.isprintable())
    if not isinstance(name, str) or not good:
        raise CheckpointError(f"{said_by} = {name!r}: must be the plain name of one file or folder in that directory; "
                              "a name that could lead elsewhere is not followed: correct it, or fetch the directory "
                              "again from a source that you trust")
    return name


def check_files(directory: str | Path) -> None:
    """Looks through a model directory or checkpoint before it is read: every file in it is an ordinary one, or a link
    to an ordinary one inside of it. No file is opened.

    The Hugging Face hub's cache (`snapshots/REVISION/FILE -> ../../blobs/HASH`) may link to its own `blobs`.

    Raises:
        CheckpointError: a link that leads elsewhere or nowhere, a device, a pipe or a socket.
    """
    folder = Path(directory)
    if not any(os.path.lexists(folder / mark) for mark in MARKS):
        return
    allowed = [folder.resolve()]
    absolute = Path(os.path.abspath(folder))
    if absolute.parent.name == "snapshots":
        allowed.append((absolute.parent.parent / "blobs").resolve())
    for number, entry in enumerate(_entries(folder)):
        if number > _MOST_FILES:
            raise CheckpointError(f"{folder}: more than {_MOST_FILES} files are no model directory; give the directory "
                                  "that holds config.json and the weights alone")
        if entry.is_symlink():
            _check_link(Path(entry.path), allowed)
        elif not entry.is_dir(follow_symlinks=False) and not entry.is_file(follow_symlinks=False):
            raise _refusal(Path(entry.path), _kind(entry.stat(follow_symlinks=False).st_mode))


def check_tokenizer_names(directory: str | Path) -> None:
    """No file outside of the directory is taken for the tokenizer's, as Transformers does if tokenizer_config.json
    names one that exists. Paths of the author's own machine, which many files still hold, lead nowhere and do no harm.

    Raises:
        CheckpointError: there is such a file.
    """
    folder = Path(directory)
    file = folder / "tokenizer_config.json"
    try:
        values = read_json_file(file) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # the tokenizer's own reader speaks of it
    for key in _TOKENIZER_FILES if isinstance(values, dict) else ():
        named = values.get(key)
        for name in named if isinstance(named, list) else [named]:
            if isinstance(name, str) and os.path.lexists(folder / name) and Path(name).name != name:
                plain_name(name, f"{file}: {key}")


def open_regular(path: Path) -> io.FileIO:
    """An ordinary file, opened for reading; a pipe or device, whose opening or reading might never end, is refused.

    Raises:
        CheckpointError: it is no ordinary file.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. Ordinary files do not heed it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _refusal(path, _kind(mode))
    file = io.FileIO(descriptor)
    file.name = str(path)
    return file


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder; links are not followed, and what cannot be listed is nothing that is read."""
    pending = [str(folder)]
    while pending:
        try:
            found = list(os.scandir(pending.pop()))
        except OSError:
            continue
        for entry in found:
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
    if not any(target.is_relative_to(place) for place in allowed):
        raise _refusal(path, f"a link to {target}, outside of the directory")


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is {what}, which is not read; put an ordinary file there (`cp -L` copies a "
                           "directory with what its links lead to)")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket",
             stat.S_ISDIR: "a directory"}
    return next((name for test, name in kinds.items() if test(mode)), "no ordinary file")
