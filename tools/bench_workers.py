"""Time that a run waits for its batches, with the thread of a rank, with workers and with the token cache.

    python tools/bench_workers.py --steps 40 --faster 10 [--workers 0 1 2] [CONFIG.yaml section.key=value ...]

Runs the configuration (by default that of the demonstration, without evaluation and checkpoints) on CPU ranks, once for
each number of workers and once more with token ids that `data tokenize` wrote. With `--faster F` the first two steps
are real; the others sleep for an F-th of the time that the shortest of these took, as a model would that is F times
faster; all else (batches, metrics, logs) is real. Prints the mean time of a step and the mean and largest
`data_wait_seconds` from the sixth step on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children
from small_models import packaged_model

DEMO = "configs/minilm_22m_embed_dp2_cpu.yaml"
QUIET = ("evaluation.retrieval=[]", "checkpoint.directory=null", "checkpoint.export_at_end=null",
         "logging.every_steps=1", "logging.tensorboard=false", "training.epochs=null")
REAL_STEPS, FIRST_COUNTED = 2, 6


def rank(faster: float, arguments: list[str]) -> None:
    """One rank of a run."""
    from megatron_embed.config.load import load_config
    from megatron_embed.run.assemble import run_training
    from megatron_embed.training import loop

    real, seconds, metrics = loop.train_step, [], {}

    def step(batch: object, trainer: object) -> dict[str, float]:
        if faster == 1 or len(seconds) < REAL_STEPS:
            start = time.perf_counter()
            metrics.update(real(batch, trainer))
            seconds.append(time.perf_counter() - start)
        else:
            time.sleep(min(seconds) / faster)
        return dict(metrics)

    loop.train_step = step
    run_training(load_config(arguments[0], arguments[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--faster", type=float, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cache", action="store_true", help="Once more with a token cache and no workers")
    parser.add_argument("config", nargs="*", help="CONFIG.yaml section.key=value ... (default: the demonstration)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args, further = parser.parse_known_args()
    if args.rank:
        rank(args.faster, [*args.config, *further])
        return
    config = args.config or [DEMO, f"model.path={packaged_model()}"]
    print(f"{config[0]}: {args.ranks} ranks, steps {args.faster:g} times as fast, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        cases = [(f"{count} workers" if count else "a thread of each rank", [f"data.workers={count}"])
                 for count in args.workers]
        if args.cache:
            cache = f"data.token_cache={folder}/tokens"
            children.run([sys.executable, "-m", "megatron_embed", "data", "tokenize", *config, cache])
            cases.append(("a thread, token cache", ["data.workers=0", cache]))
        for name, settings in cases:
            measure(name, [*config, *QUIET, *settings, f"training.train_steps={args.steps}"], args, Path(folder))


def measure(name: str, config: list[str], args: argparse.Namespace, folder: Path) -> None:
    """Run once and print a line."""
    logs = folder / name.replace(" ", "_")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks), __file__, "--rank",
               "--faster", str(args.faster), *config, f"logging.directory={logs}"]
    children.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                 env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()][FIRST_COUNTED - 1:]
    step, wait = (statistics.mean(row[key] for row in rows) for key in ("step_seconds", "data_wait_seconds"))
    most = max(row["data_wait_seconds"] for row in rows)
    print(f"  {name + ':':24} {1000 * step:8.1f} ms a step, waiting {1000 * wait:7.2f} ms = {wait / step:6.2%}, at "
          f"most {1000 * most:.1f} ms; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
