"""Cost of the rows' set-up: CPU time per row, memory per rank and growth, at several numbers of rows and two ranks.

    python tools/bench_index.py --rows 1000000 4000000 --ranks 2 --directory /tmp/bench [--before OTHER_CHECKOUT]

Generates short JSONL rows (kept for the next call), then starts as many processes as ranks, each of which does what
`train` does before its first step: opens the rows, holds out 1 %, makes the sampler and asks for one step; and, with
the index there, the same again at step 12,000 as a resumed run would, and at 20 random steps. `--before`: a checkout of
an earlier version, measured beside it in the same way, each of its ranks reading all rows. Prints one line per
measurement, then growth exponents. CPU time is that of the set-up alone, without imports, of all ranks together.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import children
from measurement import exit_on_signals

SETUP = """
import json, os, sys, time
path, directory, rank, ranks, step, barrier = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6]
from megatron_embed.config.data import DataConfig, TrainFile
from megatron_embed.data.dataset import hold_out, open_records
from megatron_embed.data.mixture import build_sampler
def status():
    lines = open("/proc/self/status").read().split("\\n")
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
open(f"{barrier}.{rank}", "w").close()
while not all(os.path.exists(f"{barrier}.{other}") for other in range(ranks)):
    time.sleep(0.01)
before, cpu, wall = status(), time.process_time(), time.monotonic()
place = {}
if directory != "before":
    from megatron_embed.data.index_store import IndexPlace
    place = {"place": IndexPlace(directory=directory, rank=rank, world_size=ranks)}

records = open_records((TrainFile(path=path),), **place)
marks = [("open", time.process_time())]
train, held = hold_out(records, 0.01, 1)
marks.append(("hold_out", time.process_time()))
sampler = build_sampler(train, DataConfig(), global_batch_size=1024, seed=1)
marks.append(("sampler", time.process_time()))
rows = sampler.rows_of_step(step)
marks.append(("step", time.process_time()))
wall, total = time.monotonic() - wall, time.process_time() - cpu
anonymous = status()["RssAnon"]
texts = [train[row].query for row in rows]
random_steps = []
if directory != "before":
    import numpy as np
    for wanted in np.random.default_rng(7).integers(0, 3 * len(train) // 1024, 20).tolist():
        started = time.monotonic()
        build_sampler(train, DataConfig(), global_batch_size=1024, seed=1).rows_of_step(wanted)
        random_steps.append(time.monotonic() - started)
starts = [cpu, *(at for _, at in marks)]
print(json.dumps({"cpu": total, "wall": wall, "anon": anonymous, "peak": status()["VmHWM"],
                  "grown": anonymous - before["RssAnon"], "rows": len(records), "first": rows[:3],
                  "random": random_steps,
                  "parts": {name: at - start for (name, at), start in zip(marks, starts)}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--directory", type=Path, required=True, help="For rows and indexes; indexes are removed")
    parser.add_argument("--before", type=Path, help="A checkout of an earlier version, for the same rows")
    parser.add_argument("--before-rows", type=int, default=1_000_000, help="Most rows that it is measured with")
    args = parser.parse_args()
    exit_on_signals()
    args.directory.mkdir(parents=True, exist_ok=True)
    here, first = Path(__file__).resolve().parent.parent, {}
    for count in args.rows:
        path = generated(args.directory, count)
        print(f"{count:,} rows, {path.stat().st_size / 1e9:.2f} GB, {args.ranks} ranks, load "
              f"{os.getloadavg()[0]:.1f}")
        if args.before is not None and count <= args.before_rows:
            measure("before, each start", args.before, path, "before", args.ranks, 0)
        index = args.directory / "index"
        shutil.rmtree(index, ignore_errors=True)
        first[count] = measure("first start", here, path, str(index), args.ranks, 0)
        measure("second start, at step 12,000", here, path, str(index), args.ranks, 12_000)
        size = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
        print(f"  index: {size / count:.1f} bytes a row on the disk")
        shutil.rmtree(index)
    counts = sorted(first)
    for less, more in itertools.pairwise(counts):
        exponent = math.log(first[more] / first[less]) / math.log(more / less)
        print(f"first start, {less:,} to {more:,} rows: CPU time grows with exponent {exponent:.2f}")


def generated(directory: Path, count: int) -> Path:
    """A file of short rows: two to five words of a query, one positive; every hundredth positive is one of a thousand.
    """
    path = directory / f"rows_{count}.jsonl"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="ascii") as file:
            for start in range(0, count, 10_000):
                rows = range(start, min(start + 10_000, count))
                file.write("".join(f'{{"query": "what is {row * 2654435761 % 4294967296:x}", "positive": "it is '
                                   f'{row % 1000 if row % 100 == 7 else row:x}"}}\n' for row in rows))
        unfinished.rename(path)
    return path


def measure(what: str, checkout: Path, path: Path, directory: str, ranks: int, step: int) -> float:
    """Print one line; the CPU seconds of all ranks together."""
    barrier = path.with_name(f"barrier_{os.getpid()}_{time.time_ns()}")
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(ranks):
            processes.append(subprocess.Popen(
                [sys.executable, "-c", SETUP, str(path), directory, str(rank), str(ranks), str(step), str(barrier)],
                cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}))
        results = [json.loads(process.communicate()[0]) for process in processes]
    finally:
        children.end(processes)
        for file in path.parent.glob(f"{barrier.name}.*"):
            file.unlink()
    cpu, rows = sum(result["cpu"] for result in results), results[0]["rows"]
    parts = ", ".join(f"{name} {sum(result['parts'][name] for result in results):.2f}" for name in results[0]["parts"])
    print(f"  {what + ':':30} {cpu:8.2f} CPU s of all ranks ({parts}), {1e6 * cpu / rows:7.2f} us a row, "
          f"{max(result['wall'] for result in results):7.2f} s; RssAnon a rank "
          f"{max(result['anon'] for result in results) / 2**20:.0f} MiB, grown by "
          f"{max(result['grown'] for result in results) / rows:.1f} bytes a row; peak "
          f"{max(result['peak'] for result in results) / 2**20:.0f} MiB", flush=True)
    if seconds := results[0]["random"]:
        print(f"    20 random steps of three epochs, each by a new sampler: {1000 * sum(seconds) / 20:.0f} ms on "
              f"average, {1000 * max(seconds):.0f} ms at most", flush=True)
    return cpu


if __name__ == "__main__":
    main()
