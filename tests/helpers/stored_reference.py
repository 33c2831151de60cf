"""Similarities of rounded vectors in one process, by Sentence Transformers' own quantization and autograd.

A float32 model must not round a component otherwise than this reference in float64, so none may lie close to the end of
its step.
"""

from collections.abc import Iterator

import numpy as np
import torch
from sentence_transformers.util.quantization import _dequantize_embeddings, quantize_embeddings

from tests.helpers.exactness_cases import STORED

LEAST_GAP = 5e-7
"""Between a component and the value at which it is rounded otherwise: float32 computes unit vectors to less."""


def stored_similarities(query: torch.Tensor, document: torch.Tensor,
                        name: str) -> Iterator[tuple[torch.Tensor, float]]:
    """([queries, documents] similarities, weight) at every width and precision."""
    stored = STORED[name]
    for dim in stored.dims or (query.shape[1],):
        sides = [torch.nn.functional.normalize(side[:, :dim], dim=1) for side in (query, document)]
        for precision, weight in zip(stored.precisions, stored.weights, strict=True):
            chosen = sides
            if precision == "int8":
                chosen = [sides[0], _straight_through(sides[1], _int8(sides[1].detach().numpy()))]
            elif precision == "binary":
                chosen = [_straight_through(side, _signs(side.detach().numpy())) for side in sides]
            elif precision == "rescore":
                chosen = [sides[0], _straight_through(sides[1], _signs(sides[1].detach().numpy()))]
            yield chosen[0] @ chosen[1].T, weight


def sum_of_weights(name: str) -> float:
    """Sum of the weights over all precisions and Matryoshka widths of a case."""
    return sum(STORED[name].weights) * max(1, len(STORED[name].dims))


def _straight_through(vectors: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    return vectors + (torch.from_numpy(values) - vectors).detach()


def _int8(vectors: np.ndarray) -> np.ndarray:
    """The values of the documents' int8 codes, their ranges half a step wider than the vectors."""
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    step = (high - low) / 254
    start = low - step / 2
    places = (vectors - start) / step
    _require_gap(np.abs(places - places.round()) * step)
    values: np.ndarray = np.floor(places) * step + start
    ranges = np.stack([start, high + step / 2]).astype(np.float32)
    stock = _dequantize_embeddings(quantize_embeddings(vectors, "int8", ranges=ranges), "int8", ranges)
    assert (np.abs(stock - values) < 1e-6).mean() > 0.99, "Sentence Transformers knows ranges in float32 alone"
    return values


def _signs(vectors: np.ndarray) -> np.ndarray:
    _require_gap(np.abs(vectors))
    unpacked = np.unpackbits(quantize_embeddings(vectors, "ubinary"), axis=-1)[:, : vectors.shape[1]]
    return (unpacked * 2.0 - 1.0) / vectors.shape[1] ** 0.5


def _require_gap(distances: np.ndarray) -> None:
    least = distances.min()
    assert least > LEAST_GAP, f"a component is {least:.1e} from the end of its step: choose another case"
