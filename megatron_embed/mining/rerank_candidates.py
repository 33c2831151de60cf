"""Rerank mined candidates: a reranker's scores replace the similarity."""

import dataclasses
from collections.abc import Sequence

from tqdm import tqdm

from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.data.records import Record
from megatron_embed.evaluation.finite import require_finite
from megatron_embed.evaluation.reranking import ScorePairs
from megatron_embed.mining.filters import MiningOptions, select_negatives
from megatron_embed.mining.task import Mined, MiningTask

QUERIES_AT_ONCE = 256
"""Queries scored together; with 50 candidates each, about 13,000 pairs."""


def rerank_candidates(mined: Sequence[Mined], task: MiningTask, records: Sequence[Record], score: ScorePairs,
                      options: MiningOptions, *, show_progress: bool = False) -> list[Mined]:
    """Negatives of every query, best first, and all scores, by a reranker; equal scores keep the order of the search.

    The reranker reads the row's query and instruction without the embedding model's prompt. Called by all ranks alike;
    communicates as `score` does.

    Args:
        mined: all candidates of each query.
        records: the rows of the task.
        score: called with the positives and the candidates of 256 queries at a time.
        options: those of the search, with `reranked`.
        show_progress: shows a bar if stderr is a terminal.
    Raises:
        UserError: a score that is not finite.
    """
    final, last_rank = dataclasses.replace(options, reranked=False), options.last_rank(task.most_positives)
    documents = [[*task.positives[query], *(document for document, _ in result.negatives)]
                 for query, result in enumerate(mined)]
    reranked: list[Mined] = []
    bar = tqdm(total=sum(map(len, documents)), unit="pair", desc="rerank", disable=None if show_progress else True)
    with bar:
        for start in range(0, len(mined), QUERIES_AT_ONCE):
            block = documents[start:start + QUERIES_AT_ONCE]
            pairs = [pair_of(task, records, query, document)
                     for query, own in enumerate(block, start) for document in own]
            scores = require_finite(score(pairs).float(), "scores", "--reranker")
            shares = scores.split([len(own) for own in block])
            for query, (own, share) in enumerate(zip(block, shares, strict=True), start):
                reranked.append(_rerank_query(query, own, share.tolist(), task, final, last_rank))
            bar.update(len(pairs))
    return reranked


def pair_of(task: MiningTask, records: Sequence[Record], query: int, document: int) -> Pair:
    """The pair that a reranker scores for a query and a document of the task."""
    row = records[task.row_of_query[query]]
    return Pair(query=row.query, document=task.documents[document], instruction=row.instruction, source=row.source)


def _rerank_query(query: int, documents: Sequence[int], scores: Sequence[float], task: MiningTask,
                  options: MiningOptions, last_rank: int) -> Mined:
    """One query's result; `documents` and `scores` are its positives, then its candidates."""
    positives = task.positives[query]
    positive_scores = list(scores[:len(positives)])
    candidates = sorted(zip(documents[len(positives):], scores[len(positives):], strict=True),
                        key=lambda candidate: candidate[1], reverse=True)
    selection = select_negatives(candidates, frozenset(positives), positive_scores, options, last_rank=last_rank,
                                 query=query)
    return Mined(positive_scores=positive_scores, negatives=selection.negatives, skipped=selection.skipped)
