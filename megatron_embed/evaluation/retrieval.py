"""Retrieval metrics on a BEIR set as trec_eval defines them: nDCG@k, MRR@k, recall@k, precision@k, MAP."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytrec_eval
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.data.corpus import Picked
from megatron_embed.errors import ConfigError, EmptyTextError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.finite import require_finite
from megatron_embed.evaluation.given_vectors import GivenVectors
from megatron_embed.evaluation.rerank_stage import RerankStage, rerank_scores
from megatron_embed.evaluation.search import StreamedSearch, for_similarity
from megatron_embed.evaluation.stored_vectors import CALIBRATION_VECTORS, Ranges, bits, precision_prefixes, ranges_of
from megatron_embed.losses.precision import int8_values
from megatron_embed.names import Precision, Role, Similarity
from megatron_embed.parallel.collectives import gather_objects, rank_and_size

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]
Embed = Callable[[Sequence[str], Role], Tensor]

CUTOFFS = (1, 3, 5, 10, 100)
METRICS = ("map", *(f"{measure}@{k}" for k in CUTOFFS for measure in ("ndcg", "mrr", "recall", "precision")))
"""Names of the metrics of one ranking."""
QUERIES_PER_BLOCK = 512
"""Queries whose rankings are in memory at once: 512 x 1000 entries of a Python dict are about 100 MB."""
DOCUMENTS_AT_ONCE = 4096
"""Documents per rank that are embedded together: enough to sort well by length, few enough for memory."""


def metrics_per_query(qrels: Qrels, run: Run, *, ks: Sequence[int] = CUTOFFS) -> dict[str, dict[str, float]]:
    """`retrieval_metrics` for each query of `qrels`."""
    cuts = ",".join(map(str, ks))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", "map"})
    results = evaluator.evaluate(run)
    metrics = {}
    for query, labels in qrels.items():
        result = results.get(query, {})
        reciprocal_ranks = _reciprocal_ranks(labels, run.get(query, {}), ks)
        values = {"map": result.get("map", 0.0)}
        for k, reciprocal_rank in zip(ks, reciprocal_ranks, strict=True):
            values[f"ndcg@{k}"] = result.get(f"ndcg_cut_{k}", 0.0)
            values[f"mrr@{k}"] = reciprocal_rank
            values[f"recall@{k}"] = result.get(f"recall_{k}", 0.0)
            values[f"precision@{k}"] = result.get(f"P_{k}", 0.0)
        metrics[query] = values
    return metrics


def _reciprocal_ranks(labels: dict[str, int], scores: dict[str, float], ks: Sequence[int]) -> list[float]:
    """1 / rank of the first relevant document in trec_eval's order, or 0 if it comes after k, for each k."""
    # trec_eval compares scores as float32 and then ids, both descending.
    ranked = sorted(scores, key=lambda document: (np.float32(scores[document]), document), reverse=True)
    first = next((rank for rank, document in enumerate(ranked, 1) if labels.get(document, 0) > 0), None)
    return [1.0 / first if first is not None and first <= k else 0.0 for k in ks]


