"""Retrieval metrics of a multi-vector or sparse model on a BEIR set, by exact search in blocks of documents."""

from array import array

import torch.distributed as dist

from megatron_embed.data.corpus import Picked
from megatron_embed.errors import EmptyTextError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.document_search import for_each_document, searches_of, vectors_of_queries
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.rerank_stage import RerankStage, rerank_scores
from megatron_embed.evaluation.retrieval import (
    mean_metrics,
    metrics_of_all_ranks,
    own_document_columns,
    without_excluded,
)
from megatron_embed.parallel.collectives import rank_and_size


def evaluate_by_blocks(encoder: TextEncoder, data: BeirData, *, k: int = 1000, rerank: RerankStage | None = None,
                       group: dist.ProcessGroup | None = None,
                       show_progress: bool = False) -> dict[str, dict[str, float]]:
    """Metrics of each query, as `evaluate_queries` names them, by MaxSim or dot product with every document; of a joint
    model by the sum of its scores, and by each of them with its name before the metric's.

    Each data-parallel rank embeds and searches its share of the documents in blocks, so the corpus may be larger than
    memory; all ranks hold the queries' vectors. Called by all ranks.

    Args:
        k: documents retrieved per query.
        rerank: a reranker's order of the best documents, measured in addition.
        group: ranks that share the computation of the metrics. None: no split.
    Raises:
        UserError: a vector is not finite, or a text has no vectors.
    """
    order = array("q", sorted(range(len(data.document_ids)), key=data.document_ids.__getitem__))
    excluded = own_document_columns(data, order) if data.drop_own_id else None
    try:
        queries = vectors_of_queries(encoder, data.query_texts, instruction=data.instruction)
    except EmptyTextError as error:
        raise EmptyTextError(error.row, data.source_of("query", data.query_ids[error.row]), error.text) from None
    add, searches = searches_of(encoder, queries, k, excluded=excluded)
    try:
        for_each_document(encoder, Picked(data.document_texts, order), [add], instruction=data.instruction,
                          show_progress=show_progress)
    except EmptyTextError as error:
        name = data.document_ids[order[error.row]]
        raise EmptyTextError(error.row, data.source_of("document", name), error.text) from None
    rank, size = rank_and_size(group)
    results = {}
    for prefix, search in searches.items():
        scores, indices = (part[rank::size] for part in search.merged(encoder.topology, len(order)))
        results[prefix] = (scores, indices) if excluded is None else without_excluded(scores, indices)
    scores, indices = results[""]
    if rerank is not None:
        best = (part[:, : rerank.candidates] for part in (scores, indices))
        new_scores = rerank_scores(rerank, *best, data.query_texts, Picked(data.document_texts, order), group)
        results |= {prefix: (values, indices[:, : rerank.candidates]) for prefix, values in new_scores.items()}
    return metrics_of_all_ranks(results, data, Picked(data.document_ids, order), group)


def means_by_blocks(encoder: TextEncoder, data: BeirData, *,
                    group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Means over all queries of `evaluate_by_blocks`."""
    return mean_metrics(evaluate_by_blocks(encoder, data, group=group))
