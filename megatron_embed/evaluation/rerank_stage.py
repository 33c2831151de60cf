"""The second stage of a search: a reranker orders the documents that vector search retrieved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.evaluation.finite import require_finite
from megatron_embed.parallel.collectives import gather_objects, rank_and_size

PAIRS_AT_ONCE = 50_000
"""Approximate number of pairs scored together."""

ScoreTexts = Callable[[Sequence[tuple[str, str]]], Tensor]
"""(query, document) pairs -> [pairs] scores, larger is better."""


@dataclass(frozen=True, kw_only=True)
class RerankStage:
    """A reranker that reorders each query's best documents."""

    score: ScoreTexts
    """Called by all ranks with the same pairs."""
    candidates: int = 100
    """Documents per query that are scored; the ranking contains no others."""
    weights: tuple[float, ...] = ()
    """One more ranking each: (1 - weight) * similarity + weight * score, both scaled to 0..1 within the candidates of a
    query."""


def rerank_scores(stage: RerankStage, scores: Tensor, indices: Tensor, queries: Sequence[str],
                  documents: Sequence[str], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """New scores [this rank's queries, candidates] of the retrieved documents, by the prefix of the ranking's metrics.

    `reranked/` uses the reranker's scores, `reranked_WEIGHT/` a weighted sum with the similarity. One all-gather of the
    candidates' indices over the group.

    Args:
        scores: [this rank's queries, candidates] similarities.
        indices: [this rank's queries, candidates] positions in `documents`.
        queries: of all ranks; rank r of n has r, r + n, ...
    Raises:
        UserError: a score that is not finite.
    """
    rank, size = rank_and_size(group)
    candidates = _interleaved(gather_objects(indices.cpu(), group), len(queries))
    all_scores = torch.empty(candidates.shape)
    block = max(1, PAIRS_AT_ONCE // max(1, candidates.shape[1]))
    for start in range(0, len(queries), block):
        rows = candidates[start : start + block].tolist()
        pairs = [(queries[query], documents[document]) for query, row in enumerate(rows, start) for document in row]
        all_scores[start : start + block] = stage.score(pairs).float().view(len(rows), -1)
    require_finite(all_scores.flatten(), "scores", "--reranker")
    own, similarity = all_scores[rank::size], scores.float().cpu()
    return {"reranked/": own} | {
        f"reranked_{weight:g}/": (1 - weight) * _scale_to_unit(similarity) + weight * _scale_to_unit(own)
        for weight in stage.weights}


def _scale_to_unit(scores: Tensor) -> Tensor:
    """[queries, candidates] with each row's lowest at 0 and highest at 1; 0 if all are equal."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def _interleaved(shares: Sequence[Tensor], rows: int) -> Tensor:
    """[rows, columns] from the ranks' shares, where rank r of n has rows r, r + n, ..."""
    whole = shares[0].new_empty(rows, shares[0].shape[1])
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
