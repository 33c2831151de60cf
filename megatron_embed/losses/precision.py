"""Vectors as a store keeps them, for losses: int8 within ranges, or signs. Gradients pass straight through (Bengio et
al. 2013, arXiv:1308.3432): that of a vector is that of what the store keeps of it.

The values are those that Sentence Transformers' `quantize_embeddings` and its rescoring give for the same ranges.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_embed.names import Precision

_STEPS = 255


class Stored(NamedTuple):
    """Vectors of a loss at a precision; at float32 the very tensors that were given."""

    anchor: Tensor
    """[rows, dim] queries."""
    document: Tensor
    """[documents, dim]."""
    query: Tensor | None
    """[queries, dim] queries as columns, if any."""


def as_stored(precision: Precision, anchor: Tensor, document: Tensor, query: Tensor | None) -> Stored:
    """The vectors as a store at this precision compares them.

    int8: the documents, each component rounded down to one of 256 values within the range of these documents; queries
    stay as they are, since nobody stores them. binary: signs of all of them, so that a dot product is 1 - 2 * Hamming
    distance / dim. rescore: signs of the documents alone, the second of the two tasks of BPR (Yamada et al. 2021,
    arXiv:2106.00882). Where the documents are those of all ranks, all ranks compute the same values. No communication.

    Args:
        anchor, document, query: float32 or float64, see Stored; unit length for binary and rescore.
    """
    if precision == "int8":
        return Stored(anchor, int8_values(document, int8_ranges(document)), query)
    if precision == "binary":
        return Stored(signs(anchor), signs(document), None if query is None else signs(query))
    if precision == "rescore":
        return Stored(anchor, signs(document), query)
    return Stored(anchor, document, query)


def int8_ranges(vectors: Tensor) -> Tensor:
    """[2, dim] ends of the ranges of these vectors' components: half a step beyond the smallest and the largest.

    So these two lie in the middle of their step, and rounding of the vectors cannot put them into another.
    """
    if not len(vectors):
        return vectors.new_zeros(2, vectors.shape[1])
    low, high = vectors.amin(dim=0), vectors.amax(dim=0)
    half_step = (high - low) / (2 * (_STEPS - 1))
    return torch.stack([low - half_step, high + half_step])


def int8_values(vectors: Tensor, ranges: Tensor) -> Tensor:
    """[rows, dim] values that int8 codes of the vectors stand for: the lower ends of their steps.

    Args:
        ranges: [2, dim], smallest and largest value of each component; what lies beyond gets the first or last step.
    """
    steps = (ranges[1] - ranges[0]) / _STEPS
    steps = torch.where(steps == 0, 1.0, steps)
    codes = ((vectors - ranges[0]) / steps).floor_().clamp_(0, _STEPS)
    return codes * steps + ranges[0]


def signs(vectors: Tensor) -> Tensor:
    """[rows, dim] unit vectors, every component 1 / sqrt(dim) where it is above 0, else -1 / sqrt(dim)."""
    return ((vectors > 0).to(vectors.dtype) * 2 - 1) * float(vectors.shape[1] ** -0.5)