def retrieval_metrics(qrels: Qrels, run: Run, *, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means of `ndcg@k`, `mrr@k`, `recall@k`, `precision@k` for each k, and of `map`, as trec_eval defines them.

    The mean is over every query of `qrels`: one that is missing from the run, or that has no relevant document, counts
    as 0 (pytrec_eval ignores the first kind). Queries of the run that `qrels` lacks are ignored. Relevant means a label
    > 0; nDCG's gain is the label; a document without a label is not relevant. Equal scores, compared as float32, are
    ordered by document id, descending. `map` covers the whole run, whatever its depth.

    Args:
        qrels: query id -> document id -> label.
        run: query id -> document id -> score, larger is better.
        ks: the cutoffs, each >= 1.
    """
    return mean_metrics(metrics_per_query(qrels, run, ks=ks))


def mean_metrics(per_query: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the queries."""
    names = next(iter(per_query.values()))
    return {name: math.fsum(values[name] for values in per_query.values()) / len(per_query) for name in names}


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Rankings that are measured in addition to the one by full vectors."""

    dims: tuple[int, ...] = ()
    """One ranking each, by vectors truncated to this many dimensions (matryoshka, arXiv:2205.13147)."""
    two_stage: int | None = None
    """One more ranking: the best `candidates` by vectors of this width, ordered by full vectors."""
    candidates: int = 100
    """Documents that the first of two stages finds, of a query."""
    precisions: tuple[Precision, ...] = ()
    """One ranking each, at every width: of documents in int8 by the query as it is; by Hamming distances of signs; the
    best `candidates` of these, ordered by the query as it is."""
    ranges: Ranges = field(default_factory=dict)
    """Ranges of int8 by width; without one, those of the first CALIBRATION_VECTORS documents by id."""
    rerank: RerankStage | None = None
    """Further rankings: the best documents in a reranker's order."""

    def check(self, full: int) -> None:
        """Raise ConfigError for a width that vectors of `full` dimensions do not have."""
        for key, width in (*(("--dims", width) for width in self.dims), ("--two-stage", self.two_stage)):
            if width is not None and not 1 <= width <= full:
                raise ConfigError(f"{key} {width}: the model's vectors have {full} dimensions; choose 1 to {full}")


def evaluate_retrieval(embed: Embed, data: BeirData, *, k: int = 1000, similarity: Similarity = "cosine",
                       rankings: Rankings | None = None, group: dist.ProcessGroup | None = None,
                       device: torch.device | None = None) -> dict[str, float]:
    """Means over all queries of `evaluate_queries`, which documents the arguments."""
    return mean_metrics(evaluate_queries(embed, data, k=k, similarity=similarity, rankings=rankings, group=group,
                                         device=device))


def evaluate_queries(embed: Embed, data: BeirData, *, k: int = 1000, similarity: Similarity = "cosine",
                     rankings: Rankings | None = None, group: dist.ProcessGroup | None = None,
                     device: torch.device | None = None,
                     given: GivenVectors | None = None) -> dict[str, dict[str, float]]:
    """Metrics of each query, in the order of the set, by search with these embeddings over the whole corpus.

    Metric names begin with `dim_WIDTH/` for a truncated width, `int8/`, `binary/` and `rescore/` (behind the width) for
    a precision, `two_stage_WIDTH/` for two stages and `reranked/` for a reranker's order. With `data.drop_own_id`, no
    ranking contains the document with the query's own id. `map` covers the k documents retrieved. Documents are read,
    embedded, searched and released in blocks; the queries with their best documents and the ids stay in memory.

    Args:
        embed: texts and their role -> [texts, dim], in order. Called by all ranks of the group, once for the queries
            and once per block of documents, which come as a sequence that reads each text on access.
        data: corpus, queries and labels.
        k: documents retrieved per query (all if the corpus is smaller), >= 100 for `recall@100`; 1000 is the depth
            that BEIR and MTEB use for `map`.
        similarity: cosine L2-normalizes every embedding in float32 first.
        rankings: rankings to measure in addition.
        device: device of the search; None: the embeddings' own.
        group: ranks that split the queries; one all-gather of metrics per ranking. None: no split.
        given: the documents' vectors, in the order of the corpus, which are then not computed. With an index the search
            is approximate, and there is the ranking by full vectors alone, and a reranker's.
    Returns:
        Query id -> metric -> value, the same on every rank and for every number of ranks.
    Raises:
        UserError: an embedding is not finite, or a text has no tokens.
    """
    if k < max(CUTOFFS):
        raise ValueError(f"k = {k}: the metrics look at the first {max(CUTOFFS)} documents")
    rankings = rankings or Rankings()
    # With ascending ids, the search's rule for equal scores is trec_eval's, at the cutoff too.
    order = array("q", sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__))
    queries = _embedded(embed, data.query_texts, "query", data.query_ids, data)
    rankings.check(queries.shape[1])
    rank, size = rank_and_size(group)
    own = own_document_columns(data, order)[rank::size] if data.drop_own_id else None
    if given is not None and given.index is not None:
        results = {"": _by_index(given, queries[rank::size], k, order, own, group)}
    else:
        searches = _searches(queries[rank::size].to(device or queries.device), k, similarity, rankings, own)
        for documents in _document_blocks(embed, data, order, DOCUMENTS_AT_ONCE * size, given):
            for search in searches.values():
                search.add(documents)
        results = {prefix: search.result() for prefix, search in searches.items()}
    if (stage := rankings.rerank) is not None:
        scores, indices = (part[:, : stage.candidates] for part in results[""])
        new_scores = rerank_scores(stage, scores, indices, data.query_texts, Picked(data.document_texts, order), group)
        results |= {prefix: (values, indices) for prefix, values in new_scores.items()}
    return metrics_of_all_ranks(results, data, Picked(data.document_ids, order), group)


