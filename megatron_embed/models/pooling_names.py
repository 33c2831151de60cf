"""The poolings, in the spelling that Sentence Transformers writes."""

from typing import Literal

Pooling = Literal["lasttoken", "mean", "cls", "weightedmean"]
POOLINGS: tuple[Pooling, ...] = ("lasttoken", "mean", "cls", "weightedmean")
