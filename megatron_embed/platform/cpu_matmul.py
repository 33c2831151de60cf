"""Measurement of the library that multiplies float32 matrices fastest on this processor, for `model.cpu_matmul`."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from megatron_embed.names import MATMUL_LIBRARIES, MatmulLibrary
from megatron_embed.platform.cpu_linear import DEFAULT_LIBRARIES, Libraries, is_available, product, weight_gradient

ROWS, WEIGHT_GRADIENT_ROWS = 256, 1024
"""Tokens of a measured product. Gradients of weights, sums over tokens, are slower in oneDNN the more tokens there are:
on a Zen 4 held to AVX2, torch takes 0.94 of its time with 512, 0.84 with 2,048 and 0.69 with 8,192."""
MAX_WIDTH = 768
"""Rows and columns of a measured weight; wider ones are as fast per element. In narrower ones the copy that oneDNN's
gradient of a weight takes would count too much: it appears 12 % slower than torch's with 384, where both are equal with
1,536."""
MIN_ELEMENTS = 1 << 16
"""Below this size of the largest weight nothing is measured: the calls take as long as the products."""
ROUNDS, ROUND_SECONDS = 5, 0.03
"""Measurements of a product at most, of which the shortest counts, and processor time after which there is no more; the
libraries take turns."""
CLEAR = 1.25
"""Once a library takes so many times as long as the other, they are not measured again."""
MIN_GAIN = 0.05
"""oneDNN is chosen only where torch's library takes longer by this part of oneDNN's time: if both are equally fast, a
run stays with torch's own choice."""


def fastest_libraries(shapes: Sequence[tuple[int, int]]) -> tuple[Libraries, tuple[float, ...]] | None:
    """Libraries for weights of these shapes, and torch's time over oneDNN's per kind of product.

    None if there is nothing to choose: this torch has no oneDNN for this processor, or the weights are small. No
    communication; draws no random numbers.

    Args:
        shapes: (outer, inner) of weights; the largest is measured.
    """
    if not is_available() or max(map(math.prod, shapes)) < MIN_ELEMENTS:
        return None
    outer, inner = max(shapes, key=math.prod)
    ratios = torch_over_onednn(min(outer, MAX_WIDTH), min(inner, MAX_WIDTH))
    chosen: Libraries = tuple("onednn" if ratio > 1 + MIN_GAIN else "torch" for ratio in ratios)
    return chosen, ratios


@torch.no_grad()
def torch_over_onednn(outer: int, inner: int) -> tuple[float, ...]:
    """Processor time of torch's library over oneDNN's, per kind of product in the order of `model.cpu_matmul`.

    On one thread: several wait for each other in loops that count as processor time, and made ratios between 0.3 and
    4.5 out of 0.8 on a machine with other work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = {library: _products(outer, inner, library) for library in MATMUL_LIBRARIES}
        seconds = [_shortest({library: calls[kind] for library, calls in products.items()})
                   for kind in range(len(DEFAULT_LIBRARIES))]
    finally:
        torch.set_num_threads(threads)
    return tuple(of["torch"] / of["onednn"] for of in seconds)


def _shortest(calls: dict[MatmulLibrary, Callable[[], torch.Tensor]]) -> dict[MatmulLibrary, float]:
    """Processor time of each library's call, the shortest of up to ROUNDS after a first one."""
    shortest, spent = dict.fromkeys(calls, float("inf")), 0.0
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for library, call in calls.items():
            start = time.thread_time()  # hardly changed by other processes
            call()
            seconds = time.thread_time() - start
            shortest[library], spent = min(shortest[library], seconds), spent + seconds
        if max(shortest.values()) > CLEAR * min(shortest.values()) or spent > ROUND_SECONDS:
            break
    return shortest


def _products(outer: int, inner: int, library: MatmulLibrary) -> tuple[Callable[[], torch.Tensor], ...]:
    """The forward pass, the gradient of the input and that of the weight, by one library."""
    inputs, weight = torch.ones(WEIGHT_GRADIENT_ROWS, inner), torch.ones(outer, inner)
    grad = torch.ones(WEIGHT_GRADIENT_ROWS, outer)
    return (lambda: product(inputs[:ROWS], weight, library=library),
            lambda: product(grad[:ROWS], weight.t(), library=library), lambda: weight_gradient(grad, inputs, library))
