"""Select hard negatives from ranked candidates: skip positives, likely false negatives and easy documents.

The rules are those of Sentence Transformers' `mine_hard_negatives`.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_embed.errors import ConfigError
from megatron_embed.names import NegativeSampling


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """Filters of the candidates. A score equal to a bound passes."""

    num_negatives: int = 3
    """Negatives per query; a query with fewer candidates gets fewer."""
    range_min: int = 0
    """Best candidates to skip, positives not counted: the likeliest false negatives."""
    range_max: int | None = None
    """Candidates to consider; None: see `last_rank`."""
    max_score: float | None = None
    """Skip candidates with a higher score."""
    min_score: float | None = None
    """Skip candidates with a lower score."""
    absolute_margin: float | None = None
    """Skip candidates scored above (positive - margin)."""
    relative_margin: float | None = None
    """Skip candidates scored above (positive - |positive| * margin), which is correct for negative scores too."""
    sampling: NegativeSampling = "top"
    seed: int = 1234
    """Seed of random sampling."""
    reranked: bool = False
    """Whether a reranker scores the candidates later: the search keeps all of them, and the filters run then."""

    def __post_init__(self) -> None:
        for key, value, least in (("num-negatives", self.num_negatives, 1), ("range-min", self.range_min, 0),
                                  ("seed", self.seed, 0), ("absolute-margin", self.absolute_margin, 0),
                                  ("relative-margin", self.relative_margin, 0)):
            if value is not None and not value >= least:
                raise ConfigError(f"--{key} {value}: must be at least {least}")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ConfigError(f"--min-score {self.min_score} is above --max-score {self.max_score}, which leaves no "
                              "candidates; raise --max-score or lower --min-score")
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            least = self.range_min + self.num_negatives
            raise ConfigError(f"--range-max {self.range_max} leaves no room for --range-min {self.range_min} and "
                              f"--num-negatives {self.num_negatives}; raise it to {least} or more")

    def last_rank(self, most_positives: int) -> int:
        """`range_max`, or its default: room for the positives, and ten candidates per negative if they are filtered or
        reranked.

        `min_score` alone is not such a filter: no later candidate reaches it.
        """
        if self.range_max is not None:
            return self.range_max
        filtered = (self.max_score, self.absolute_margin, self.relative_margin) != (None, None, None)
        return self.range_min + self.num_negatives * (10 if filtered or self.reranked else 1) + most_positives


Candidate = tuple[int, float]
"""A document's index and its score for the query."""


def select_negatives(candidates: Sequence[Candidate], excluded: Collection[int], positive_scores: Sequence[float],
                     options: MiningOptions, *, last_rank: int, query: int) -> list[Candidate]:
    """Negatives of one query, best first; with `options.reranked` all candidates that are not excluded.

    Args:
        candidates: the best `last_rank` + most excluded documents, best first.
        excluded: documents that are never negatives of this query, including its positives.
        positive_scores: scores of the positives; margins are relative to the lowest.
        last_rank: candidates to consider after the filters, including `range_min` that are skipped.
        query: index of the query, for random sampling.
    """
    if options.reranked:
        return [(document, score) for document, score in candidates if document not in excluded]
    threshold = _threshold(positive_scores, options)
    lowest = -float("inf") if options.min_score is None else options.min_score
    left = [(document, score) for document, score in candidates
            if document not in excluded and lowest <= score <= threshold]
    left = left[options.range_min:last_rank]
    if options.sampling == "top" or len(left) <= options.num_negatives:
        return left[:options.num_negatives]
    # Seeded by the query's index: the same sample for every number of ranks.
    sample = random.Random(f"{options.seed} {query}").sample(range(len(left)), options.num_negatives)
    return [left[position] for position in sorted(sample)]


def _threshold(positive_scores: Sequence[float], options: MiningOptions) -> float:
    """The highest score that a negative of the query may have."""
    positive = min(positive_scores)
    bounds = [float("inf") if options.max_score is None else options.max_score]
    if options.absolute_margin is not None:
        bounds.append(positive - options.absolute_margin)
    if options.relative_margin is not None:
        bounds.append(positive - abs(positive) * options.relative_margin)
    return min(bounds)
