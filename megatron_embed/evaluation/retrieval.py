"""Retrieval over a BEIR set, and the metrics of trec_eval: nDCG@k, MRR@k, recall@k, precision@k, MAP."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import pytrec_eval
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.data.corpus import Picked
from megatron_embed.errors import ConfigError, EmptyTextError, UserError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.search import StreamedSearch
from megatron_embed.evaluation.second_stage import SecondStage, reranked
from megatron_embed.names import Role, Similarity

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]
Embed = Callable[[Sequence[str], Role], Tensor]

CUTOFFS = (1, 3, 5, 10, 100)
QUERIES_PER_BLOCK = 512
"""Bounds the run that is held at once: 512 x 1000 entries of a Python dict are about 100 MB."""
DOCUMENTS_AT_ONCE = 4096
"""Documents per rank that are embedded together: lengths sort well among them, and their vectors fit anywhere."""


def metrics_per_query(qrels: Qrels, run: Run, *, ks: Sequence[int] = CUTOFFS) -> dict[str, dict[str, float]]:
    """`retrieval_metrics` of every query of `qrels` by itself."""
    cuts = ",".join(map(str, ks))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"P.{cuts}", "map"})
    results = evaluator.evaluate(run)
    metrics = {}
    for query, judged in qrels.items():
        result = results.get(query, {})
        reciprocal_ranks = _reciprocal_ranks(judged, run.get(query, {}), ks)
        values = {"map": result.get("map", 0.0)}
        for k, reciprocal_rank in zip(ks, reciprocal_ranks, strict=True):
            values[f"ndcg@{k}"] = result.get(f"ndcg_cut_{k}", 0.0)
            values[f"mrr@{k}"] = reciprocal_rank
            values[f"recall@{k}"] = result.get(f"recall_{k}", 0.0)
            values[f"precision@{k}"] = result.get(f"P_{k}", 0.0)
        metrics[query] = values
    return metrics


def _reciprocal_ranks(judged: dict[str, int], scores: dict[str, float], ks: Sequence[int]) -> list[float]:
    """1 / rank of the first relevant document, or 0 if it comes after k, for each k; trec_eval's order."""
    # trec_eval compares scores as float32 and then ids, both descending.
    ranked = sorted(scores, key=lambda document: (numpy.float32(scores[document]), document), reverse=True)
    first = next((rank for rank, document in enumerate(ranked, 1) if judged.get(document, 0) > 0), None)
    return [1.0 / first if first is not None and first <= k else 0.0 for k in ks]


