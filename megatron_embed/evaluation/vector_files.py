"""Vectors on the disk: a .npy file, or a directory of them (shards), written one after the other and memory-mapped."""

import hashlib
import json
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import ConfigError, DataError, UserError
from megatron_embed.evaluation.npy_file import map_npy
from megatron_embed.evaluation.search import for_similarity
from megatron_embed.evaluation.stored_vectors import as_dtype
from megatron_embed.names import Similarity, VectorDtype
from megatron_embed.platform.atomic_file import write_atomic

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 65536
"""Vectors read and scaled together."""
SHARD_BYTES = 256 << 20
"""Size of a shard: what a killed `encode` computes again at most."""
SUMMARY = "vectors.json"
"""File of a directory of shards that says how many rows there are to be, and what they are."""
_ROWS_MULTIPLE = 4096


def load_faiss() -> ModuleType:
    """The library. Raises ConfigError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("search needs the library FAISS; install it: pip install 'megatron_embed[search]'") from error
    library: ModuleType = faiss
    return library


def are_vectors(path: str) -> bool:
    """Whether a path is of vectors that `encode` has written, and not of a model."""
    return path.endswith(".npy") or (os.path.isdir(path) and any(Path(path).glob("*.npy")))


class VectorFile:
    """The vectors of a .npy file or of all .npy files of a directory, in the order of their names, memory-mapped.

    Attributes:
        width: first components that are compared.
    """

    def __init__(self, path: str, key: str, *, similarity: Similarity, width: int | None = None) -> None:
        """
        Args:
            key: names the file in messages.
            width: None: all components.
        Raises:
            ConfigError: the file is not an array of vectors, a directory is not complete, or there are fewer components
                than `width`.
        """
        self.path, self.similarity, self._key = path.rstrip("/"), similarity, key
        self._files = sorted(
            str(file) for file in Path(path).glob("*.npy") if not file.name.startswith(".")) if os.path.isdir(
                path) else [path]
        if not self._files:
            raise ConfigError(f"{key} {path}: a directory without .npy files; name what `megatron-embed encode` wrote",
                              key=key)
        self._arrays = [self._mapped(file) for file in self._files]
        self._ends = list(accumulate(map(len, self._arrays)))
        self._require_equal_shapes()
        full = self._arrays[0].shape[1]
        self.width = full if width is None else width
        if self.width > full:
            raise ConfigError(f"--dim {width}: the vectors of {path} have {full} components; choose 1 to {full}",
                              key="--dim")

    def _mapped(self, file: str) -> NDArray[Any]:
        key = self._key
        try:
            array = map_npy(file)
        except (OSError, ValueError, EOFError, TypeError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .npy file of numbers"
            raise ConfigError(f"{key} {file}: {reason}; name the file that `megatron-embed encode` wrote",
                              key=key) from None
        if isinstance(array, np.ndarray) and array.dtype in (np.int8, np.uint8):
            raise ConfigError(f"{key} {file}: holds codes of vectors ({array.dtype}), for other programs to search; "
                              "encode the texts with --output-dtype float32 or float16 for this one", key=key)
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.size:
            raise ConfigError(f"{key} {file}: holds no vectors [texts, dim] of floating-point numbers; name the file "
                              "that `megatron-embed encode` wrote", key=key)
        return array

    def _require_equal_shapes(self) -> None:
        for file, array in zip(self._files, self._arrays, strict=True):
            if array.shape[1] != self._arrays[0].shape[1]:
                raise ConfigError(f"{self._key} {file}: vectors of {array.shape[1]} components beside others of "
                                  f"{self._arrays[0].shape[1]}; a directory holds the vectors of one model",
                                  key=self._key)
        rows = read_summary(self.path, self._key).get("rows")
        if rows not in (None, len(self)):
            raise ConfigError(f"{self._key} {self.path}: {len(self)} of {rows} vectors are there; run the same "
                              "`megatron-embed encode` again, which encodes the others", key=self._key)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def full_width(self) -> int:
        """Components of a vector in the file."""
        return int(self._arrays[0].shape[1])

    def row(self, index: int) -> Tensor:
        """[full width] float32, as in the file."""
        return self.rows(index, index + 1)[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, full width] float32, as in the file. Raises DataError for a vector that is not finite."""
        pieces = []
        for shard in range(bisect_right(self._ends, start), len(self._arrays)):
            first = self._ends[shard - 1] if shard else 0
            if first >= stop:
                break
            pieces.append(self._arrays[shard][max(0, start - first) : stop - first].astype(np.float32))
        block = torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
        self._require_finite(block, range(start, stop))
        return block

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows), full width] float32 of these rows, in any order. Raises DataError as `rows`."""
        shards = np.searchsorted(np.asarray(self._ends), rows, side="right")
        block = np.empty((len(rows), self._arrays[0].shape[1]), dtype=np.float32)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            here = here[np.argsort(rows[here])]  # the disk is read in its order
            block[here] = self._arrays[shard][rows[here] - (self._ends[shard - 1] if shard else 0)]
        tensor = torch.from_numpy(block)
        self._require_finite(tensor, rows)
        return tensor

    def _require_finite(self, block: Tensor, rows: Sequence[int] | NDArray[np.int64]) -> None:
        bad = torch.nonzero(~torch.isfinite(block).all(dim=1))
        if len(bad):
            row = int(rows[int(bad[0])])
            shard = bisect_right(self._ends, row)
            place = "" if len(self._files) == 1 else (
                f" ({os.path.basename(self._files[shard])}, row {row + 1 - (self._ends[shard - 1] if shard else 0)})")
            raise DataError(f"{self.path}:{row + 1}: the vector is not finite{place}; encode the texts again, with a "
                            "wider dtype or an earlier checkpoint")

    def scaled(self, vectors: Tensor) -> Tensor:
        """[rows, width] float32 whose dot products are the similarity, of [rows, full width]."""
        return for_similarity(vectors[:, : self.width].float(), self.similarity)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, `scaled`, up to ROWS_AT_ONCE at a time. Raises DataError for a vector that is not finite."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.scaled(self.rows(start, min(start + ROWS_AT_ONCE, len(self))))

    def scores_of(self, queries: Tensor, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[queries, k] dot products of scaled queries with these rows, [queries, k]; with no row (-1), minus
        infinity."""
        vectors = self.scaled(self.gather(np.maximum(rows, 0).reshape(-1))).view(*rows.shape, -1)
        scores: NDArray[np.float32] = torch.einsum("qkw,qw->qk", vectors, queries).numpy()
        return np.where(rows < 0, np.float32(-np.inf), scores)

    def stamps(self) -> list[list[Any]]:
        """Name, size and time of change of each file."""
        return [[os.path.basename(name), os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in self._files]

    def digest(self) -> str:
        """Hash of the vectors' files."""
        whole = hashlib.blake2b(digest_size=16)
        for name in self._files:
            with open(name, "rb") as file:
                own = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            if len(self._files) == 1:
                return own.hexdigest()
            whole.update(own.digest())
        return whole.hexdigest()


def read_summary(directory: str, key: str) -> dict[str, Any]:
    """The summary of a directory of shards; empty for a file, or a directory without one.

    Returns:
        Values of which `rows`, if it is there, is a whole number, and `texts` the path, size and time of change of the
        file of texts that were encoded.
    Raises:
        ConfigError: it is damaged.
    """
    file = Path(directory) / SUMMARY
    try:
        values = read_json_file(file)
        if not isinstance(values, dict):
            raise ValueError("must be an object")
        texts, rows = values.get("texts", ["", 0, 0]), values.get("rows", 0)
        if type(rows) is not int:
            raise ValueError(f"rows = {rows!r:.40} must be a whole number")
        if not isinstance(texts, list) or list(map(type, texts)) != [str, int, int]:
            raise ValueError("texts must be the path, size and time of change of a file")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} {directory}: {SUMMARY} cannot be read ({error}); encode the texts again, or remove "
                          "it if all vectors are there", key=key) from None
    return values


