"""Vectors that were computed once, under a name that says of what: another model, prompt or text is another name."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_embed.errors import ConfigError, EmptyTextError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.names import Role
from megatron_embed.parallel.collectives import raise_on_all_ranks, smallest

ROWS_AT_ONCE = 4096
"""Vectors of a block, per rank."""
_NOT_READ = (".bin", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".md", ".lock")
_READ_BYTES = 1 << 24


def model_digest(directories: Sequence[Path]) -> str:
    """Hash of every file that may decide a model's vectors: names and contents, hidden files left out.

    Args:
        directories: all that the model is read from; links to directories in them are followed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for number, directory in enumerate(directories):
        for path in _files(directory):
            digest.update(f"{number}\0{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    digest.update(data)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    """What is read, in a fixed order; a directory that a link leads back to is looked at once."""
    found, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if path.suffix not in _NOT_READ and path.is_file())


def vectors_name(model: str, settings: Mapping[str, object], texts: Sequence[str]) -> str:
    """File name for the vectors of these texts, in order, by the model of this digest under these settings."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([model, settings], sort_keys=True).encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{digest.hexdigest()}.npy"


class VectorCache:
    """A folder of vectors. Every method is called by all ranks together."""

    def __init__(self, directory: str, *, rank: int) -> None:
        """Makes the folder. Raises ConfigError if it cannot be written."""
        self._directory, self._rank = Path(directory), rank
        error: UserError | None = None
        if rank == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as found:
                error = self._unwritable(found)
        raise_on_all_ranks(error)

    def blocks(self, name: str, rows: int, compute: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
        """Blocks of [rows, dim] float32: read where all ranks see them, else computed and written by rank 0.

        One all-reduce of an integer over the world; where they are written one more collective. What is abandoned half-
        way leaves no file.

        Raises:
            ConfigError: on every rank, after the last block, if they cannot be written.
        """
        path = self._directory / name
        known = _open(path, rows)
        if smallest(int(known is not None)):
            assert known is not None
            for start in range(0, rows, ROWS_AT_ONCE):
                yield torch.from_numpy(np.array(known[start:start + ROWS_AT_ONCE]))
            return
        writer = _Writer(path, rows) if self._rank == 0 else None
        try:
            for block in compute():
                if writer is not None:
                    writer.add(block)
                yield block
            error = None if writer is None or writer.finish() is None else self._unwritable(writer.error)
        finally:
            if writer is not None:
                writer.close()
        raise_on_all_ranks(error)

    def _unwritable(self, error: OSError | None) -> ConfigError:
        reason = "" if error is None else f" ({error.strerror or error})"
        return ConfigError(f"--cache {self._directory}: cannot be written{reason}; make room or name another directory")


class VectorSource:
    """Vectors of texts in blocks: computed, or read if they were computed before. Called by all ranks together."""

    def __init__(self, encoder: TextEncoder, cache: VectorCache | None, digest: str,
                 settings: Mapping[str, object]) -> None:
        """`digest`: the model's. `settings`: what else decides the vectors, JSON values; the prompts are added."""
        self._encoder, self._cache = encoder, cache
        self._digest, self._settings = digest, settings

    def blocks(self, role: Role, texts: Sequence[str]) -> Iterator[Tensor]:
        """Blocks of [texts, dim] float32 on the CPU, the same on every rank.

        Raises:
            EmptyTextError: with the number of the text among all of them.
        """
        if self._cache is None:
            return self._encoded(role, texts)
        settings = {**self._settings, "role": role, "prompt": self._encoder.tokenizer.fill_prompt(role)}
        name = vectors_name(self._digest, settings, texts)
        return self._cache.blocks(name, len(texts), lambda: self._encoded(role, texts))

    def _encoded(self, role: Role, texts: Sequence[str]) -> Iterator[Tensor]:
        topology = self._encoder.topology
        step = ROWS_AT_ONCE * topology.dp_size
        for start in range(0, len(texts), step):
            try:
                yield self._encoder.encode(texts[start:start + step], role, show_progress=topology.rank == 0)
            except EmptyTextError as error:
                raise EmptyTextError(start + error.row, str(error), error.text) from None


class _Writer:
    """A .npy file in the making; an error is kept, for the other ranks would wait."""

    def __init__(self, path: Path, rows: int) -> None:
        self._path, self._rows = path, rows
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None
        self.error: OSError | None = None

    def add(self, block: Tensor) -> None:
        if self.error is not None:
            return
        try:
            if self._file is None:
                self._temporary.unlink(missing_ok=True)
                self._file = self._temporary.open("xb")  # x: a link that somebody put there is not followed
                np.lib.format.write_array_header_1_0(
                    self._file, {"descr": "<f4", "fortran_order": False, "shape": (self._rows, block.shape[1])})
            self._file.write(block.cpu().numpy().astype("<f4").tobytes())
        except OSError as error:
            self.error = error

    def finish(self) -> OSError | None:
        """Gives the file its name; the error, if there was one."""
        try:
            if self.error is None and self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.rename(self._path)
        except OSError as error:
            self.error = error
        return self.error

    def close(self) -> None:
        """Closes the file, and removes it if it did not get its name."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _open(path: Path, rows: int) -> "np.ndarray | None":
    """The vectors as a mapped file, null if there are none of that many rows."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == rows and vectors.dtype == np.float32 else None
