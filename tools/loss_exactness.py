"""Compare every loss under data, tensor and pipeline ranks with one process; write the table of docs/objectives.md.

    python tools/loss_exactness.py

The reference is Transformers' BERT in float64, text by text, with Sentence Transformers' class for the loss or, if
there is none, its formula, and plain autograd; under test is one float32 step on CPU ranks over gloo. Exit status 1 if
a gradient differs by more than 1e-5 or a loss by more than 2e-6.
"""

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from megatron_embed.platform.compat import MEGATRON_VERSION  # noqa: E402
from tests.helpers.loss_reference import (  # noqa: E402
    GRADIENT_BOUND,
    LAYOUTS,
    LOSSES,
    VALUE_BOUND,
    Error,
    errors_under,
    references,
)
from tests.helpers.ranks import shutdown_ranks  # noqa: E402

BEGIN, END = "<!-- table of tools/loss_exactness.py -->\n", "<!-- end of the table -->\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "objectives.md",
                        help="page whose table is replaced")
    return parser.parse_args()


def table(by_layout: dict[str, dict[str, Error]]) -> str:
    """Gradient errors with a column per layout, and the largest error of the loss."""
    lines = [f"| loss | {' | '.join(by_layout)} | loss, worst |", f"|---{'|---' * (len(by_layout) + 1)}|"]
    for name in LOSSES:
        errors = [errors[name] for errors in by_layout.values()]
        loss, _, more = name.partition(", ")
        gradients = " | ".join(f"{error.gradient:.1e}" for error in errors)
        lines.append(f"| `{loss}`{f', `{more}`' if more else ''} | {gradients} | "
                     f"{max(error.value for error in errors):.0e} |")
    return "\n".join(lines)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        known = references(Path(folder))
        by_layout = {name: errors_under(*known, *sizes) for name, sizes in LAYOUTS.items()}
    shutdown_ranks()
    errors = [error for by_loss in by_layout.values() for error in by_loss.values()]
    exact = all(error.gradient <= GRADIENT_BOUND and error.value <= VALUE_BOUND for error in errors)
    summary = (f"Worst gradient {max(error.gradient for error in errors):.1e}, worst loss "
               f"{max(error.value for error in errors):.0e}; torch {torch.__version__}, Megatron-Core "
               f"{MEGATRON_VERSION}, {datetime.date.today()}.")
    print(f"{table(by_layout)}\n\n{summary} {'All exact.' if exact else 'NOT EXACT'}")
    if exact:
        page = arguments.output.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        assert end, f"{arguments.output} has no marker for the table"
        arguments.output.write_text(f"{before}{BEGIN}{summary}\n\n{table(by_layout)}\n{END}{after}", encoding="utf-8")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
