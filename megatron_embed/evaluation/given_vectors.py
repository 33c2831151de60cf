"""The vectors of a corpus that were written before, and the search over them: exact, or by an index beside them."""

import argparse
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.ivf_index import IvfIndex, IvfSettings
from megatron_embed.evaluation.search import StreamedSearch
from megatron_embed.evaluation.vector_files import VectorFile
from megatron_embed.evaluation.vector_index import HnswSettings, hnsw_index
from megatron_embed.names import IndexKind, Similarity
from megatron_embed.parallel.collectives import gather_objects, raise_on_all_ranks, rank_and_size

logger = logging.getLogger(__name__)

EXACT_ROWS = 10_000_000
"""Vectors up to which every one is compared unless --index says otherwise."""
RECALL_QUERIES = 64
"""Queries, of all ranks together, that are searched exactly besides, to know the recall of an index."""


class Index(Protocol):
    """An approximate search."""

    def search(self, queries: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores [queries, k] and rows, best first; -1 in places that stay empty."""


class _Graph:
    """An HNSW index of FAISS."""

    def __init__(self, index: Any, ef_search: int) -> None:
        self._index, self._ef_search = index, ef_search

    def search(self, queries: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        self._index.hnsw.efSearch = max(self._ef_search, k)
        scores, rows = self._index.search(queries.float().cpu().numpy(), k)
        return scores, rows


@dataclass(frozen=True, kw_only=True)
class GivenVectors:
    """Vectors of a corpus, and how they are searched."""

    vectors: VectorFile
    kind: IndexKind
    index: Index | None
    """None: every vector is compared."""

    def report_recall(self, queries: Tensor, k: int, group: dist.ProcessGroup | None) -> None:
        """Log the share of the exact k nearest that the index finds for some queries. Called by all ranks; one gather.

        `queries`: this rank's, [queries, width], scaled.
        """
        if self.index is None:
            return
        rank, size = rank_and_size(group)
        count = min(len(queries), -(-RECALL_QUERIES // size))
        chosen, found = queries[torch.linspace(0, len(queries) - 1, count).round().long()].cpu(), 0.0
        if count:
            exact = StreamedSearch(chosen, k)
            for block in self.vectors.blocks():
                exact.add(block)
            last = exact.result()[0][:, -1:].numpy()
            _, rows = self.index.search(chosen, min(k, len(self.vectors)))
            found = float((self.vectors.scores_of(chosen, rows) >= last - 1e-5 * np.abs(last)).sum())
        results = gather_objects((found, count), group)
        asked, width = sum(number for _, number in results), min(k, len(self.vectors))
        if rank == 0 and asked:
            logger.info("recall@%d of --index %s against the exact search: %.4f (%d queries)", width, self.kind,
                        sum(share for share, _ in results) / asked / width, asked)


def open_given_vectors(args: argparse.Namespace, *, rows: int, dim: int, similarity: Similarity,
                       what: str) -> GivenVectors | None:
    """The vectors of --vectors with their index, which is built where it is not there; None without the option. Called
    by all ranks.

    Args:
        args: the options of `add_given_vectors`.
        rows, dim: of the corpus and the model, which the vectors must have.
        what: names the corpus in messages.
    Raises:
        ConfigError: on all ranks alike.
    """
    if args.vectors is None:
        return None
    vectors, key = VectorFile(args.vectors, "--vectors", similarity=similarity), f"--vectors {args.vectors}"
    if len(vectors) != rows:
        raise ConfigError(f"{key}: {len(vectors)} vectors for the {rows} rows of {what}; name what `encode` wrote of "
                          "that file", key="--vectors")
    if vectors.full_width != dim:
        raise ConfigError(f"{key}: vectors of {vectors.full_width} components, and the model's have {dim}; name the "
                          "model that encoded them", key="--vectors")
    kind: IndexKind = args.index or ("flat" if rows <= EXACT_ROWS else "ivf")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        logger.info("%s: %d vectors, searched by --index %s%s", args.vectors, rows, kind, "" if args.index else
                    f" (the default up to {EXACT_ROWS:,} vectors is flat, above ivf)")
    index: Index | None = None
    if kind == "ivf":
        index = IvfIndex(vectors, IvfSettings(probes=args.probes), rank=rank, size=size, agree=raise_on_all_ranks)
    elif kind == "hnsw":
        index = _open_graph(vectors, args.ef_search or HnswSettings().ef_search, is_first=rank == 0)
    return GivenVectors(vectors=vectors, kind=kind, index=index)


def _open_graph(vectors: VectorFile, ef_search: int, *, is_first: bool) -> Index:
    """The graph, which the first rank builds and the others then read."""
    graph = hnsw_index(vectors, HnswSettings()) if is_first else None
    raise_on_all_ranks(None)
    return _Graph(hnsw_index(vectors, HnswSettings()) if graph is None else graph, ef_search)