def retrieval_metrics(qrels: Qrels, run: Run, *, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means of `ndcg@k`, `mrr@k`, `recall@k`, `precision@k` for each k, and of `map`, as trec_eval defines them.

    The mean is over every query of `qrels`: one that is missing from the run, or that has no relevant document, counts
    0 (pytrec_eval alone leaves the first kind out). Queries of the run that `qrels` lacks are ignored. Relevant means
    a label > 0; nDCG's gain is the label itself; an unjudged document is not relevant. Equal scores, compared as
    float32, are ordered by document id, descending. `map` is over the run as given, however deep.

    Args:
        qrels: query id -> document id -> label.
        run: query id -> document id -> score, larger is better.
        ks: the cuts, each >= 1.
    """
    return mean_metrics(metrics_per_query(qrels, run, ks=ks))


def mean_metrics(per_query: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over queries of each metric."""
    names = next(iter(per_query.values()))
    return {name: math.fsum(values[name] for values in per_query.values()) / len(per_query) for name in names}


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Which leading numbers of a vector a ranking looks at."""

    dims: tuple[int, ...] = ()
    """Rankings by truncated vectors beside the one by full vectors (matryoshka, arXiv:2205.13147)."""
    two_stage: int | None = None
    """One more ranking: the best `candidates` by vectors of this width, ordered by full vectors."""
    candidates: int = 100

    def check(self, full: int) -> None:
        """Raises ConfigError for a width that vectors of `full` numbers do not have."""
        for key, width in (*(("--dims", width) for width in self.dims), ("--two-stage", self.two_stage)):
            if width is not None and not 1 <= width <= full:
                raise ConfigError(f"{key} {width}: the model's vectors have {full} numbers; choose 1 to {full}")


def evaluate_retrieval(
    embed: Embed,
    data: BeirData,
    *,
    k: int = 1000,
    similarity: Similarity = "cosine",
    widths: Widths | None = None,
    second_stage: SecondStage | None = None,
    chunk: int = 8192,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """The means over all queries of `evaluate_queries`, which says what the arguments are."""
    return mean_metrics(evaluate_queries(embed, data, k=k, similarity=similarity, widths=widths,
                                         second_stage=second_stage, chunk=chunk, group=group, device=device))


def evaluate_queries(
    embed: Embed,
    data: BeirData,
    *,
    k: int = 1000,
    similarity: Similarity = "cosine",
    widths: Widths | None = None,
    second_stage: SecondStage | None = None,
    chunk: int = 8192,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each query by exact search with these embeddings over the whole corpus, in the order of the set.

    Names of a truncated width begin with `dim_WIDTH/`, of two stages with `two_stage_WIDTH/`, of a reranker's order
    with `reranked/`. Where the set says so, the document with the query's own id is in no ranking. `map` is over the k
    documents found. Documents are read, embedded, searched and let go in blocks: the corpus may be larger than memory.
    Held are the queries with their best documents, and the ids.

    Args:
        embed: texts and their role -> [texts, dim], rows in the order of the texts. Called by all ranks of the group,
            once for the queries and once for each block of documents; these are no list, but a sequence that reads a
            text when it is asked for one.
        data: corpus, queries and relevance.
        k: documents retrieved per query (all if the corpus is smaller), >= 100 for `recall@100`; 1000 is the depth
            that BEIR and MTEB use for `map`.
        similarity: cosine scales every row to unit length in float32 first.
        widths: further rankings by parts of the vectors.
        second_stage: further rankings, of the best documents by a reranker.
        chunk: documents scored at once.
        device: where the search runs; null: where the vectors are.
        group: ranks that share the queries among them; one all-gather of the queries' metrics for each ranking over
            it. null: none do.
    Returns:
        Query id -> metric -> value; the same numbers on every rank, whatever the number of ranks.
    Raises:
        UserError: an embedding that is not finite, or a text without tokens.
    """
    if k < max(CUTOFFS):
        raise ValueError(f"k = {k}: the metrics look at the first {max(CUTOFFS)} documents")
    widths = widths or Widths()
    # Ascending ids turn search's rule for equal scores into trec_eval's, at the cut too.
    order = array("q", sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__))
    queries = _checked(_embedded(embed, data.query_texts, "query", data.query_ids, data), "query", data.name)
    widths.check(queries.shape[1])
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    own = _own_documents(data, order)[rank::size] if data.drop_own_id else None
    rankings = _rankings(queries[rank::size].to(device or queries.device), k, similarity, widths, own, chunk)
    for documents in _document_blocks(embed, data, order, DOCUMENTS_AT_ONCE * size):
        for ranking in rankings.values():
            ranking.add(documents)
    names = Picked(data.document_ids, order)
    found = {prefix: ranking.search.result() for prefix, ranking in rankings.items()}
    if data.drop_own_id:
        found = {prefix: _without_last(*ranking) for prefix, ranking in found.items()}
    if second_stage is not None:
        scores, indices = (part[:, : second_stage.candidates] for part in found[""])
        again = reranked(second_stage, scores, indices, data.query_texts,
                          Picked(data.document_texts, order), group)
        found |= {prefix: (judged, indices) for prefix, judged in again.items()}
    metrics: dict[str, dict[str, float]] = {query: {} for query in data.query_ids}
    for prefix, ranking in found.items():
        mine = _metrics_of(*ranking, data.query_ids[rank::size], names, data)
        for query, values in _of_all_ranks(mine, data, group).items():
            metrics[query] |= {f"{prefix}{name}": value for name, value in values.items()}
    return metrics


def _document_blocks(embed: Embed, data: BeirData, order: Sequence[int], size: int) -> Iterator[Tensor]:
    """[up to `size`, dim] of the documents in this order; each block is embedded by all ranks when it is asked for."""
    for start in range(0, len(order), size):
        block = order[start : start + size]
        texts, ids = Picked(data.document_texts, block), Picked(data.document_ids, block)
        yield _checked(_embedded(embed, texts, "document", ids, data), "document", data.name)


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """One search: by how much of the vectors, and what is done to them first."""

    search: StreamedSearch
    width: int
    full: bool
    """Whether the documents found are scored again with full vectors."""
    similarity: Similarity

    def add(self, documents: Tensor) -> None:
        short = _scaled(documents[:, : self.width], self.similarity)
        self.search.add(short, _scaled(documents, self.similarity) if self.full else None)


