"""Ways in which a step may have been computed otherwise than configured, for an audit to try."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What the plain losses do otherwise; the default changes nothing."""

    temperature: float | None = None
    """In place of the configured one."""
    label_shift: int = 0
    """A query's positive is that of the query so many places later in the global batch."""
    shift_within_rank: bool = False
    """The shift ends where the data-parallel rank's queries do, and continues at their beginning."""
    duplicates_masked: bool | None = None
    """In place of objective.mask_duplicates."""
    margin_masked: bool = True
    """False: objective.mask_margin has no effect."""
    documents: Literal["all", "positives", "own_rank", "others_detached"] = "all"
    """Negatives of a query: all documents, those without hard negatives, those of its own data-parallel rank, or all
    with no gradient to those of other ranks."""
    ranks: int = 1
    """Data-parallel ranks of the run, for `documents`."""
    first_dimension_only: bool = False
    """The loss at the largest matryoshka dimension alone."""
    per_query: bool = True
    """False: every term weighs 1, also where a query has several positives."""
    directions: tuple[str, ...] | None = None
    """In place of objective.directions."""
    hardness: bool = True
    """False: objective.hardness has no effect."""
    factors: tuple[tuple[int, int, float], ...] = ()
    """(first, last + 1, factor): the gradient of these queries of the global batch and of their documents is multiplied
    by it."""
    detached: tuple[Literal["queries", "positives", "hard_negatives"], ...] = ()
    """Rows without gradient, or with `detached_factor` times theirs."""
    detached_factor: float = 0.0
    settings: tuple[tuple[str, object], ...] = ()
    """(key, value) in place of those of section `objective`."""
    rounded: Literal["vectors", "gradient"] | None = None
    """What is rounded to bfloat16: the vectors before the loss, or their gradient."""


NONE = Variation()
