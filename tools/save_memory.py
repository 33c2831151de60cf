"""Measure by how much the resident memory of CPU ranks grows during a save: as Megatron gathers, and in slices.

A random Qwen3 model with the distributed optimizer; every way of saving takes turns twice.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers.ranks import run_on_ranks, shutdown_ranks  # noqa: E402
from tests.helpers.saves import growth_of_saves  # noqa: E402
from tests.helpers.toys import run_config, save_model  # noqa: E402

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="data-parallel ranks")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=12, help="layers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--background", action="store_true", help="as checkpoint.async_save does")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", "qwen3", hidden_size=arguments.hidden, vocab_size=4000,
                           intermediate_size=4 * arguments.hidden, num_hidden_layers=arguments.layers)
        by_rank = run_on_ranks(growth_of_saves, arguments.ranks, run_config(model, dtype=arguments.dtype),
                               Path(folder) / "run", arguments.background, timeout_seconds=600.0)
    shutdown_ranks()
    share = statistics.mean(written for results in by_rank for _, written, _ in results)
    print(f"a rank's share of the state: {share / MIB:.0f} MiB")
    for name, first in (("gathered", 0), ("in slices", 1)):
        saves = [result for results in by_rank for result in results[first::2]]
        grown, seconds = max(grown for grown, *_ in saves), max(seconds for *_, seconds in saves)
        print(f"{name}: resident memory of a rank grew by at most {grown / MIB:.0f} MiB, {grown / share:.2f} of the "
              f"share; a rank wrote at most {max(written for _, written, _ in saves) / MIB:.0f} MiB; training waited "
              f"at most {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
