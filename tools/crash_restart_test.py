"""Crash-restart test: kill a training run with SIGKILL repeatedly, half of the times during a save, and restart it.

A run of two data-parallel ranks under torchrun is killed at random moments and restarted with the same command. Its
loss curve and its weights must equal those of an uninterrupted run bit for bit. Writes docs/crash_restart.md.

    python tools/crash_restart_test.py
"""

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
import torch
import yaml
from measurement import exit_on_signals
from safetensors.torch import load_file
from small_models import save_random_model

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2
SAVE_EVERY_STEPS = 2
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "in_batch_accuracy", "margin")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "crash_restart.md"))
    return parser.parse_args()


def write_model(folder: Path) -> str:
    """A small BERT of random weights, large enough that a save takes a while."""
    return save_random_model(folder, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)


def write_configuration(folder: Path, model: str, train_steps: int) -> Path:
    """Write a configuration with dropout, so that the random state must be restored too."""
    values = {
        "model": {"path": model, "dtype": "float32"}, "embedding": {"pooling": "mean"},
        "objective": {"temperature": 0.1},
        "data": {"train": [str(REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl")], "num_negatives": 1,
                 "query_max_length": 32, "document_max_length": 64},
        "training": {"global_batch_size": 16, "micro_batch_size": 4, "train_steps": train_steps, "warmup_steps": 2,
                     "learning_rate": 1.0e-3, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "checkpoint": {"directory": str(folder / "run"), "save_every_steps": SAVE_EVERY_STEPS, "keep": 2},
        "logging": {"every_steps": 1, "tensorboard": False}}
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(configuration: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m",
               "megatron_embed", "train", str(configuration)]
    with (configuration.parent / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log,
                                start_new_session=True)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to torchrun and to every rank, which has its own session, at once."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for pid in (process.pid, *map(int, children)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    time.sleep(0.2)


def unfinished(run: Path) -> list[Path]:
    """Unfinished checkpoints, recognized by their temporary names."""
    return [entry for entry in run.glob(".step_*.tmp") if ".old." not in entry.name] if run.is_dir() else []


def steps_logged(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def kill_once(configuration: Path, *, during_save: bool, chance: random.Random) -> str:
    """Let the run continue for a random time, then kill it. Returns what it was doing: `save`, `step` or `end`."""
    run, process = configuration.parent / "run", start(configuration)
    try:
        first = len(steps_logged(run)) // SAVE_EVERY_STEPS * SAVE_EVERY_STEPS
        wanted = first + chance.randint(1, 2 * SAVE_EVERY_STEPS)
        stale = set(unfinished(run))
        while process.poll() is None:
            if during_save:
                if any(entry not in stale or stale != set(unfinished(run)) for entry in unfinished(run)):
                    time.sleep(chance.uniform(0.0, 0.06))
                    break
                stale &= set(unfinished(run))
                time.sleep(0.001)
            elif len(steps_logged(run)) >= wanted:
                time.sleep(chance.uniform(0.0, 0.3))
                break
            else:
                time.sleep(0.01)
        if process.poll() is not None:
            if process.returncode:
                sys.exit((configuration.parent / "log").read_text(encoding="utf-8")[-3000:])
            return "end"
        kill_all(process)
        return "save" if unfinished(run) else "step"
    finally:
        children.end([process])


def finish(configuration: Path) -> list[tuple[Any, ...]]:
    """Run to the end. Returns the loss curve."""
    process = start(configuration)
    try:
        process.wait()
    finally:
        children.end([process])
    if process.returncode:
        sys.exit((configuration.parent / "log").read_text(encoding="utf-8")[-3000:])
    lines = steps_logged(configuration.parent / "run")
    return [tuple(line[key] for key in COMPARED) for line in lines]


def exported(configuration: Path) -> dict[str, torch.Tensor]:
    target = configuration.parent / "hf"
    subprocess.run([sys.executable, "-m", "megatron_embed", "convert", "megatron-to-hf",
                    str(configuration.parent / "run"), str(target)], cwd=REPOSITORY, check=True)
    return load_file(target / "model.safetensors")


def main() -> int:
    arguments = parse_arguments()
    exit_on_signals()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "model")
        steps = 4 * arguments.kills
        straight = write_configuration(Path(name) / "straight", model, steps)
        killed = write_configuration(Path(name) / "killed", model, steps)
        expected = finish(straight)
        kills: list[tuple[str, int]] = []
        while len(kills) < arguments.kills:
            in_save = sum(doing == "save" for doing, _ in kills)
            doing = kill_once(killed, during_save=in_save < len(kills) - in_save + 1, chance=chance)
            if doing == "end":
                sys.exit(f"the run ended after {len(kills)} kills; use more steps")
            kills.append((doing, len(steps_logged(killed.parent / "run"))))
            print(f"kill {len(kills)}: during a {doing}, {kills[-1][1]} steps logged", flush=True)
        resumed = finish(killed)
        one, other = exported(straight), exported(killed)
    in_save = sum(doing == "save" for doing, _ in kills)
    same_curve = resumed == expected and len(resumed) == steps and len(set(resumed)) == steps
    same_weights = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    result = (f"{len(kills)} kills, {in_save} of them during a save; {steps} steps; loss curve bit for bit equal: "
              f"{same_curve}; {len(one)} exported tensors bit for bit equal: {same_weights}")
    print(result)
    if same_curve and same_weights and 2 * in_save >= len(kills):
        table = "\n".join(f"| {kill} | {doing} | {done} |" for kill, (doing, done) in enumerate(kills, 1))
        Path(arguments.output).write_text(
            "# Crash-restart test\n\nTwo data-parallel ranks under torchrun, dropout on, a checkpoint every "
            f"{SAVE_EVERY_STEPS} steps, SIGKILL to all processes at random\nmoments; the same command "
            "restarts the run. Loss curve and weights must be those of an uninterrupted run.\n\n"
            "This file is generated by `python tools/crash_restart_test.py`; do not edit.\n\n## Measured\n\n"
            f"{datetime.date.today()}, torch {torch.__version__}: {result}.\n\n"
            f"| kill | during a | steps logged |\n|---|---|---|\n{table}\n", encoding="utf-8")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
