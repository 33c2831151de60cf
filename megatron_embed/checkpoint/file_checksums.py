"""Checksums of a checkpoint's files: each rank sums up what it wrote, in the thread that wrote it."""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_embed.checkpoint.load import TRAINER_FILE
from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError

CHECKSUM_FILE = "checksums.json"
"""In every checkpoint: file -> [size, CRC-32]."""
_PART = ".checksums_{rank}.json"
_BLOCK = 1 << 22
_LONGEST_NAME = 255


def write_own_checksums(folder: Path, rank: int) -> None:
    """Write the checksums of the tensors that this rank wrote to `folder`, for `write_checksums`."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    (folder / _PART.format(rank=rank)).write_text(json.dumps({file.name: _checksum(file) for file in files}))


def write_checksums(checkpoint: Path) -> None:
    """Write CHECKSUM_FILE on rank 0, once all ranks have written theirs; only files without a checksum are read."""
    known = {}
    for part in (checkpoint / "model").glob(_PART.format(rank="*")):
        known |= {f"model/{name}": value for name, value in json.loads(part.read_text()).items()}
        part.unlink()
    sums = {name: known.get(name) or _checksum(checkpoint / name) for name in _files(checkpoint)}
    (checkpoint / CHECKSUM_FILE).write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def changed_files(checkpoint: Path, *, contents: bool = True) -> list[str] | None:
    """The files of a checkpoint that are not as they were written, in words; None for a checkpoint without checksums.

    Files that came later (the best checkpoint's value) do not count, and none of TRAINER_FILE.

    Args:
        contents: read all files; else only their sizes are compared.
    Raises:
        CheckpointError: the checksums cannot be read.
    """
    file = checkpoint / CHECKSUM_FILE
    if not file.is_file():
        return None
    try:
        sums: dict[str, list[int]] = read_json_file(file)
        items = sorted((str(name), (int(size), int(crc))) for name, (size, crc) in sums.items())
        if any(Path(name).is_absolute() or ".." in Path(name).parts or len(name) > _LONGEST_NAME for name, _ in items):
            raise ValueError("it names a file outside of the checkpoint")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); remove it, and the checkpoint's files are not "
                              "compared") from error
    return list(_changes(checkpoint, items, contents))


def _changes(checkpoint: Path, items: Iterable[tuple[str, tuple[int, int]]], contents: bool) -> Iterable[str]:
    for name, (size, crc) in items:
        file = checkpoint / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes, not {size}"
        elif contents and _checksum(file)[1] != crc:
            yield f"{name} has other bytes than were written"


def _files(checkpoint: Path) -> list[str]:
    names = (path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return [name for name in names if name not in (CHECKSUM_FILE, TRAINER_FILE)]


def _checksum(file: Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
