"""Compare runs that resume under another layout with an uninterrupted run; write docs/resume_layouts.md.

Runs on CPU ranks of this machine, up to four at a time. Exit code 1 if a loss differs by more than the bound.
"""

import argparse
import datetime
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_embed.platform.compat import MEGATRON_VERSION  # noqa: E402
from tests.checkpoint.moves import ALL_MODULES, BOUND, EXPERTS_ALONE, LAYOUTS, STEPS, STOP, Kind, Moves  # noqa: E402
from tests.helpers.ranks import shutdown_ranks  # noqa: E402

Pair = tuple[str, str]
MOVES_PER_POOL = 20
"""Moves before the workers are replaced: gloo threads of old process groups stay and use both cores."""
GRID = ("1", "DP2", "TP2", "PP2", "CP2", "EP2", "TP2 EP2")
"""Layouts of which every pair is tested."""
EXPERTS = (("1", "EP2"), ("1", "TP2"), ("PP2", "EP2"), ("EP2", "1"), ("EP2", "PP2"))
"""Moves that add or remove a separate optimizer for the experts."""
FURTHER = (("EP2", "EP4"), ("EP4", "EP2"), ("TP2", "TP2 ETP2"), ("TP2 ETP2", "EP2"), ("EP2", "PP2 VPP2"),
           ("PP2 VPP2", "EP2"), ("DP2 PP2 EP2", "1"), ("1", "DP2 PP2 EP2"), ("DP2 PP2 EP2", "TP2 EP2"))
DENSE = (("1", "TP2"), ("TP2", "PP2"), ("PP2", "DP2"), ("DP2", "PP2 VPP2"), ("PP2 VPP2", "CP2"), ("CP2", "1"))
PLAN: tuple[tuple[Kind, tuple[Pair, ...]], ...] = (
    (Kind(), (*itertools.permutations(GRID, 2), *FURTHER)),
    (Kind(distributed=False), (*EXPERTS, *FURTHER)), (Kind(adapters=ALL_MODULES), (*EXPERTS, *FURTHER)),
    (Kind(distributed=False, adapters=ALL_MODULES), EXPERTS), (Kind(adapters=EXPERTS_ALONE), EXPERTS),
    (Kind(distributed=False, adapters=EXPERTS_ALONE), EXPERTS), (Kind(dense=True), DENSE),
    (Kind(dense=True, distributed=False), DENSE))

INTRODUCTION = """# Resuming under another layout

A run may be stopped and resumed with another number of ranks and another parallel layout. A checkpoint does not depend
on how the model or the optimizer's state was split, so every layout can read the checkpoint of any other. That includes
mixtures of experts, whose experts have an optimizer of their own where they are split differently from the rest of the
model (EP above 1, or ETP that differs from TP).

This page is generated. Regenerate it with

    python tools/resume_layouts.py

**A move.** {steps} steps of a model with four layers (float32, CPU ranks over gloo, real text from
`examples/data/mini_en`) under one layout, saved after step {stop}; from there the run resumes under the other layout.
The difference is the largest between its losses in steps {first} to {steps} and those of an uninterrupted run on one
rank. It must be below {bound:g}; the losses are about 2.6 and change by 0.2 from step to step.

**Columns.** From, to: TP, PP, CP, EP and VPP as in [parallelism](parallelism.md), DP is the rest of the ranks; with
TP the experts are not split (ETP 1) unless ETP is given. Ranks: before and after. What: `-` is a Qwen3-MoE with four
experts in each layer, all parameters trained, with the distributed optimizer; other rows name the difference.

"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(ROOT / "docs" / "resume_layouts.md"))
    parser.add_argument("--all", action="store_true", help="every pair of all layouts, for every kind of run")
    parser.add_argument("--only", default="", help="only moves FROM -> TO that contain this; nothing is written")
    return parser.parse_args()


def moves(everything: bool, only: str) -> Iterator[tuple[Kind, Pair]]:
    """Moves to test."""
    for kind, pairs in PLAN:
        for pair in itertools.permutations(LAYOUTS, 2) if everything else pairs:
            if only in " -> ".join(pair):
                yield kind, pair


def row(kind: Kind, pair: Pair, difference: float) -> str:
    """A line of the table."""
    ranks = " -> ".join(str(LAYOUTS[name].ranks) for name in pair)
    return f"| {kind} | {pair[0]} | {pair[1]} | {ranks} | {difference:.1e} |"


def main() -> int:
    arguments = parse_arguments()
    started, lines, worst, wrong = time.monotonic(), [], 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[Kind, Moves] = {}
        for index, (kind, pair) in enumerate(moves(arguments.all, arguments.only)):
            if kind not in runs:
                runs[kind] = Moves(Path(folder) / str(len(runs)), kind)
            difference = runs[kind].difference(*pair)
            lines.append(row(kind, pair, difference))
            print(lines[-1], "" if difference < BOUND else "WRONG", flush=True)
            worst, wrong = max(worst, difference), wrong + (difference >= BOUND)
            if index % MOVES_PER_POOL == MOVES_PER_POOL - 1:
                shutdown_ranks()
    shutdown_ranks()
    print(f"{len(lines)} moves, {wrong} wrong, largest difference {worst:.1e}, "
          f"{(time.monotonic() - started) / 60:.0f} minutes")
    if not arguments.only:
        head = INTRODUCTION.format(steps=STEPS, stop=STOP, first=STOP + 1, bound=BOUND)
        command = " ".join(["python tools/resume_layouts.py", *(["--all"] if arguments.all else [])])
        made = (f"{len(lines)} moves on {datetime.date.today()} by `{command}`, Megatron-Core {MEGATRON_VERSION}, "
                f"Python {platform.python_version()}. Largest difference: {worst:.1e}.\n\n")
        table = "\n".join(["| what | from | to | ranks | difference |", "|---|---|---|---|---|", *lines])
        Path(arguments.output).write_text(head + made + table + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
