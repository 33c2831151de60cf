"""Approximate search by inverted lists (IVF; Jegou et al. 2011), in parts beside the vectors that are memory-mapped.

The vectors are divided among lists by their nearest centroid; a query looks into the lists of the nearest centroids.
A part holds the lists of some of the vectors, in float16, and is a plain file of FAISS. A build that was killed resumes
with the next part, and several processes build parts side by side.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.config.json_file import open_ordinary, read_json_file
from megatron_embed.errors import ConfigError, DataError, UserError
from megatron_embed.evaluation.vector_files import ROWS_AT_ONCE, VectorFile, load_faiss, say_progress
from megatron_embed.platform.atomic_file import write_atomic

logger = logging.getLogger(__name__)

PART_ROWS = 1 << 19
"""Vectors of a part: what a killed build adds again at most, and, in float16, what it holds in memory."""
_TRAINING_ROWS = 64
"""Vectors that a centroid is computed from, on average."""
_LEAST_TRAINING_ROWS = 39
"""FAISS warns of fewer."""
_ITERATIONS = 10
_SOURCE, _CENTROIDS = "index.json", "centroids.faiss"

Agree = Callable[[UserError | None], None]
"""Raises the error of any rank on all ranks; one process: its own."""


@dataclass(frozen=True, kw_only=True)
class IvfSettings:
    """Number of lists, and of those that a query looks into; more find more of the exact neighbours and take longer."""

    lists: int | None = None
    """None: about the square root of the number of vectors."""
    probes: int | None = None
    """None: a sixteenth of the lists, at least 16."""

    def number_of_lists(self, rows: int) -> int:
        """Lists of an index of so many vectors."""
        wanted = self.lists or 1 << round(math.log2(max(1, rows)) / 2)
        return max(1, min(wanted, rows // _LEAST_TRAINING_ROWS))


def raise_error(error: UserError | None) -> None:
    """Agree, of one process."""
    if error is not None:
        raise error


class IvfIndex:
    """Inverted lists of a file of vectors, `VECTORS.ivf-WIDTH/`, built where they are not there.

    Args:
        vectors: whose `scaled` rows are indexed.
        rank, size: of the processes that build parts side by side.
        agree: called by all of them alike.
    Raises:
        ConfigError: the index cannot be written beside the vectors.
    """

    def __init__(self, vectors: VectorFile, settings: IvfSettings, *, rank: int = 0, size: int = 1,
                 agree: Agree = raise_error) -> None:
        self._vectors, self._faiss = vectors, load_faiss()
        self._folder = Path(f"{vectors.path}.ivf-{vectors.width}")
        self.lists = settings.number_of_lists(len(vectors))
        self.probes = min(self.lists, settings.probes or max(16, self.lists // 16))
        self._parts = range(-(-len(vectors) // PART_ROWS))
        agree(self._kept(self._prepare) if rank == 0 else None)
        error = None
        missing = [part for part in self._parts[rank::size] if not self._file(part).is_file()]
        started = time.monotonic()
        for done, part in enumerate(missing, start=1):
            if (error := error or self._kept(lambda part=part: self._build(part))) is None and rank == 0:
                say_progress(done, len(missing), started, f"{self._folder}: parts of {PART_ROWS:,} vectors")
        agree(error)
        self._indexes: list[Any] = []
        agree(self._kept(self._open))

    def search(self, queries: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores [queries, k] and rows of about the k largest dot products, best first; -1 in places that stay empty.

        `queries`: [queries, width], scaled as the vectors.
        """
        scores: NDArray[np.float32] = np.empty((len(queries), 0), dtype=np.float32)
        rows: NDArray[np.int64] = np.empty((len(queries), 0), dtype=np.int64)
        parameters = self._faiss.SearchParametersIVF(nprobe=self.probes)
        for part, index in zip(self._parts, self._indexes, strict=True):
            new_scores, new_rows = index.search(queries.float().cpu().numpy(), k, params=parameters)
            first, end = part * PART_ROWS, min(len(self._vectors), (part + 1) * PART_ROWS)
            if not ((new_rows == -1) | ((first <= new_rows) & (new_rows < end))).all():
                raise ConfigError(f"{self._file(part)}: damaged: it names vectors that are not of this part; remove "
                                  f"{self._folder}, and it is built again")
            if not np.isfinite(new_scores[new_rows >= 0]).all():
                raise ConfigError(f"{self._file(part)}: damaged: it gives scores that are not finite; remove "
                                  f"{self._folder}, and it is built again")
            scores, rows = np.concatenate([scores, new_scores], axis=1), np.concatenate([rows, new_rows], axis=1)
            best = np.lexsort((-rows, -np.where(rows < 0, -np.inf, scores)), axis=1)[:, :k]
            scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        return scores, rows

    def _open(self) -> None:
        flags = self._faiss.IO_FLAG_MMAP | self._faiss.IO_FLAG_READ_ONLY
        for part in self._parts:
            rows = min(PART_ROWS, len(self._vectors) - part * PART_ROWS)
            self._indexes.append(self._read(self._file(part), rows, flags))

    def _read(self, file: Path, rows: int, flags: int = 0) -> Any:
        """The lists in a file. Raises ConfigError if they are not such lists of so many vectors."""
        try:
            open_ordinary(file).close()  # FAISS would wait for what a pipe gives
            index = self._faiss.read_index(str(file), flags)
        except (OSError, RuntimeError):
            index = None
        if not isinstance(index, self._faiss.IndexIVFScalarQuantizer) or (
                index.ntotal, index.d, index.nlist, index.metric_type, index.quantizer.ntotal) != (
                    rows, self._vectors.width, self.lists, self._faiss.METRIC_INNER_PRODUCT, self.lists):
            raise ConfigError(f"{file}: is not the index of {self._vectors.path}; remove {self._folder}, which is "
                              "built again")
        return index

    def _file(self, part: int) -> Path:
        return self._folder / f"{part:06d}.faiss"

    def _kept(self, work: Callable[[], None]) -> UserError | None:
        """The error of some work, kept because other ranks would wait."""
        try:
            work()
        except UserError as error:
            return error
        except OSError as error:
            return ConfigError(f"{self._folder}: cannot be written ({error.strerror or error}); free space there, or "
                               "put the vectors where there is some")
        return None

    def _prepare(self) -> None:
        """Compute the centroids, unless the folder holds those of the same vectors."""
        source = {"vectors": self._vectors.stamps(), "width": self._vectors.width, "lists": self.lists,
                  "similarity": self._vectors.similarity, "part_rows": PART_ROWS}
        try:
            if read_json_file(self._folder / _SOURCE) == json.loads(json.dumps(source)):
                return
            logger.info("%s: built from other vectors or settings; it is built again", self._folder)
        except (OSError, ValueError):
            pass
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        count = min(len(self._vectors), _TRAINING_ROWS * self.lists)
        logger.info("%s: computing %d centroids from %d of %d vectors", self._folder, self.lists, count,
                    len(self._vectors))
        faiss, width = self._faiss, self._vectors.width
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, self.lists, faiss.ScalarQuantizer.QT_fp16,
                                              faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.max_points_per_centroid = _ITERATIONS, _TRAINING_ROWS
        index.cp.spherical = self._vectors.similarity == "cosine"
        chosen = np.sort(np.random.default_rng(0).choice(len(self._vectors), count, replace=False))
        index.train(self._vectors.scaled(self._vectors.gather(chosen)).numpy())
        self._write(self._folder / _CENTROIDS, index)
        error = write_atomic("--vectors", str(self._folder / _SOURCE), lambda file: json.dump(source, file))
        if error is not None:
            raise error

    def _build(self, part: int) -> None:
        index = self._read(self._folder / _CENTROIDS, 0)
        end = min(len(self._vectors), (part + 1) * PART_ROWS)
        for start in range(part * PART_ROWS, end, ROWS_AT_ONCE):
            rows = np.arange(start, min(start + ROWS_AT_ONCE, end), dtype=np.int64)
            block = self._vectors.scaled(self._vectors.rows(start, start + len(rows)))
            self._require_float16(block, start)
            index.add_with_ids(block.numpy(), rows)
        self._write(self._file(part), index)

    def _require_float16(self, block: Tensor, start: int) -> None:
        """Raises DataError for the first vector, of rows from `start`, that is infinite as the lists hold it."""
        largest = block.abs().amax(dim=1)
        bad = (largest > np.finfo(np.float16).max).nonzero()
        if len(bad):
            row = int(bad[0])
            raise DataError(f"{self._vectors.path}:{start + row + 1}: a component of {float(largest[row]):g} is too "
                            "large for the lists of --index ivf, which hold float16; choose --index flat or hnsw, or "
                            "--similarity cosine if the model compares so")

    def _write(self, path: Path, index: Any) -> None:
        error = write_atomic("--vectors", str(path), lambda file: self._faiss.write_index(
            index, self._faiss.PyCallbackIOWriter(file.write)), binary=True)
        if error is not None:
            raise error
