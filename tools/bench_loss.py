"""InfoNCE forward and backward: memory, speed and difference of the tiled closed form against plain autograd.

    python tools/bench_loss.py

1. Memory: 65,536 candidates x 1,024 dims, 8,192 local rows; peak resident memory beyond the inputs and their gradients.
   The plain form would need several [rows, candidates] matrices (2 GiB each).
2. Speed and difference at a size that fits the plain form, in turn, in one process: 2,048 rows x 16,384 candidates x
   1,024 dims.
"""

import argparse
import resource
import statistics
import time

import torch
from torch import Tensor

from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, contrastive_gradients, info_nce

TEMPERATURE = 0.05


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tiled(query: Tensor, document: Tensor, positives: Tensor) -> tuple[float, Tensor, Tensor]:
    grad = contrastive_gradients(query, Candidates(document=document, positive_index=positives),
                                 ContrastiveSettings(temperature=TEMPERATURE), total=len(query))
    return float(grad.sums.loss) / len(query), grad.anchor, grad.document


def plain(query: Tensor, document: Tensor, positives: Tensor) -> tuple[float, Tensor, Tensor]:
    query, document = query.clone().requires_grad_(), document.clone().requires_grad_()
    loss = info_nce(query, document, positives, TEMPERATURE)
    grad_query, grad_document = torch.autograd.grad(loss, (query, document))
    return loss.item(), grad_query, grad_document


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def measure_memory(rows: int, candidates: int, dim: int) -> None:
    query, document = unit_rows(rows, dim, 0), unit_rows(candidates, dim, 1)
    positives = torch.arange(rows) * (candidates // rows)
    tiled(query[:256], document[:256], torch.arange(256))  # allocates the buffers of the math library
    # The gradients are outputs, not overhead: allocate as much memory as they need before reading the peak.
    outputs = [torch.ones_like(query), torch.ones_like(document)]
    before = peak_mib()
    del outputs
    start = time.perf_counter()
    loss, _, _ = tiled(query, document, positives)
    seconds = time.perf_counter() - start
    print(f"{rows} rows x {candidates} candidates x {dim}: loss {loss:.4f}, {seconds:.1f} s, "
          f"{peak_mib() - before:.0f} MiB beyond inputs and gradients "
          f"(one [rows, candidates] matrix: {rows * candidates * 4 / 2**20:.0f} MiB)")


def measure_speed(rows: int, candidates: int, dim: int, rounds: int) -> None:
    query, document = unit_rows(rows, dim, 2), unit_rows(candidates, dim, 3)
    positives = torch.randperm(candidates, generator=torch.Generator().manual_seed(4))[:rows]
    forms = {"plain": plain, "tiled": tiled}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results = {}
    for round_index in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            results[name] = form(query, document, positives)
            if round_index:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds["tiled"], seconds["plain"], strict=True))
    print(f"{rows} rows x {candidates} candidates x {dim}: plain {statistics.median(seconds['plain']):.2f} s, "
          f"tiled {statistics.median(seconds['tiled']):.2f} s, ratio {ratio:.3f} (median of {rounds} pairs)")
    print(f"agreement: loss {abs(results['plain'][0] - results['tiled'][0]):.1e}, gradient of queries "
          f"{relative(results['tiled'][1], results['plain'][1]):.1e}, of documents "
          f"{relative(results['tiled'][2], results['plain'][2]):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    measure_memory(8192, 65536, 1024)
    measure_speed(2048, 16384, 1024, arguments.rounds)


if __name__ == "__main__":
    main()
