"""Run our trainer and Sentence Transformers with equal settings, in separate processes, whole or step by step."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import children
import yaml
from measurement import available_cores, exit_on_signals, peak_memory_mib

REPOSITORY = Path(__file__).resolve().parents[1]
Side = TypeVar("Side")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of both trainers. AdamW's betas, weight decay 0.01 and clipping at 1 are our schema's defaults."""

    model: str
    data: str
    steps: int
    batch_size: int
    """Queries per step, all ranks together."""
    max_length: int
    """Tokens of a query or document."""
    num_negatives: int
    temperature: float
    learning_rate: float
    """Constant, from the first step."""
    threads: int
    """Threads per trainer, split among its ranks; on Linux its processes are also bound to as many cores."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    name: str
    ranks: int = 1
    tensor_model_parallel_size: int = 1


def _bind(cores: list[int]) -> None:
    """Bind this process and its children to these cores, on Linux."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def _prepare(cores: list[int]) -> None:
    """In a new trainer: its own process group, its cores, and on Linux its end if this program is killed."""
    os.setpgrp()
    _bind(cores)
    children.die_with_parent()


def peer_command(settings: Settings, output: Path, *, precision: str = "fp32", save: bool = False,
                 cached: int | None = None) -> list[str]:
    """Command of Sentence Transformers' training. `save`: writes the model to output/model; `cached`: uses the gradient
    cache with mini-batches of this size."""
    command = [sys.executable, str(REPOSITORY / "tools" / "peer_training.py"), "--precision", precision,
               "--output", str(output)] + ["--save"] * save
    command += [] if cached is None else ["--mini-batch-size", str(cached)]
    for name in ("model", "data", "steps", "batch_size", "max_length", "num_negatives", "temperature", "learning_rate"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return command


def run_peer(settings: Settings, output: Path, *, precision: str = "fp32", save: bool = False) -> list[dict[str, Any]]:
    """Train with Sentence Transformers. Returns its metrics per step."""
    command = peer_command(settings, output, precision=precision, save=save)
    return _run(command, output, threads=settings.threads, ranks=1)


def run_ours(settings: Settings, output: Path, *, layout: Layout, micro_batch_size: int, dtype: str = "float32",
             export: bool = False) -> list[dict[str, Any]]:
    """Train with our trainer. Returns its metrics per step; with `export`, output/model is the exported model."""
    command = our_command(settings, output, layout=layout, micro_batch_size=micro_batch_size, dtype=dtype,
                          export=export)
    return _run(command, output, threads=settings.threads, ranks=layout.ranks)


def our_command(settings: Settings, output: Path, *, layout: Layout, micro_batch_size: int,
                dtype: str | None = "float32", export: bool = False, negatives: str = "global_batch",
                keep_activations: int | str = "auto", repeated_texts: str = "each") -> list[str]:
    """Write our trainer's configuration (`dtype`: None omits it). Returns the command that runs it.

    By default each text is encoded as often as it comes, as the peer does.
    """
    output.mkdir(parents=True)
    checkpoint = {"directory": str(output / "checkpoints"), "export_at_end": str(output / "model"), "keep": 1}
    config = {
        "model": {"path": settings.model, **({} if dtype is None else {"dtype": dtype})},
        "objective": {"loss": "info_nce", "temperature": settings.temperature, "negatives": negatives},
        "data": {"train": [settings.data], "shuffle": False, "num_negatives": settings.num_negatives,
                 "query_max_length": settings.max_length, "document_max_length": settings.max_length},
        "parallel": {"tensor_model_parallel_size": layout.tensor_model_parallel_size},
        "training": {"global_batch_size": settings.batch_size, "micro_batch_size": micro_batch_size,
                     "train_steps": settings.steps, "learning_rate": settings.learning_rate, "warmup_steps": 0,
                     "lr_decay_style": "constant", "keep_activations": keep_activations,
                     "encode_repeated_texts": repeated_texts},
        "checkpoint": checkpoint if export else {},
        "logging": {"directory": str(output), "every_steps": 1, "tensorboard": False},
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(layout.ranks)] if layout.ranks > 1 else []
    return [sys.executable, *launcher, "-m", "megatron_embed", "train", str(output / "config.yaml")]


def _start(command: list[str], output: Path, *, threads: int, ranks: int) -> subprocess.Popen[bytes]:
    """Start a trainer in its own process group, with its log in OUTPUT.log."""
    cores = available_cores()[:threads]
    share = str(max(1, threads // ranks))
    environment = os.environ | {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "RAYON_NUM_THREADS": share,
                                "HF_HUB_OFFLINE": "1"}
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: _prepare(cores))


def _fail(command: list[str], code: int, output: Path) -> NoReturn:
    log = output.with_suffix(".log")
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    sys.exit(f"exit status {code} of: {' '.join(command)}\n{tail}")


def _steps(output: Path) -> list[dict[str, Any]]:
    """Complete lines of output/metrics.jsonl that have a loss."""
    file = output / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [line for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines()) if "loss" in line]


def _run(command: list[str], output: Path, *, threads: int, ranks: int) -> list[dict[str, Any]]:
    """Run a trainer to the end. Returns its steps; exits if it fails. A signal ends both programs."""
    exit_on_signals()
    process = _start(command, output, threads=threads, ranks=ranks)
    try:
        code = process.wait()
    finally:
        children.end([process])
    if code:
        _fail(command, code, output)
    return _steps(output)


@dataclass
class Timing:
    """Step times and memory of one trainer."""

    seconds: list[float] = field(default_factory=list)
    """Per step."""
    peak_mib: float = 0.0
    """Peak resident memory of its process."""


def run_in_turn(sides: dict[Side, tuple[list[str], Path]], *, threads: int, steps: int) -> dict[Side, Timing]:
    """Time the steps of several trainers that take one step each in turn while the others are stopped.

    The speed of a shared machine drifts within a minute, but neighbouring steps see the same speed. A step is timed
    from the moment its trainer continues until the step is in its metrics.jsonl, so the time includes the next batch
    and the log. A signal ends this program and all trainers.
    """
    exit_on_signals()
    timings = {name: Timing() for name in sides}
    running: dict[Side, subprocess.Popen[bytes]] = {}
    try:
        for name, (command, output) in sides.items():
            running[name] = _start(command, output, threads=threads, ranks=1)
        for process in running.values():  # they start up in turn as well
            os.killpg(process.pid, signal.SIGSTOP)
        for step in range(1, steps + 1):
            for name, (command, output) in sides.items():
                process, start = running[name], time.perf_counter()
                os.killpg(process.pid, signal.SIGCONT)
                while len(_steps(output)) < step:  # each look takes time from the trainer: at most 1 % of it
                    if process.poll() is not None:
                        _fail(command, process.returncode, output)
                    time.sleep(0.02)
                timings[name].seconds.append(time.perf_counter() - start)
                timings[name].peak_mib = peak_memory_mib(process.pid)
                if step < steps:
                    os.killpg(process.pid, signal.SIGSTOP)
                else:
                    process.wait()
    finally:
        children.end(running.values())
    return timings