def metrics_of_all_ranks(results: dict[str, tuple[Tensor, Tensor]], data: BeirData, document_ids: Sequence[str],
                          group: dist.ProcessGroup | None) -> dict[str, dict[str, float]]:
    """Metrics of every query from each rank's scores and indices, in the order of the set.

    This order makes their mean independent of the number of ranks.
    """
    rank, size = rank_and_size(group)
    metrics: dict[str, dict[str, float]] = {query: {} for query in data.query_ids}
    for prefix, result in results.items():
        shares = gather_objects(_metrics_of(*result, data.query_ids[rank::size], document_ids, data), group)
        for index, query in enumerate(data.query_ids):
            metrics[query] |= {f"{prefix}{name}": value for name, value in shares[index % size][query].items()}
    return metrics


def _document_blocks(embed: Embed, data: BeirData, order: Sequence[int], size: int,
                     given: GivenVectors | None) -> Iterator[Tensor]:
    """Vectors [up to `size`, dim] of the documents in this order; all ranks embed each block when it is needed."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        if given is not None:
            yield given.vectors.gather(np.asarray(block, dtype=np.int64))
        else:
            yield _embedded(embed, Picked(data.document_texts, block), "document", Picked(data.document_ids, block),
                            data)


def _by_index(given: GivenVectors, queries: Tensor, k: int, order: Sequence[int], own: Tensor | None,
              group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Scores [queries, k] and positions in `order` of an index's documents, best first.

    Of equal scores the later document comes first. The document that a query must not retrieve, and the places that the
    index leaves empty, repeat the last one before them.
    """
    assert given.index is not None
    queries = given.vectors.scaled(queries.cpu())
    given.report_recall(queries, min(k, 100), group)
    count = min(k + (own is not None), len(order))
    scores, rows = given.index.search(queries, count)
    position_of = np.empty(len(order), dtype=np.int64)
    position_of[np.asarray(order)] = np.arange(len(order))
    positions = np.where(rows < 0, -1, position_of[rows])
    unwanted = positions < 0
    if own is not None:
        unwanted |= positions == own.numpy()[:, None]
    scores = np.where(unwanted, np.float32(-np.inf), scores)
    best = np.lexsort((-positions, -scores), axis=1)[:, :k]
    scores, positions = np.take_along_axis(scores, best, axis=1), np.take_along_axis(positions, best, axis=1)
    last = np.maximum(np.isfinite(scores).sum(axis=1, keepdims=True) - 1, 0)
    places = np.minimum(np.arange(scores.shape[1]), last)
    return (torch.from_numpy(np.take_along_axis(scores, places, axis=1)),
            torch.from_numpy(np.take_along_axis(positions, places, axis=1)))


