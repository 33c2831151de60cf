"""A reranker as the judge of mined candidates: its scores take the place of the similarity."""

import dataclasses
from collections.abc import Sequence

import torch
from tqdm import tqdm

from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.data.records import Record
from megatron_embed.errors import UserError
from megatron_embed.evaluation.reranking import ScorePairs
from megatron_embed.mining.filters import MiningOptions, choose
from megatron_embed.mining.task import Mined, MiningTask

QUERIES_AT_ONCE = 256
"""Scored together: with fifty candidates each, some ten thousand pairs."""


def judge(found: Sequence[Mined], task: MiningTask, records: Sequence[Record], score: ScorePairs,
          options: MiningOptions, *, show_progress: bool = False) -> list[Mined]:
    """Negatives of every query, and all scores, by a reranker; best first, equal scores in the order of the search.

    The reranker reads the query as the row has it, with the row's instruction and without an embedding model's prompt.
    Called by all ranks alike; communicates as `score` does.

    Args:
        found: every candidate of each query.
        records: the rows of the task.
        score: called with the positives and the candidates of 256 queries at a time.
        options: the search's own, `judged`.
        show_progress: a bar, if stderr is a terminal.
    Raises:
        UserError: a score that is not finite.
    """
    final, last_rank = dataclasses.replace(options, judged=False), options.last_rank(task.most_positives)
    numbers = [[*task.positives[query], *(document for document, _ in mined.negatives)]
               for query, mined in enumerate(found)]
    judged: list[Mined] = []
    with tqdm(total=sum(map(len, numbers)), unit="pair", desc="judge", disable=None if show_progress else True) as bar:
        for start in range(0, len(found), QUERIES_AT_ONCE):
            block = numbers[start:start + QUERIES_AT_ONCE]
            pairs = [pair_of(task, records, start + place, document)
                     for place, documents in enumerate(block) for document in documents]
            scores = score(pairs).float()
            if not torch.isfinite(scores).all():
                raise UserError(f"--reranker: {int((~torch.isfinite(scores)).sum())} of {len(scores)} scores are not "
                                "finite; the model has diverged or overflowed")
            shares = scores.split([len(documents) for documents in block])
            for place, (documents, share) in enumerate(zip(block, shares, strict=True)):
                judged.append(_judged(start + place, documents, share.tolist(), task, final, last_rank))
            bar.update(len(pairs))
    return judged


def pair_of(task: MiningTask, records: Sequence[Record], query: int, document: int) -> Pair:
    """What a reranker is asked about a query and a document of the task."""
    row = records[task.row_of_query[query]]
    return Pair(query=row.query, document=task.documents[document], instruction=row.instruction, source=row.source)


def _judged(query: int, documents: Sequence[int], scores: Sequence[float], task: MiningTask, options: MiningOptions,
            last_rank: int) -> Mined:
    """One query's; `documents` and `scores` of its positives, then of its candidates."""
    positives = task.positives[query]
    positive_scores = list(scores[:len(positives)])
    candidates = sorted(zip(documents[len(positives):], scores[len(positives):], strict=True),
                        key=lambda candidate: candidate[1], reverse=True)
    return Mined(positive_scores=positive_scores, negatives=choose(
        candidates, frozenset(positives), positive_scores, options, last_rank=last_rank, query=query))
