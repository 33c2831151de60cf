"""Measurement of the library that multiplies float32 matrices fastest on this processor, for `model.cpu_matmul`."""

import itertools
import time
from collections.abc import Callable, Sequence

import torch

from megatron_embed.names import MATMUL_LIBRARIES, MatmulLibrary
from megatron_embed.platform.cpu_linear import DEFAULT_LIBRARIES, Libraries, is_available, product, weight_gradient

ROWS, WEIGHT_GRADIENT_ROWS = 512, 4096
"""Tokens of a measured product. Gradients of weights, sums over tokens, are slower in oneDNN the more tokens there are:
on a Zen 4 held to AVX2, torch takes 0.94 of its time with 512, 0.84 with 2,048 and 0.69 with 8,192."""
MAX_WIDTH = 1536
"""Rows and columns of a measured weight; wider ones are as fast per element."""
MIN_ELEMENTS = 1 << 16
"""Below this size of the largest weight nothing is measured: the calls take as long as the products."""
ROUNDS = 2
"""Measurements of a product, of which the shortest counts; the libraries take turns."""
MIN_GAIN = 0.05
"""Part of oneDNN's time that torch's library must save to be chosen, so that noise seldom decides."""


def fastest_libraries(shapes: Sequence[tuple[int, int]]) -> tuple[Libraries, tuple[float, ...]] | None:
    """Libraries for weights of these shapes, and torch's time over oneDNN's per kind of product.

    None if there is nothing to choose: this torch has no oneDNN for this processor, or the weights are small. No
    communication; draws no random numbers.

    Args:
        shapes: (outer, inner) of weights; their times are added up.
    """
    if not is_available() or max(outer * inner for outer, inner in shapes) < MIN_ELEMENTS:
        return None
    ratios = torch_over_onednn([(min(outer, MAX_WIDTH), min(inner, MAX_WIDTH)) for outer, inner in shapes])
    chosen = tuple("torch" if ratio < 1 - MIN_GAIN else default
                   for ratio, default in zip(ratios, DEFAULT_LIBRARIES, strict=True))
    return chosen, ratios  # type: ignore[return-value]


@torch.no_grad()
def torch_over_onednn(shapes: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Processor time of torch's library over oneDNN's, per kind of product in the order of `model.cpu_matmul`."""
    totals = dict.fromkeys(itertools.product(range(len(DEFAULT_LIBRARIES)), MATMUL_LIBRARIES), 0.0)
    for outer, inner in shapes:
        calls = {(kind, library): call for library in MATMUL_LIBRARIES
                 for kind, call in enumerate(_products(outer, inner, library))}
        shortest = dict.fromkeys(calls, float("inf"))
        for call in calls.values():
            call()
        for _ in range(ROUNDS):
            for key, call in calls.items():
                start = time.process_time()  # of all threads: hardly changed by other processes
                call()
                shortest[key] = min(shortest[key], time.process_time() - start)
        for key, seconds in shortest.items():
            totals[key] += seconds
    return tuple(totals[kind, "torch"] / totals[kind, "onednn"] for kind in range(len(DEFAULT_LIBRARIES)))


def _products(outer: int, inner: int, library: MatmulLibrary) -> tuple[Callable[[], torch.Tensor], ...]:
    """The forward pass, the gradient of the input and that of the weight, by one library."""
    inputs, weight = torch.ones(WEIGHT_GRADIENT_ROWS, inner), torch.ones(outer, inner)
    grad = torch.ones(WEIGHT_GRADIENT_ROWS, outer)
    return (lambda: product(inputs[:ROWS], weight, library=library),
            lambda: product(grad[:ROWS], weight.t(), library=library), lambda: weight_gradient(grad, inputs, library))