def _own_documents(data: BeirData, order: Sequence[int]) -> Tensor:
    """[queries] int64: place in this order of the document that has the query's id, -1 where there is none."""
    asked = set(data.query_ids)
    places = {data.document_ids[number]: place for place, number in enumerate(order)
              if data.document_ids[number] in asked}
    return torch.tensor([places.get(query, -1) for query in data.query_ids])


def _without_last(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The ranking, with an excluded document at its end replaced by a second copy of the one before it: rows stay of
    one length, and neither the range of their scores nor their metrics change."""
    if scores.shape[1] > 1:
        excluded = torch.isneginf(scores[:, -1])
        for values in (scores, indices):
            values[excluded, -1] = values[excluded, -2]
    return scores, indices


def _rankings(queries: Tensor, k: int, similarity: Similarity, widths: Widths, own: Tensor | None,
              chunk: int) -> dict[str, _Ranking]:
    """Every ranking that was asked for, by the prefix of its metrics. `own`: [queries], documents to leave out."""
    full_width = queries.shape[1]
    wanted = {"": full_width} | {f"dim_{width}/": width for width in widths.dims}
    rankings = {}
    for prefix, width in wanted.items():
        search = StreamedSearch(_scaled(queries[:, :width], similarity), k, excluded=own, chunk=chunk)
        rankings[prefix] = _Ranking(search=search, width=width, full=False, similarity=similarity)
    if widths.two_stage is not None:
        search = StreamedSearch(_scaled(queries[:, : widths.two_stage], similarity), widths.candidates, chunk=chunk,
                                excluded=own, full_queries=_scaled(queries, similarity))
        rankings[f"two_stage_{widths.two_stage}/"] = _Ranking(search=search, width=widths.two_stage, full=True,
                                                              similarity=similarity)
    return rankings


def _scaled(embeddings: Tensor, similarity: Similarity) -> Tensor:
    return normalize(embeddings, dim=-1) if similarity == "cosine" else embeddings


def _metrics_of(scores: Tensor, indices: Tensor, query_ids: Sequence[str], document_ids: Sequence[str],
                data: BeirData) -> dict[str, dict[str, float]]:
    """Metrics of each of these queries; a run of QUERIES_PER_BLOCK of them is held at a time."""
    per_query: dict[str, dict[str, float]] = {}
    for start in range(0, len(query_ids), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        rows = zip(query_ids[block], indices[block].tolist(), scores[block].tolist(), strict=True)
        run = {query: {document_ids[i]: s for i, s in zip(found, values, strict=True)} for query, found, values in rows}
        if data.drop_own_id:  # The search gives it where there is no other document.
            run = {query: {name: s for name, s in found.items() if name != query} for query, found in run.items()}
        per_query.update(metrics_per_query({query: data.qrels[query] for query in run}, run))
    return per_query


def _of_all_ranks(mine: dict[str, dict[str, float]], data: BeirData,
                  group: dist.ProcessGroup | None) -> dict[str, dict[str, float]]:
    """Every query's metrics, in the order of the set, so that their mean does not depend on the number of ranks."""
    if group is None or group.size() == 1:
        return mine
    shares: list[dict[str, dict[str, float]]] = [{}] * group.size()
    dist.all_gather_object(shares, mine, group=group)
    return {query: shares[number % len(shares)][query] for number, query in enumerate(data.query_ids)}


def _embedded(embed: Embed, texts: Sequence[str], role: Role, ids: Sequence[str], data: BeirData) -> Tensor:
    """`embed(texts, role)`; an error about a text names its line."""
    try:
        return embed(texts, role)
    except EmptyTextError as error:
        raise EmptyTextError(error.row, data.place_of(role, ids[error.row]), error.text) from None


def _checked(embeddings: Tensor, role: str, name: str) -> Tensor:
    """The embeddings in float32, if every number in them is finite."""
    bad = int((~torch.isfinite(embeddings).all(dim=-1)).sum())
    if bad:
        raise UserError(
            f"{name}: {bad} of {len(embeddings)} {role} embeddings are not finite; the model has diverged or overflowed"
        )
    return embeddings.float()
