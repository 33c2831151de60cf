"""Read JSON from untrusted files within bounds: bytes, brackets and depth; from ordinary files alone."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from megatron_embed.errors import CheckpointError

LARGEST_FILE = 16 << 20
"""Bytes of a model directory's JSON file; config.json with 100,000 labels has 4 MB."""
LARGEST_TOKENIZER = 256 << 20
"""The same of a tokenizer.json; the largest published have 35 MB."""
LARGEST_INDEX = 64 << 20
"""The same of an index of weights, which has a line for each tensor; the largest published have 10 MB."""
DEEPEST = 100
"""Levels of brackets. Python's own limit is its stack's, so that a value may be read and then not be printed."""
MOST_BRACKETS = 1_000_000
"""Lists and objects of one text; each takes 64 bytes and more in memory, and two on the disk."""


def open_ordinary(path: str | Path) -> BinaryIO:
    """A file, opened for reading: opening or reading a pipe or a device might never end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    # O_NONBLOCK: opening a FIFO without a writer must not wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, largest: int = LARGEST_FILE) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it is longer than `largest` bytes.
    """
    with open_ordinary(path) as file:
        raw = file.read(largest + 1)
    if len(raw) > largest:
        raise ValueError(f"longer than {largest >> 20} MiB, which no such file is")
    return raw


def read_json_file(path: str | Path, largest: int = LARGEST_FILE) -> Any:
    """The value that a JSON file holds.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: not UTF-8, not JSON, longer than `largest` bytes, or nested too deeply; the message says which.
    """
    return json_value(read_bytes(path, largest))


def json_value(raw: bytes) -> Any:
    """The value that a JSON text stands for. Raises ValueError: not UTF-8, not JSON, or nested too deeply."""
    refuse_many_brackets(raw)
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise too_deep() from None
    refuse_deep_value(value, raw)
    return value


def read_json_object(path: str | Path, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """The JSON object that a file of a model directory holds. Raises CheckpointError if it holds none."""
    try:
        value = read_json_file(path, largest)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}; fetch the file again")
    return value


def read_optional_json_object(path: Path, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """`read_json_object` of the file; an empty object if the file does not exist."""
    return read_json_object(path, largest) if path.is_file() else {}


def refuse_many_brackets(raw: bytes | bytearray) -> None:
    """Raises ValueError if a JSON text would be many times larger in memory. Brackets in strings count too."""
    if raw.count(b"[") + raw.count(b"{") > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS:,} brackets")


def refuse_deep_value(value: object, raw: bytes) -> None:
    """Raises ValueError if the value of this JSON text is nested more than DEEPEST levels deep."""
    if raw.count(b"[") + raw.count(b"{") <= DEEPEST:
        return
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST + 1:
            raise too_deep()
        inner: list[Any] = []
        for item in level:
            values = item.values() if isinstance(item, dict) else item
            inner.extend(value for value in values if isinstance(value, (dict, list)))
        level = inner


def too_deep() -> ValueError:
    """The error for JSON that is nested too deeply."""
    return ValueError(f"nested more than {DEEPEST} levels deep")
