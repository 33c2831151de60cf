"""Cache of vectors, in files named after a hash of the model, the settings and the texts."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.npy_file import map_npy
from megatron_embed.names import Role
from megatron_embed.parallel.collectives import raise_on_all_ranks, smallest

ROWS_AT_ONCE = 4096
"""Vectors per block and rank."""
_NOT_READ = (".bin", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".md", ".lock")
_READ_BYTES = 1 << 24


def model_digest(directories: Sequence[Path]) -> str:
    """Hash of the name and content of every file that may affect a model's vectors, except hidden files.

    Args:
        directories: all directories that the model is read from; links to directories in them are followed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index, directory in enumerate(directories):
        for path in _files(directory):
            digest.update(f"{index}\0{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    digest.update(data)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    """Files to hash, in a fixed order; a directory that several links lead to is read once."""
    paths, seen = [], set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            paths += [Path(folder, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in paths if path.suffix not in _NOT_READ and path.is_file())


def vectors_name(model: str, settings: Mapping[str, object], texts: Sequence[str]) -> str:
    """File name for the vectors of these texts, in order, by the model with this digest under these settings."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(json.dumps([model, settings], sort_keys=True).encode())
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{digest.hexdigest()}.npy"


class VectorCache:
    """A directory of vectors. Every method is called by all ranks together."""

    def __init__(self, directory: str | Path, *, rank: int, key: str = "--cache") -> None:
        """Create the directory. Raises ConfigError, naming the option or setting `key`, if that fails."""
        self._directory, self._rank, self._key = Path(directory), rank, key
        error: UserError | None = None
        if rank == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as os_error:
                error = self._unwritable(os_error)
        raise_on_all_ranks(error)

    def blocks(self, name: str, rows: int, compute: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
        """Blocks [rows, dim] float32: read if all ranks see the file, otherwise computed, and written by rank 0.

        One all-reduce of an integer over the world, and one more collective if they are written. An interrupted
        computation leaves no file.

        Raises:
            ConfigError: on every rank, after the last block, if they cannot be written.
            DataError: a vector that is read is not finite.
        """
        path = self._directory / name
        known = _open(path, rows)
        if smallest(int(known is not None)):
            assert known is not None
            stored = CachedVectors(path, known)
            for start in range(0, rows, ROWS_AT_ONCE):
                yield stored.rows(np.arange(start, min(start + ROWS_AT_ONCE, rows)))
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

    def on_disk(self, name: str, rows: int, compute: Callable[[], Iterator[Tensor]]) -> "CachedVectors":
        """The vectors in their file, which is computed and written first where it is not there.

        Raises:
            ConfigError: on every rank, if it cannot be written, or some rank does not see it.
        """
        vectors = _open(self._directory / name, rows)
        if not smallest(int(vectors is not None)):
            for _ in self.blocks(name, rows, compute):
                pass
            vectors = _open(self._directory / name, rows)
            raise_on_all_ranks(None if vectors is not None else ConfigError(
                f"{self._key} {self._directory}: is not the same directory on all nodes; name one on a shared file "
                "system", key=self._key))
        assert vectors is not None
        return CachedVectors(self._directory / name, vectors)

    def _unwritable(self, error: OSError | None) -> ConfigError:
        reason = "" if error is None else f" ({error.strerror or error})"
        return ConfigError(f"{self._key} {self._directory}: cannot be written{reason}; free disk space or choose "
                           "another directory", key=self._key)


class CachedVectors:
    """Vectors in a file of a cache, memory-mapped.

    Attributes:
        dim: components of a vector.
    """

    def __init__(self, path: Path, vectors: NDArray[np.float32]) -> None:
        self._path, self._vectors, self.dim = path, vectors, int(vectors.shape[1])

    def rows(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows), dim] float32 of these rows. Raises DataError for a vector that is not finite."""
        block = torch.from_numpy(self._vectors[rows])
        bad = torch.nonzero(~torch.isfinite(block).all(dim=1))
        if len(bad):
            raise DataError(f"{self._path}:{int(rows[int(bad[0])]) + 1}: the vector is not finite, so the file is "
                            "damaged; remove it, and the vectors are computed again")
        return block


class VectorSource:
    """Vectors of texts in blocks, read from the cache or computed. Called by all ranks together."""

    def __init__(self, encoder: TextEncoder, cache: VectorCache | None, digest: str,
                 settings: Mapping[str, object]) -> None:
        """`digest`: the model's. `settings`: JSON values that affect the vectors, besides the prompts."""
        self._encoder, self._cache = encoder, cache
        self._digest, self._settings = digest, settings

    def blocks(self, role: Role, texts: Sequence[str]) -> Iterator[Tensor]:
        """Blocks [texts, dim] float32 on the CPU, the same on every rank.

        Raises:
            EmptyTextError: a text has no tokens; its `row` is the index among all texts.
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
    """Writer of a .npy file. It keeps its error instead of raising it, because the other ranks would wait."""

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
                self._file = self._temporary.open("xb")  # x: does not follow a link at this path
                np.lib.format.write_array_header_1_0(
                    self._file, {"descr": "<f4", "fortran_order": False, "shape": (self._rows, block.shape[1])})
            self._file.write(block.cpu().numpy().astype("<f4").tobytes())
        except OSError as error:
            self.error = error

    def finish(self) -> OSError | None:
        """Rename the complete file. Returns the error, if any."""
        try:
            if self.error is None and self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.rename(self._path)
        except OSError as error:
            self.error = error
        return self.error

    def close(self) -> None:
        """Close the file, and remove it if it is not complete."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _open(path: Path, rows: int) -> "np.ndarray | None":
    """The vectors as a memory-mapped file, or None without a file of that many rows."""
    try:
        vectors = map_npy(str(path))
    except (OSError, ValueError, EOFError, TypeError, OverflowError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == rows and vectors.dtype == np.float32 else None
