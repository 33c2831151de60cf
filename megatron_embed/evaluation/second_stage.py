"""The second stage of a search: a reranker orders the documents that the vectors found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.errors import UserError

PAIRS_AT_ONCE = 50_000
"""Scored together, about."""

ScoreTexts = Callable[[Sequence[tuple[str, str]]], Tensor]
"""(query, document) pairs -> [pairs] scores, larger is better."""


@dataclass(frozen=True, kw_only=True)
class SecondStage:
    """What is done with each query's best documents."""

    score: ScoreTexts
    """Called by all ranks with the same pairs."""
    candidates: int = 100
    """Documents of a query that are scored; the others are no longer in the ranking."""
    weights: tuple[float, ...] = ()
    """One more ranking each: (1 - weight) * similarity + weight * score, both scaled to 0..1 within the candidates of a
    query."""


def reranked(stage: SecondStage, scores: Tensor, indices: Tensor, queries: Sequence[str], documents: Sequence[str],
              group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """[this rank's queries, candidates] new scores of the documents found, by the prefix of the ranking's metrics.

    `reranked/` is by the reranker alone, `reranked_WEIGHT/` by both. One all-gather of the candidates' numbers over the
    group.

    Args:
        scores: [this rank's queries, candidates] of the search.
        indices: the same shape, of `documents`.
        queries: of all ranks; rank r of n has r, r + n, ...
    Raises:
        UserError: a score that is not finite.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    everyone = _of_all_ranks(indices.cpu(), len(queries), group)
    judged = torch.empty(everyone.shape)
    block = max(1, PAIRS_AT_ONCE // max(1, everyone.shape[1]))
    for start in range(0, len(queries), block):
        rows = everyone[start : start + block].tolist()
        pairs = [(queries[start + place], documents[number]) for place, row in enumerate(rows) for number in row]
        judged[start : start + block] = stage.score(pairs).float().view(len(rows), -1)
    bad = int((~torch.isfinite(judged)).sum())
    if bad:
        raise UserError(f"--reranker: {bad} of {judged.numel()} scores are not finite; the model has diverged or "
                        "overflowed")
    own, found = judged[rank::size], scores.float().cpu()
    return {"reranked/": own} | {f"reranked_{weight:g}/": (1 - weight) * _spread(found) + weight * _spread(own)
                                 for weight in stage.weights}


def _spread(scores: Tensor) -> Tensor:
    """[queries, candidates] with each row's lowest at 0 and highest at 1; 0 where all are equal."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def _of_all_ranks(mine: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, columns] of every rank's rows, where rank r of n has r, r + n, ..."""
    if group is None or group.size() == 1:
        return mine
    shares: list[Tensor] = [mine] * group.size()
    dist.all_gather_object(shares, mine, group=group)
    whole = mine.new_empty(rows, mine.shape[1])
    for rank, share in enumerate(shares):
        whole[rank :: group.size()] = share
    return whole
