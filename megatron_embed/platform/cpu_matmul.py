"""Measurement of the library that multiplies float32 matrices fastest on this processor, for `model.cpu_matmul`."""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch

from megatron_embed.names import MATMUL_LIBRARIES, MatmulLibrary
from megatron_embed.platform.cpu_linear import DEFAULT_LIBRARIES, Libraries, is_available, product, weight_gradient

ROWS, WEIGHT_GRADIENT_ROWS = 256, 1024
"""Tokens of a measured product of a training run. Gradients of weights, sums over tokens, are slower in oneDNN the more
tokens there are: on a Zen 4 held to AVX2, torch takes 0.94 of its time with 512, 0.84 with 2,048 and 0.69 with
8,192."""
FORWARD_ROWS = 64
"""Tokens of a forward product that is measured alone, a millisecond on one Zen 3 core; of 32 to 1,024 the ratio of the
libraries was within 0.05 of its mean."""
MAX_WIDTH = 768
"""Rows and columns of a measured weight; wider ones are as fast per element. In narrower ones the copy that oneDNN's
gradient of a weight takes would count too much: it appears 12 % slower than torch's with 384, where both are equal with
1,536."""
MIN_ELEMENTS = 1 << 16
"""Below this size of the largest weight nothing is measured: the calls take as long as the products."""
MIN_ROUNDS, ROUNDS, ROUND_SECONDS = 2, 5, 0.03
"""Measurements of a product, of which the shortest counts: at least, at most, and processor time after which there are
no more than the least; the libraries take turns."""
CLEAR = 1.25
"""Once a library has taken so many times as long as the other twice in a row, they are not measured again."""
MIN_GAIN = 0.05
"""oneDNN is chosen only where torch's library takes longer by this part of oneDNN's time: if both are equally fast, a
run stays with torch's own choice."""


def fastest_libraries(shapes: Sequence[tuple[int, int]], *, forward_only: bool = False) -> tuple[
        Libraries, tuple[float, ...]] | None:
    """Libraries for weights of these shapes, and torch's time over oneDNN's per kind of product that was measured.

    None if there is nothing to choose: this torch has no oneDNN for this processor, or the weights are small. No
    communication; draws no random numbers.

    The largest weight decides for all: the others would choose the same. On one Zen 3 core (AVX2, torch 2.13) torch's
    time over oneDNN's with 2,048 tokens was

    | weight | forward pass | gradient of the input | gradient of the weight |
    |---|---|---|---|
    | 384 x 384 | 0.88 | 0.94 | 0.64 |
    | 1,152 x 384 | 0.92 | 0.73 | 0.65 |
    | 1,536 x 384 | 0.94 | 0.76 | 0.62 |
    | 384 x 1,536 | 0.82 | 0.85 | 0.61 |
    | 768 x 768 | 0.91 | 0.74 | 0.62 |
    | 2,304 x 768 | 0.90 | 0.69 | 0.55 |
    | 3,072 x 768 | 0.95 | 0.65 | 0.43 |
    | 768 x 3,072 | 0.91 | 0.52 | 0.43 |

    and with 256 tokens 0.77 to 1.02, 0.59 to 0.97, 0.53 to 0.98: torch's library for every one of them.

    Args:
        shapes: (outer, inner) of weights; the largest is measured.
        forward_only: measure the forward pass alone, once per process and shape, in 10 to 20 milliseconds; the
            gradients' libraries are then the default.
    """
    if not is_available() or max(map(math.prod, shapes)) < MIN_ELEMENTS:
        return None
    outer, inner = max(shapes, key=math.prod)
    outer, inner = min(outer, MAX_WIDTH), min(inner, MAX_WIDTH)
    ratios = (_forward_ratio(outer, inner),) if forward_only else torch_over_onednn(outer, inner)
    chosen: Libraries = tuple("onednn" if ratio > 1 + MIN_GAIN else "torch" for ratio in ratios)
    return (*chosen, *DEFAULT_LIBRARIES[len(chosen):]), ratios


@functools.cache
def _forward_ratio(outer: int, inner: int) -> float:
    """`torch_over_onednn` of the forward pass."""
    (ratio,) = torch_over_onednn(outer, inner, kinds=(0,), rows=FORWARD_ROWS)
    return ratio


@torch.no_grad()
def torch_over_onednn(outer: int, inner: int, *, kinds: Sequence[int] = (0, 1, 2), rows: int = ROWS) -> tuple[
        float, ...]:
    """Processor time of torch's library over oneDNN's, per kind of product in the order of `model.cpu_matmul`.

    On one thread: several wait for each other in loops that count as processor time, and made ratios between 0.3 and
    4.5 out of 0.8 on a machine with other work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = {library: _products(outer, inner, rows, library) for library in MATMUL_LIBRARIES}
        seconds = [_shortest({library: calls[kind] for library, calls in products.items()}) for kind in kinds]
    finally:
        torch.set_num_threads(threads)
    return tuple(of["torch"] / of["onednn"] for of in seconds)


def _shortest(calls: dict[MatmulLibrary, Callable[[], torch.Tensor]]) -> dict[MatmulLibrary, float]:
    """Processor time of each library's call, the shortest of MIN_ROUNDS to ROUNDS after a first one."""
    shortest, spent, winners = dict.fromkeys(calls, float("inf")), 0.0, list[MatmulLibrary | None]()
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        seconds = dict[MatmulLibrary, float]()
        for library, call in calls.items():
            start = time.thread_time()  # hardly changed by other processes
            call()
            seconds[library] = time.thread_time() - start
            shortest[library], spent = min(shortest[library], seconds[library]), spent + seconds[library]
        winners.append(_clear_winner(seconds))
        agree = len(winners) >= MIN_ROUNDS and winners[-1] is not None and winners[-1] == winners[-2]
        if agree or (len(winners) >= MIN_ROUNDS and spent > ROUND_SECONDS):
            break
    return shortest


def _clear_winner(seconds: dict[MatmulLibrary, float]) -> MatmulLibrary | None:
    """The library that is faster by CLEAR in one round; None: neither."""
    return min(seconds, key=seconds.__getitem__) if max(seconds.values()) > CLEAR * min(seconds.values()) else None


def _products(outer: int, inner: int, rows: int, library: MatmulLibrary) -> tuple[Callable[[], torch.Tensor], ...]:
    """The forward pass and the gradient of the input of so many tokens and that of the weight, by one library."""
    inputs, weight = torch.ones(WEIGHT_GRADIENT_ROWS, inner), torch.ones(outer, inner)
    grad = torch.ones(WEIGHT_GRADIENT_ROWS, outer)
    return (lambda: product(inputs[:rows], weight, library=library),
            lambda: product(grad[:rows], weight.t(), library=library), lambda: weight_gradient(grad, inputs, library))
