"""Search over a file of vectors with FAISS: exact (flat), or approximate by a graph (HNSW, arXiv:1603.09320)."""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.config.json_file import open_ordinary, read_json_file
from megatron_embed.evaluation.ivf_index import IvfIndex
from megatron_embed.evaluation.search import StreamedSearch
from megatron_embed.evaluation.vector_files import VectorFile, load_faiss
from megatron_embed.platform.atomic_file import write_atomic

logger = logging.getLogger(__name__)

@dataclass(frozen=True, kw_only=True)
class HnswSettings:
    """Size and care of a graph: larger values find more of the exact neighbours and take more time."""

    links: int = 32
    """Neighbours of a vector in the graph; the memory of an index grows by 8 bytes times this per vector."""
    ef_construction: int = 200
    """Candidates kept while a vector is added."""
    ef_search: int = 128
    """Candidates kept while a query is answered; at least the number of results."""


def flat_index(vectors: VectorFile) -> Any:
    """FAISS index that compares a query with every vector. Memory: the vectors."""
    index = load_faiss().IndexFlatIP(vectors.width)
    for block in vectors.blocks():
        index.add(block.numpy())
    return index


def hnsw_index(vectors: VectorFile, settings: HnswSettings) -> Any:
    """FAISS index that follows a graph of neighbours, read from beside the vectors or built and written there.

    `VECTORS.npy.hnsw-WIDTH.faiss` is a plain file of FAISS. The .json beside it says what it was built from: the hash
    of the vectors, the similarity and the settings of the graph. If any differs the index is built again.
    """
    path = f"{vectors.path}.hnsw-{vectors.width}.faiss"
    source = {"vectors": vectors.digest(), "rows": len(vectors), "width": vectors.width,
              "similarity": vectors.similarity, **asdict(settings)}
    del source["ef_search"]
    index = _read_index(path, source, vectors)
    if index is None:
        logger.info("%s: adding %d vectors to a graph", path, len(vectors))
        faiss = load_faiss()
        index = faiss.IndexHNSWFlat(vectors.width, settings.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = settings.ef_construction
        for block in vectors.blocks():
            index.add(block.numpy())
        _write_index(path, index, source)
    index.hnsw.efSearch = settings.ef_search
    return index


def _read_index(path: str, source: dict[str, Any], vectors: VectorFile) -> Any | None:
    """The index that was built from this source, if there is one that is complete."""
    try:
        if read_json_file(f"{path}.json") != {**source, "digest": _digest(path)}:
            logger.info("%s: built from other vectors or settings; it is built again", path)
            return None
        index = load_faiss().read_index(path)
        if not _is_graph_of(index, vectors, source["links"]):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError):
        logger.warning("%s: cannot be read; it is built again", path)
        return None
    return index


def _digest(path: str) -> str:
    """Hash of an index's file."""
    with open_ordinary(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_graph_of(index: Any, vectors: VectorFile, links: int) -> bool:
    """Whether an index that was read is a graph of these vectors in their order, whose links lead to none but them."""
    faiss = load_faiss()
    if type(index).__name__ != "IndexHNSWFlat" or (index.ntotal, index.d, index.metric_type) != (
            len(vectors), vectors.width, faiss.METRIC_INNER_PRODUCT):
        return False
    storage, graph = faiss.downcast_index(index.storage), index.hnsw
    if not isinstance(storage, faiss.IndexFlat) or (storage.ntotal, storage.d, graph.nb_neighbors(0)) != (
            len(vectors), vectors.width, 2 * links):
        return False
    levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets)
    neighbors, sizes = faiss.vector_to_array(graph.neighbors), faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if len(levels) != len(vectors) or len(offsets) != len(vectors) + 1 or levels.min() < 1 or (
            levels.max() >= len(sizes) or graph.max_level != levels.max() - 1):
        return False
    if not 0 <= graph.entry_point < len(vectors) or levels[graph.entry_point] != levels.max() or offsets[0] != 0 or (
            offsets[-1] != len(neighbors) or bool((np.diff(offsets) != sizes[levels]).any())):
        return False
    if len(neighbors) and not (neighbors.min() >= -1 and neighbors.max() < len(vectors)):
        return False
    first = 0
    for block in vectors.blocks():
        if not np.array_equal(storage.reconstruct_n(first, len(block)), block.numpy()):
            return False
        first += len(block)
    return True


def _write_index(path: str, index: Any, source: dict[str, Any]) -> None:
    """Write the index and then its description; a warning if the disk is full, since the search needs no file."""
    faiss = load_faiss()
    with contextlib.suppress(OSError):
        os.remove(f"{path}.json")  # first: an index never stands beside the description of another
    error = write_atomic("--vectors", path, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)),
                         binary=True)
    if error is None:
        described = {**source, "digest": _digest(path)}
        error = write_atomic("--vectors", f"{path}.json", lambda file: json.dump(described, file))
    if error is None:
        logger.info("%s: built, and reused by the next search", path)
    else:
        logger.warning("the index is not kept: %s", error)


def search_index(index: Any, queries: Tensor, k: int, order: NDArray[np.int64], *,
                 exact: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k rows of largest dot product with each query, best first, in `evaluate`'s order.

    Of equal scores the row that `order` puts last comes first, also at the cutoff of an exact index.

    Args:
        index: of FAISS.
        queries: [queries, width], scaled as the index's vectors.
        order: [rows], position of each row in the ascending order of the documents' ids.
        exact: whether equal scores at the cutoff are looked for.
    Returns:
        Scores [queries, min(k, rows)] and rows; of an HNSW index that found fewer, -1 in the last places.
    """
    k, depth, rows_in_all = min(k, index.ntotal), k, index.ntotal
    while True:
        depth = min(depth + 1 if exact else k, rows_in_all)
        scores, rows = index.search(queries.numpy(), depth)
        if not exact or depth == rows_in_all or bool((scores[:, k - 1] > scores[:, -1]).all()):
            break
        depth *= 2  # as many rows as have the score of the k-th are needed to choose among them
    ties = np.where(rows < 0, -1, order[rows])
    best = np.lexsort((-ties, -(scores + np.float32(0))), axis=1)[:, :k]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)


def search_lists(index: IvfIndex, queries: Tensor, k: int, order: NDArray[np.int64],
                 vectors: VectorFile) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`search_index` of inverted lists, whose rows are scored again with the vectors of the file."""
    _, rows = index.search(queries, min(k, len(vectors)))
    scores = vectors.scores_of(queries, rows)
    best = np.lexsort((-np.where(rows < 0, -1, order[rows]), -scores), axis=1)
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)


def recall_of(scores: NDArray[np.float32], queries: Tensor, vectors: VectorFile) -> float:
    """Share of the exact k nearest that an approximate search found, mean over the queries.

    Args:
        scores: [queries, k] of the approximate search. A row counts as found if its score is at least the k-th of the
            exact search, to within rounding, so that either of two equal documents will do.
        queries: [queries, width], scaled.
    """
    exact = StreamedSearch(queries, scores.shape[1])
    for block in vectors.blocks():
        exact.add(block)
    last = exact.result()[0][:, -1:].numpy()
    return float((scores >= last - 1e-5 * np.abs(last)).mean())