@dataclass(kw_only=True)
class _Search:
    """One search by vectors of a width and precision."""

    search: StreamedSearch
    width: int
    full: bool
    """Whether the retrieved documents are scored again with full vectors."""
    similarity: Similarity
    excludes: bool
    """Whether queries have a document that they must not retrieve."""
    precision: Precision = "float32"
    ranges: Tensor | None = None
    """[2, width] of int8; None: of the first documents."""

    def add(self, documents: Tensor) -> None:
        short = for_similarity(documents[:, : self.width], self.similarity)
        if self.precision == "int8":
            if self.ranges is None:
                self.ranges = torch.from_numpy(ranges_of(short[:CALIBRATION_VECTORS]))
            short = int8_values(short, self.ranges.to(short))
        elif self.precision != "float32":
            short = bits(short)
        rescored = short if self.precision == "rescore" else None
        self.search.add(short, for_similarity(documents, self.similarity) if self.full else rescored)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and indices of the retrieved documents, best first."""
        scores, indices = self.search.result()
        return without_excluded(scores, indices) if self.excludes else (scores, indices)


def own_document_columns(data: BeirData, order: Sequence[int]) -> Tensor:
    """[queries] int64: position in `order` of the document with the query's id, -1 if there is none."""
    queries = set(data.query_ids)
    positions = {data.document_ids[document]: position for position, document in enumerate(order)
                 if data.document_ids[document] in queries}
    return torch.tensor([positions.get(query, -1) for query in data.query_ids])


def without_excluded(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The ranking, with an excluded document at its end replaced by a copy of the one before it.

    Rows keep one length; the range of their scores and their metrics stay the same.
    """
    if scores.shape[1] > 1:
        excluded = torch.isneginf(scores[:, -1])
        for values in (scores, indices):
            values[excluded, -1] = values[excluded, -2]
    return scores, indices


def _searches(queries: Tensor, k: int, similarity: Similarity, rankings: Rankings,
              excluded: Tensor | None) -> dict[str, _Search]:
    """Every search by the prefix of its metrics. `excluded`: [queries], a document that a query must not retrieve."""
    searches = {}
    excludes = excluded is not None
    for prefix, width in {"": queries.shape[1], **{f"dim_{width}/": width for width in rankings.dims}}.items():
        search = StreamedSearch(for_similarity(queries[:, :width], similarity), k, excluded=excluded)
        searches[prefix] = _Search(search=search, width=width, full=False, similarity=similarity, excludes=excludes)
    if (width := rankings.two_stage) is not None:
        search = StreamedSearch(for_similarity(queries[:, :width], similarity), rankings.candidates, excluded=excluded,
                                full_queries=for_similarity(queries, similarity))
        searches[f"two_stage_{width}/"] = _Search(search=search, width=width, full=True, similarity=similarity,
                                                 excludes=excludes)
    for prefix, cut, precision in precision_prefixes(rankings.dims, rankings.precisions):
        width = cut or queries.shape[1]
        whole, rescores = for_similarity(queries[:, :width], similarity), precision == "rescore"
        search = StreamedSearch(whole if precision == "int8" else bits(whole), rankings.candidates if rescores else k,
                                excluded=excluded, full_queries=whole if rescores else None)
        ranges = rankings.ranges.get(width)
        searches[prefix] = _Search(search=search, width=width, full=False, similarity=similarity, excludes=excludes,
                                   precision=precision, ranges=None if ranges is None else torch.from_numpy(ranges))
    return searches


def _metrics_of(scores: Tensor, indices: Tensor, query_ids: Sequence[str], document_ids: Sequence[str],
                data: BeirData) -> dict[str, dict[str, float]]:
    """Metrics of each of these queries, computed for QUERIES_PER_BLOCK queries at a time."""
    per_query: dict[str, dict[str, float]] = {}
    for start in range(0, len(query_ids), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        rows = zip(query_ids[block], indices[block].tolist(), scores[block].tolist(), strict=True)
        run = {query: {document_ids[i]: s for i, s in zip(best, values, strict=True)} for query, best, values in rows}
        if data.drop_own_id:  # The search returns it if the corpus has no other document.
            run = {query: {name: s for name, s in scores_of.items() if name != query}
                   for query, scores_of in run.items()}
        per_query.update(metrics_per_query({query: data.qrels[query] for query in run}, run))
    return per_query


def _embedded(embed: Embed, texts: Sequence[str], role: Role, ids: Sequence[str], data: BeirData) -> Tensor:
    """Finite embeddings in float32. An error about a text names its line."""
    try:
        return require_finite(embed(texts, role), f"{role} embeddings", data.name).float()
    except EmptyTextError as error:
        raise EmptyTextError(error.row, data.source_of(role, ids[error.row]), error.text) from None
