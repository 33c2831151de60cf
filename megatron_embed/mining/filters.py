"""From a ranking to hard negatives: which candidates are too easy, too close to a positive, or a positive.

The rules are those of Sentence Transformers' `mine_hard_negatives`.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_embed.errors import ConfigError
from megatron_embed.names import NegativeSampling


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """What becomes a negative. A score that equals a bound passes."""

    num_negatives: int = 3
    """Of each query; a query with fewer candidates gets fewer."""
    range_min: int = 0
    """Best candidates that are skipped, positives not counted: the likeliest false negatives."""
    range_max: int | None = None
    """Candidates that are looked at; null: see `last_rank`."""
    max_score: float | None = None
    """A candidate above it is left out."""
    min_score: float | None = None
    """A candidate below it is left out."""
    absolute_margin: float | None = None
    """A candidate above the positive's score - margin is left out."""
    relative_margin: float | None = None
    """A candidate above score - |score| * margin of the positive is left out; right for negative scores too."""
    sampling: NegativeSampling = "top"
    seed: int = 1234
    """For sampling: random."""
    judged: bool = False
    """A reranker scores the candidates afterwards: the search passes all of them on, and the filters wait."""

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
        """`range_max`, or its default: room for the positives, and ten candidates a negative where some are filtered
        or a reranker chooses among them.

        `min_score` alone counts as no filter: below it there is nothing to be found further down.
        """
        if self.range_max is not None:
            return self.range_max
        filtered = (self.max_score, self.absolute_margin, self.relative_margin) != (None, None, None)
        return self.range_min + self.num_negatives * (10 if filtered or self.judged else 1) + most_positives


Candidate = tuple[int, float]
"""Number of a document, and its score for the query."""


def choose(candidates: Sequence[Candidate], excluded: Collection[int], positive_scores: Sequence[float],
           options: MiningOptions, *, last_rank: int, query: int) -> list[Candidate]:
    """The negatives of one query, best first; all candidates but the excluded where they are still to be judged.

    Args:
        candidates: the best `last_rank` + most excluded documents, best first.
        excluded: documents that are never negatives of this query, its positives among them.
        positive_scores: of the positives; the lowest is what margins are measured from.
        last_rank: candidates left after the filters that are looked at, `range_min` of them skipped.
        query: number of the query, for sampling: random.
    """
    if options.judged:
        return [(document, score) for document, score in candidates if document not in excluded]
    threshold = _threshold(positive_scores, options)
    lowest = -float("inf") if options.min_score is None else options.min_score
    left = [(document, score) for document, score in candidates
            if document not in excluded and lowest <= score <= threshold]
    left = left[options.range_min:last_rank]
    if options.sampling == "top" or len(left) <= options.num_negatives:
        return left[:options.num_negatives]
    # By the query's number: the same choice whatever the number of ranks.
    places = random.Random(f"{options.seed} {query}").sample(range(len(left)), options.num_negatives)
    return [left[place] for place in sorted(places)]


def _threshold(positive_scores: Sequence[float], options: MiningOptions) -> float:
    """The highest score that a negative of the query may have."""
    positive = min(positive_scores)
    bounds = [float("inf") if options.max_score is None else options.max_score]
    if options.absolute_margin is not None:
        bounds.append(positive - options.absolute_margin)
    if options.relative_margin is not None:
        bounds.append(positive - abs(positive) * options.relative_margin)
    return min(bounds)
