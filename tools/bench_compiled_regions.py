"""What `torch.compile` would gain on CPU ranks: the element-wise regions of a layer, plain against compiled, in turn.

    python tools/bench_compiled_regions.py [--tokens 1024] [--dtype float32] [--rounds 9]

The regions are those of kernels/reference.py with the shapes of a Qwen3-0.6B layer, forward and backward; the products
of the same layer are timed beside them, so that the last line says what share of a step the difference is. Needs a C++
compiler.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_embed.kernels import reference

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, EPS = 1024, 3072, 16, 8, 128, 1e-6


def regions(tokens: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    """Name -> (function, arguments) of the regions of one layer."""
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    x, weight, rstd = random(tokens, HIDDEN), random(HIDDEN), torch.rand(tokens) + 0.5
    mixed = random(tokens, GROUPS, HEADS // GROUPS + 2, HEAD_DIM)
    q_weight, k_weight, angles = random(HEAD_DIM), random(HEAD_DIM), random(2, tokens, HEAD_DIM // 2)
    q, k = random(tokens, HEADS, HEAD_DIM), random(tokens, GROUPS, HEAD_DIM)
    gate_up, gradient = random(tokens, 2 * FFN), random(tokens, FFN)
    return {
        "residual + RMSNorm": (reference.add_rms_norm, (x, x, weight, EPS)),
        "its backward": (reference.rms_norm_backward, (x, x, weight, rstd, x, True)),
        "q and k norm, rotary": (reference.qkv_rotary, (mixed, angles, q_weight, k_weight, HEADS, EPS)),
        "their backward": (reference.qkv_rotary_backward, (q, k, k, angles, mixed, q_weight, k_weight,
                                                           torch.rand(tokens, HEADS + GROUPS) + 0.5)),
        "SwiGLU": (reference.glu, (gate_up, "silu")),
        "SwiGLU's backward": (reference.glu_backward, (gradient, gate_up, "silu")),
    }


def swiglu_backward(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    """reference.glu_backward without results in views, which the compiler of torch 2.13 cannot take."""
    gate, up = x.chunk(2, dim=-1)
    assert activation == "silu"
    return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * torch.nn.functional.silu(gate)), -1)


COMPILED = {"SwiGLU's backward": swiglu_backward}
"""What is compiled in place of the plain function."""
PER_LAYER = {"residual + RMSNorm": 2, "its backward": 2}
"""How often a region occurs in a layer; the others once."""


def products(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products of one layer's forward and backward."""
    shapes = [(HIDDEN, (HEADS + 2 * GROUPS) * HEAD_DIM), (HEADS * HEAD_DIM, HIDDEN), (HIDDEN, 2 * FFN), (FFN, HIDDEN)]
    operands = [(torch.randn(tokens, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(tokens, n).to(dtype))
                for k, n in shapes]

    def run() -> None:
        for x, weight, gradient in operands:
            x @ weight.T
            gradient @ weight
            gradient.T @ x

    return run


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def largest_difference(left: object, right: object) -> float:
    """Relative to the largest value, over all tensors of two results."""
    pairs = [(left, right)] if isinstance(left, Tensor) else list(zip(left, right, strict=True))  # type: ignore[call-overload]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() for a, b in pairs
               if isinstance(a, Tensor) and a.numel())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    product = products(args.tokens, dtype)
    product()
    product_time = statistics.median(milliseconds(product) for _ in range(args.rounds))
    plain_sum = compiled_sum = 0.0
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
          f"{args.dtype}, {args.tokens} tokens\n\n| region of a layer | plain ms | compiled ms | ratio | difference |\n"
          "|---|---|---|---|---|")
    for name, (function, arguments) in regions(args.tokens, dtype).items():
        compiled = torch.compile(COMPILED.get(name, function), dynamic=True)
        difference = largest_difference(function(*arguments), compiled(*arguments))
        times = [(milliseconds(lambda: function(*arguments)),  # noqa: B023  called at once
                  milliseconds(lambda: compiled(*arguments)))  # noqa: B023
                 for _ in range(args.rounds)]
        plain, fast = (statistics.median(column) for column in zip(*times, strict=True))
        plain_sum += plain * PER_LAYER.get(name, 1)
        compiled_sum += fast * PER_LAYER.get(name, 1)
        print(f"| {name} | {plain:.2f} | {fast:.2f} | {plain / fast:.2f} | {difference:.1e} |", flush=True)
    print(f"\nproducts of a layer {product_time:.1f} ms, regions {plain_sum:.1f} plain, {compiled_sum:.1f} compiled: "
          f"the step would take {(product_time + compiled_sum) / (product_time + plain_sum):.3f} of its time, "
          "attention and loss not counted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
