"""Settings and parameter names of low-rank adapters, as a checkpoint stores them.

Imports neither torch nor Megatron.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

ADAPTER_NAME = re.compile(r"(?P<linear>.+)\.lora\.(?P<part>\w+)\.(?P<matrix>[AB])\d*")
"""Name of an adapter's parameter: that of the linear layer, then the last word of the Hugging Face module; B0, B1, ...
of a module that stands for several projections."""


def is_adapter(name: str) -> bool:
    """Whether a parameter (or its key in a checkpoint) belongs to an adapter."""
    return ADAPTER_NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Everything but the weights that determines the adapters' outputs."""

    rank: int
    alpha: float
    use_rslora: bool
    modules: tuple[str, ...]
    """Full Hugging Face names of the linear layers, `*` for the layer and `#` for the expert, in the table's order."""
    base_model: str
    """Directory or hub name of the model that the adapters were made for."""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters that a model is built with."""

    rank: int
    scale: float
    dropout: float
    seed: int
    """Seed of the initial weights."""
    parts: Mapping[str, tuple[str | None, ...]]
    """Our linear layers, `*` for the layer and `#` for the expert -> last words of the Hugging Face modules that make
    them up, in order; None for a module without an adapter. A module that stands for several projections is
    repeated."""
