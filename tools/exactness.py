"""Compares the gradients of one training step under every layout with one process; writes docs/exactness.md.

Runs on CPU ranks of this machine, up to eight at a time. Exit code 1 if a case is not exact.
"""

import argparse
import datetime
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from megatron_embed.platform.compat import MEGATRON_VERSION  # noqa: E402
from tests.helpers.curves import loss_curve  # noqa: E402
from tests.helpers.embedding_reference import EmbeddingReference, Outcome  # noqa: E402
from tests.helpers.exactness_cases import (  # noqa: E402
    BOUND,
    CURVE_BOUND,
    CURVE_LAYOUTS,
    CURVE_STEPS,
    LOSS_BOUND,
    ROWS,
    Case,
    all_cases,
)
from tests.helpers.ranks import shutdown_ranks  # noqa: E402

STEPS_PER_POOL = 40
"""Then new workers: gloo threads of old process groups stay behind, hundreds after 200 cases, and take both cores."""
MODELS = {"qwen3": "Qwen3", "bert": "BERT", "qwen3_moe": "Qwen3-MoE"}

INTRODUCTION = """# Exactness

The negatives of a query are all documents of the global batch, whatever the layout, and the gradient is that of the
mean loss over the global batch. Here every layout is held against one process.

Regenerate this page with

    python tools/exactness.py

**Reference.** Transformers' own model in float64, one text at a time, InfoNCE over the whole batch, plain autograd. It
shares no code with the trainer's step, model or packing.

**Under test.** float32 on CPU ranks over gloo: a configuration, the weights of a Hugging Face directory, ragged real
text from `examples/data/mini_en` through the data loader (row r has r mod 4 hard negatives), Megatron's
DistributedDataParallel, one step of two passes (one pass where M = 1 or negatives are those of a micro-batch). Models
have 4 layers; Qwen3 and Qwen3-MoE have 8 heads over 4 key/value heads, Qwen3-MoE has 4 experts of which 2 are chosen.
The shards of all ranks are compared,
every copy of a shard included; those of the distributed optimizer are gathered first.

**Error** of a case: the largest over all parameters of |g - g*| / max(|g*|, 1e-6 |G*|), L2 norms, g* the reference's
gradient of the parameter and G* all of its gradients together. Bound: {bound:g}. The loss must agree to {loss_bound:g}
(relative), and so must, to {bound:g}, the gradient norm that the optimizer computes for clipping.

**Columns.** M: micro-batches per step and data-parallel rank; with a token budget (`micro_batch_tokens`) the ranks come
with the numbers given and are brought to the largest, by dividing micro-batches or, where none can be divided, running
one again. masked: queries, positives and documents repeat over the ranks, and `mask_duplicates` is on; the reference
compares texts. micro-batch negatives: `negatives: micro_batch`; the reference compares each query with the documents
of its micro-batch over the data-parallel ranks. DO: distributed optimizer. aux: coefficient of the
load-balancing loss; above 0 the reference adds the same loss of the same micro-batches, averaged over them. Steps: how
often the step was repeated; the error is the worst one, and every one was within the bound. SP is on wherever TP is,
unless said otherwise. EP and ETP split the experts over the ranks that the other sizes make; they add none.

"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(ROOT / "docs" / "exactness.md"))
    parser.add_argument("--only", default="", help="only cases whose name contains this; nothing is written")
    return parser.parse_args()


def run_cases(oracle: EmbeddingReference, cases: Sequence[Case]) -> list[tuple[Case, Outcome]]:
    """Every case, layout by layout, a line of progress each."""
    results, steps = [], 0
    for _, group in itertools.groupby(cases, key=lambda case: case.layout):
        same_layout = list(group)
        steps += sum(case.repeats for case in same_layout)
        for case, outcome in zip(same_layout, oracle.run(same_layout, timeout_seconds=1800.0), strict=True):
            verdict = "exact" if outcome.exact else f"WRONG in {outcome.wrong_steps} steps, {outcome}"
            print(f"{case}: {outcome.error:.1e} {verdict}", flush=True)
            results.append((case, outcome))
        if steps > STEPS_PER_POOL:
            shutdown_ranks()
            steps = 0
    return results


def notes(case: Case) -> str:
    words = [f"recompute {case.recompute}"] if case.recompute != "none" else []
    words += ["masked"] if ROWS[case.rows].masked else []
    words += ["micro-batch negatives"] if case.negatives == "micro_batch" else []
    words += [f"{case.tokens} tokens"] if case.tokens else []
    return ", ".join(words)


def table(results: Sequence[tuple[Case, Outcome]]) -> str:
    lines = ["| model | layout | ranks | M | DO | aux | tokens | candidates | loss | loss error | norm error | steps | "
             "error | parameter with it | |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for case, outcome in results:
        micro_batches = case.micro_batches or " or ".join(map(str, sorted(set(outcome.bins))))
        lines.append(
            f"| {MODELS[case.kind]} | {case.layout} | {case.layout.ranks} | {micro_batches} | "
            f"{'yes' if case.distributed else 'no'} | {case.aux:g} | {outcome.tokens} | "
            f"{outcome.reference.candidates} | "
            f"{outcome.loss:.4f} | {outcome.loss_error:.0e} | {outcome.norm_error:.0e} | {case.repeats} | "
            f"{outcome.error:.1e} | `{outcome.worst}` | {notes(case)} |")
    return "\n".join(lines)


def curves(folder: Path) -> tuple[str, bool]:
    """The section on loss curves, and whether they agree."""
    found = {layout: loss_curve(folder, layout) for layout in CURVE_LAYOUTS}
    first = found[CURVE_LAYOUTS[0]]
    gaps = {layout: max(abs(a - b) for a, b in zip(first, losses, strict=True)) for layout, losses in found.items()}
    lines = ["| layout | ranks | first loss | last loss | largest difference to 1 rank |", "|---|---|---|---|---|"]
    lines += [f"| {layout} | {layout.ranks} | {losses[0]:.6f} | {losses[-1]:.6f} | {gaps[layout]:.1e} |"
              for layout, losses in found.items()]
    return "\n".join(lines), all(gap <= CURVE_BOUND for gap in gaps.values())


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        oracle = EmbeddingReference(Path(name))
        results = run_cases(oracle, [case for case in all_cases() if arguments.only in str(case)])
        exact = all(outcome.exact for _, outcome in results)
        if not arguments.only:
            curve_table, agree = curves(Path(name))
            exact = exact and agree
    shutdown_ranks()
    worst = max(outcome.error for _, outcome in results)
    steps = sum(case.repeats for case, _ in results)
    summary = (f"{len(results)} cases, {steps} steps, worst error {worst:.1e}; torch {torch.__version__}, "
               f"Megatron-Core {MEGATRON_VERSION}, Python {platform.python_version()}, {datetime.date.today()}")
    print(f"{summary}; {(time.monotonic() - started) / 60:.0f} minutes; {'all exact' if exact else 'NOT EXACT'}")
    if not arguments.only and exact:
        page = (INTRODUCTION.format(bound=BOUND, loss_bound=LOSS_BOUND) + f"## Gradients\n\n{summary}.\n\n"
                f"{table(results)}\n\n## Loss curves\n\nQwen3, {CURVE_STEPS} steps of AdamW (learning rate 1e-3) on "
                f"the same rows, 16 queries per step; bound {CURVE_BOUND:g}.\n\n{curve_table}\n")
        Path(arguments.output).write_text(page, encoding="utf-8")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