class ShardWriter:
    """A directory of shards that is written, in any number of starts, by several processes.

    Args:
        directory: may hold shards of an earlier start.
        settings: all that decides the vectors, as JSON takes it.
        rows, dim: of all vectors together.
        dtype: of the vectors on the disk.
        ranges: [2, dim] of int8 and uint8.
        is_first: whether this process makes the directory, which the others then have to find.
    Raises:
        ConfigError: the directory cannot be written, or holds something else.
    """

    def __init__(self, directory: str, settings: Mapping[str, Any], *, rows: int, dim: int,
                 dtype: VectorDtype = "float32", ranges: NDArray[np.float32] | None = None,
                 is_first: bool = True) -> None:
        self._directory, self._rows = Path(directory), rows
        self._dtype, self._ranges = dtype, ranges
        row_bytes = as_dtype(torch.zeros(1, dim), dtype, ranges).nbytes
        self._shard_rows = max(1, SHARD_BYTES // row_bytes // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        described = json.loads(json.dumps({"rows": rows, "dim": dim, "dtype": dtype, "shard_rows": self._shard_rows,
                                           **settings}))
        summary = self._directory / SUMMARY
        if not is_first and not summary.is_file():
            raise ConfigError(f"--output {directory}: is not the same directory on all nodes; name one on a shared "
                              "file system", key="--output")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if summary.is_file():
                self._require_equal(read_summary(directory, "--output"), described)
            elif any(self._directory.iterdir()):
                raise ConfigError(f"--output {directory}: holds files that are no vectors; name another directory",
                                  key="--output")
            else:
                error = write_atomic("--output", str(summary), lambda file: json.dump(described, file, indent=1))
                if error is not None:
                    raise error
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise ConfigError(f"--output {directory}: cannot be written ({error}); choose another directory",
                              key="--output") from error

    def _require_equal(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name, value in now.items():
            if before.get(name) != value:
                raise ConfigError(f"--output {self._directory}: holds vectors with {name} = {before.get(name)!r}, and "
                                  f"these have {value!r}; name another directory, or remove it", key="--output")

    @property
    def shards(self) -> list[range]:
        """The rows of each shard."""
        return [range(start, min(start + self._shard_rows, self._rows))
                for start in range(0, self._rows, self._shard_rows)]

    def path(self, shard: int) -> Path:
        """The shard's file."""
        return self._directory / f"{shard:06d}.npy"

    def missing(self) -> list[int]:
        """Shards that are not there yet: a file with its final name is whole."""
        return [shard for shard in range(len(self.shards)) if not self.path(shard).is_file()]

    def write(self, shard: int, vectors: Tensor) -> UserError | None:
        """Write a shard, complete or not at all; the error if it cannot be written."""
        try:
            array = as_dtype(vectors, self._dtype, self._ranges)
        except UserError as error:
            return error
        return write_atomic("--output", str(self.path(shard)), lambda file: np.save(file, array), binary=True)


def say_progress(done: int, total: int, started: float, what: str) -> None:
    """Log how much is done, and about how long the rest takes."""
    seconds = (time.monotonic() - started) / done * (total - done)
    hours, minutes = divmod(round(seconds / 60), 60)
    logger.info("%s: %d of %d; about %s to go", what, done, total,
                f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s")


def write_shards(writer: ShardWriter, missing: Sequence[int], encode: Callable[[range], Tensor], *, rank: int,
                 world_size: int, agree: Callable[[UserError | None], None]) -> None:
    """Encode and write what is missing. Called by all ranks.

    Args:
        missing: the shards, the same on all ranks.
        encode: the vectors of these rows, on every rank. Called by all ranks.
        agree: raises any rank's error on all ranks.
    """
    started, shards = time.monotonic(), writer.shards
    for done, shard in enumerate(missing, start=1):
        vectors = encode(shards[shard])
        agree(writer.write(shard, vectors) if shard % world_size == rank else None)
        if rank == 0:
            say_progress(done, len(missing), started, f"shards of {shards[0].stop:,} vectors")
