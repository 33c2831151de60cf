"""Comparison of a replayed step with its record: which part of it differs first, by how much, under which tolerance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_embed.training.fingerprints import COUNTS

_OF_PART = {
    "rows": ("rows", "row_set", "row_order"),
    "texts": ("queries", "documents", "query_tokens", "document_tokens", "truncated", "query_set", "document_set",
              "query_order", "document_order"),
    "labels": ("labels",),
    "masks": ("masked_fraction", "negatives_per_query"),
    "vectors": ("positive_similarity", "negative_similarity", "similarity", "margin", "positive_score",
                "negative_score")}
_DERIVED = ("margin_to_mean_negative", "margin_to_hardest_negative")
_COUNTED = ("in_batch_accuracy", "accuracy")
_RELATIVE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Relative tolerance of a step's numbers; see docs/audit.md for the differences that layouts make."""
_ROUNDED = 1e-3
"""The same where embedding.precision rounds vectors."""
_PER_STEP = 0.1
"""Growth of the tolerance by each replayed step, as a share of it: rounding changes the parameters a little more."""
_NORM = {"float32": 1e-8, "bfloat16": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How much numbers may differ."""

    dtype: str
    replayed: int
    """Updates replayed before the step."""
    rows: int = 1 << 20
    """Number of the step's rows."""
    dropout: bool = False
    """The run has dropout, whose random numbers depend on the layout, and the layout is another."""
    rounded: bool = False
    """Vectors are rounded in the loss: a last bit may bring a component to another step, or another sign."""

    @property
    def relative(self) -> float:
        least = _ROUNDED if self.rounded else 0.0
        return 0.5 if self.dropout else max(least, _RELATIVE[self.dtype]) * (1 + _PER_STEP * self.replayed)

    @property
    def norm(self) -> float:
        """Relative tolerance of the norm of all parameters."""
        return 1e-3 if self.dropout else _NORM[self.dtype] * (1 + self.replayed)

    def allows(self, name: str, logged: float | None, replayed: float | None, scale: float) -> bool:
        """Whether two values of a metric count as equal. `scale`: the smallest value that differences are relative
        to."""
        if logged is None or replayed is None:
            return logged is None and (replayed is None or not math.isfinite(replayed))
        if not math.isfinite(replayed):
            return False
        bound = self.relative * max(abs(logged), abs(replayed), scale)
        if name in _COUNTED:
            bound = max(0.02, 1.5 / self.rows, bound)  # a tie may be decided otherwise
        return abs(logged - replayed) <= bound


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first part of a step that is not as logged."""

    step: int
    part: str
    values: Mapping[str, tuple[Any, Any]]
    """Quantity -> (logged, replayed)."""


def log_difference(step: int, record: Mapping[str, Any], row: Mapping[str, Any]) -> Difference | None:
    """The metrics that metrics.jsonl and audit.jsonl give otherwise: the run wrote the same numbers to both."""
    values = {name: (row[name], value) for name, value in record["metrics"].items()
              if name in row and row[name] != value and name != "skipped"}
    return Difference(step=step, part="log", values=values) if values else None


def data_difference(step: int, record: Mapping[str, Any], replayed: Mapping[str, Any]) -> Difference | None:
    """The first of rows, texts and labels that differ: hashes and counts, exactly."""
    for part in ("rows", "texts", "labels"):
        values = {name: (record[name], replayed[name]) for name in _OF_PART[part] if record[name] != replayed[name]}
        if values:
            return Difference(step=step, part=part, values=values)
    return None


def number_difference(step: int, record: Mapping[str, Any], replayed: Mapping[str, float],
                      tolerance: Tolerance) -> Difference | None:
    """The first of masks, vectors, loss and gradient that differ."""
    logged: dict[str, float | None] = record["metrics"]
    different = {name: (value, replayed.get(name)) for name, value in logged.items()
                 if name not in ("learning_rate", "skipped", *_DERIVED)
                 and not tolerance.allows(name, value, replayed.get(name), scale_of(name, logged))}
    for part in ("masks", "vectors", "loss", "gradient"):
        values = {name: value for name, value in different.items() if part_of(name) == part}
        if values:
            return Difference(step=step, part=part, values=values)
    return None


def update_difference(step: int, record: Mapping[str, Any], updated: Mapping[str, float],
                      norms: Mapping[str, float], tolerance: Tolerance) -> Difference | None:
    """The difference in the learning rate or, where they are logged, in norms of the parameters after the update."""
    logged = record["metrics"]
    for name, part in (("learning_rate", "learning rate"), ("skipped", "update")):
        if not math.isclose(logged[name], updated[name], rel_tol=1e-9, abs_tol=1e-30):
            return Difference(step=step, part=part, values={name: (logged[name], updated[name])})
    different = {name: (record[name], norm) for name, norm in norms.items()
                 if name in record and not math.isclose(record[name], norm, rel_tol=tolerance.norm)}
    return Difference(step=step, part="update", values=different) if different else None


def part_of(name: str) -> str:
    """The part that a metric belongs to."""
    if name == "grad_norm" or name.endswith("_gradient"):
        return "gradient"
    return next((part for part, names in _OF_PART.items() if name in names and name not in COUNTS), "loss")


def scale_of(name: str, logged: Mapping[str, float | None]) -> float:
    """The smallest value of a metric that relative differences refer to: of similarities the largest, since they and
    their differences may be near 0."""
    if part_of(name) != "vectors":
        return 1e-2
    return max([1.0, *(abs(value) for other, value in logged.items() if value is not None
                       and part_of(other) == "vectors")])
