"""Exact top-k search and the retrieval metrics of trec_eval: nDCG@k, MRR@k, recall@k, precision@k, MAP."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy
import pytrec_eval
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.data.prompts import Role
from megatron_embed.errors import TokenlessTextError, UserError
from megatron_embed.evaluation.beir import BeirData

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]
Embed = Callable[[list[str], Role], Tensor]

CUTOFFS = (1, 3, 5, 10, 100)
QUERIES_PER_BLOCK = 512
"""Bounds the run that is held at once: 512 x 1000 entries of a Python dict are about 100 MB."""


def search(queries: Tensor, documents: Tensor, k: int, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The k documents of largest dot product for each query, best first; exact.

    Equal scores: the larger index first, also at the cut. With documents in ascending order of id that is trec_eval's
    rule. (Copies of a vector may differ in the last bit: a matrix product rounds by position.)

    Args:
        queries: [queries, dim].
        documents: [documents, dim], fewer than 2**32.
        k: how many, >= 1; all documents where there are fewer.
        chunk: documents scored at once; memory is O(queries * (k + chunk)).
    Returns:
        Scores [queries, min(k, documents)] float32 and indices [queries, min(k, documents)] int64, on the queries'
        device. No communication.
    """
    queries = queries.float()
    best = queries.new_empty((len(queries), 0), dtype=torch.int64)
    for start in range(0, len(documents), chunk):
        scores = queries @ documents[start : start + chunk].to(queries).T
        indices = torch.arange(start, start + scores.shape[1], device=scores.device)
        best = _largest(torch.cat([best, _pack(scores, indices)], dim=1), k)
    return _unpack(best)


def merge_top_k(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of several searches over disjoint documents, with `search`'s rule for equal scores.

    Args:
        parts: scores [queries, n] float32 and indices [queries, n] int64 of each, n may differ. The indices must
            already count over all documents, so a shard adds the number of its first document.
        k: how many, >= 1; all where there are fewer.
    Returns:
        Scores [queries, min(k, sum of n)] float32 and indices [queries, min(k, sum of n)] int64. No communication.
    """
    return _unpack(_largest(torch.cat([_pack(scores, indices) for scores, indices in parts], dim=1), k))


def _pack(scores: Tensor, indices: Tensor) -> Tensor:
    """[queries, n] int64 keys that sort by (score, index): the score's bits above the index's 32 bits."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 would sort below 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats: the larger the bits, the smaller
    return (ordered.long() << 32) | indices


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of `_pack`'s keys."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), keys & 0xFFFFFFFF


def _largest(keys: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, descending; all of them where there are fewer."""
    return keys.topk(min(k, keys.shape[1]), dim=1).values


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
    return _means(metrics_per_query(qrels, run, ks=ks))


def _means(per_query: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over queries of each metric."""
    names = next(iter(per_query.values()))
    return {name: math.fsum(values[name] for values in per_query.values()) / len(per_query) for name in names}


def evaluate_retrieval(
    embed: Embed,
    data: BeirData,
    *,
    k: int = 1000,
    similarity: Literal["cosine", "dot"] = "cosine",
    chunk: int = 8192,
) -> dict[str, float]:
    """`retrieval_metrics` of exact search with these embeddings over the whole corpus.

    No document is skipped for having the query's own id. `map` is over the k documents found.

    Args:
        embed: texts and their role -> [texts, dim], rows in the order of the texts. Called once for each role.
        data: corpus, queries and relevance.
        k: documents retrieved per query (all if the corpus is smaller), >= 100 for `recall@100`; 1000 is the depth
            that BEIR and MTEB use for `map`.
        similarity: cosine scales every row to unit length in float32 first.
        chunk: documents scored at once.
    Raises:
        UserError: an embedding that is not finite, or a text without tokens.
    """
    if k < max(CUTOFFS):
        raise ValueError(f"k = {k}: the metrics look at the first {max(CUTOFFS)} documents")
    # Ascending ids turn search's rule for equal scores into trec_eval's, at the cut too.
    order = sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__)
    document_ids = [data.document_ids[index] for index in order]
    texts = [data.document_texts[index] for index in order]
    documents = _checked(_embedded(embed, texts, "document", document_ids, data), "document", data.name)
    queries = _checked(_embedded(embed, data.query_texts, "query", data.query_ids, data), "query", data.name)
    if similarity == "cosine":
        queries, documents = normalize(queries, dim=-1), normalize(documents, dim=-1)
    per_query: dict[str, dict[str, float]] = {}
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        ids = data.query_ids[start : start + QUERIES_PER_BLOCK]
        scores, indices = search(queries[start : start + QUERIES_PER_BLOCK], documents, k, chunk=chunk)
        rows = zip(ids, indices.tolist(), scores.tolist(), strict=True)
        run = {query: {document_ids[i]: s for i, s in zip(found, values, strict=True)} for query, found, values in rows}
        per_query.update(metrics_per_query({query: data.qrels[query] for query in ids}, run))
    return _means(per_query)


def _embedded(embed: Embed, texts: list[str], role: Role, ids: Sequence[str], data: BeirData) -> Tensor:
    """`embed(texts, role)`; an error about a text names its line."""
    try:
        return embed(texts, role)
    except TokenlessTextError as error:
        raise TokenlessTextError(error.row, data.place_of(role, ids[error.row]), error.text) from None


def _checked(embeddings: Tensor, role: str, name: str) -> Tensor:
    """The embeddings in float32, if every number in them is finite."""
    bad = int((~torch.isfinite(embeddings).all(dim=-1)).sum())
    if bad:
        raise UserError(
            f"{name}: {bad} of {len(embeddings)} {role} embeddings are not finite; the model has diverged or overflowed"
        )
    return embeddings.float()
