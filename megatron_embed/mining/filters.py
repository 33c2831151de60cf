"""Select hard negatives from ranked candidates: skip positives, likely false negatives and easy documents.

The rules are those of Sentence Transformers' `mine_hard_negatives`.
"""

import functools
import operator
import random
from collections.abc import Callable, Collection, Iterator, Sequence
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


EXCLUDED, OUT_OF_RANGE, NOT_NEEDED = "never negatives", "--range-max", "not needed"
"""Reasons to skip a candidate that are no bound of a score: a positive, another form of one, or the query's text; a
rank after the last; after the bounds, enough others."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Negatives of one query, and the numbers of candidates that were skipped, by the reason."""

    negatives: list[Candidate]
    skipped: dict[str, int]
    """By option, EXCLUDED or NOT_NEEDED; without zeros."""


def select_negatives(candidates: Sequence[Candidate], excluded: Collection[int], positive_scores: Sequence[float],
                     options: MiningOptions, *, last_rank: int, query: int) -> Selection:
    """Negatives of one query, best first; with `options.reranked` all candidates that are not excluded.

    Args:
        candidates: the best `last_rank` + most excluded documents, best first.
        excluded: documents that are never negatives of this query, including its positives.
        positive_scores: scores of the positives; margins are relative to the lowest.
        last_rank: candidates to consider after the filters, including `range_min` that are skipped.
        query: index of the query, for random sampling.
    """
    left = [(document, score) for document, score in candidates if document not in excluded]
    skipped = {EXCLUDED: len(candidates) - len(left)}
    if not options.reranked:
        for option, passes in _bounds(positive_scores, options):
            before = len(left)
            left = [candidate for candidate in left if passes(candidate[1])]
            skipped[option] = before - len(left)
        skipped["--range-min"] = min(options.range_min, len(left))
        skipped[OUT_OF_RANGE] = max(0, len(left) - last_rank)
        left = left[options.range_min:last_rank]
        skipped[NOT_NEEDED] = max(0, len(left) - options.num_negatives)
        left = _sampled(left, options, query)
    return Selection(negatives=left, skipped={reason: count for reason, count in skipped.items() if count})


def _sampled(left: list[Candidate], options: MiningOptions, query: int) -> list[Candidate]:
    """`num_negatives` of the candidates that are left, in their order."""
    if options.sampling == "top" or len(left) <= options.num_negatives:
        return left[:options.num_negatives]
    # Seeded by the query's index: the same sample for every number of ranks.
    sample = random.Random(f"{options.seed} {query}").sample(range(len(left)), options.num_negatives)
    return [left[position] for position in sorted(sample)]


def _bounds(positive_scores: Sequence[float],
            options: MiningOptions) -> Iterator[tuple[str, Callable[[float], bool]]]:
    """(option, whether a score passes it) of every bound that is set."""
    positive = min(positive_scores)
    above = {"--max-score": options.max_score,
             "--absolute-margin": None if options.absolute_margin is None else positive - options.absolute_margin,
             "--relative-margin": (None if options.relative_margin is None
                                   else positive - abs(positive) * options.relative_margin)}
    for option, bound in above.items():
        if bound is not None:
            yield option, functools.partial(operator.ge, bound)
    if options.min_score is not None:
        yield "--min-score", functools.partial(operator.le, options.min_score)
