"""Likely causes of a difference: each is tried on the replayed step, and named if it gives the logged numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_embed.audit.compare import Difference


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A likely cause."""

    name: str
    text: str


def explain(work: Any, difference: Difference) -> Sequence[Cause]:
    """The causes that fit a difference, the likeliest first."""
    return []
