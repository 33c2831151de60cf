"""Runs of tools/gpu_check.py, each with a time limit, and the table of their results."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = "configs/minilm_22m_embed_dp2_cpu.yaml"
SAMPLE = REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl"
STEPS = 8
CURVE = [f"data.train=[{SAMPLE}]", "data.shuffle=false", "data.num_negatives=1",
         "training.epochs=null", f"training.train_steps={STEPS}", "training.global_batch_size=32",
         "training.micro_batch_size=8", "evaluation.retrieval=[]", "checkpoint.export_at_end=null",
         "checkpoint.directory=null", "logging.tensorboard=false", "logging.every_steps=1"]

Verdict = Literal["yes", "NO", "not run"]


class OutOfTimeError(Exception):
    """The time budget is used up before or during a check."""


@dataclass(kw_only=True)
class Machine:
    """Devices, time and files of the checks."""

    cuda: bool
    ranks: int
    """Number of GPUs, or of CPU ranks with --cpu."""
    deadline: float
    """Value of time.monotonic() at which the checks end."""
    folder: Path
    """Folder for models and logs."""
    tiny: bool = False
    """Whether models and texts are of toy size, to test this script."""
    failures: list[str] = field(default_factory=list)
    """Last lines of the logs of failed runs."""
    patience: float = 1.0
    """Factor of the checks' time limits."""
    limit: float = float("inf")
    """Seconds that a command of the check under way may take."""

    @property
    def toy(self) -> bool:
        """Whether models are of toy size: always on CPU ranks."""
        return self.tiny or not self.cuda

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr. Raises OutOfTimeError if the time is up, and RuntimeError if the check's is,
        after all processes have ended."""
        left = self.deadline - time.monotonic()
        if left < 1:
            raise OutOfTimeError
        process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            out, err = process.communicate(timeout=min(left, self.limit))
        except subprocess.TimeoutExpired as error:
            out, err = end_session(process)
            if self.limit < left:
                self.failures.append(f"{' '.join(command[-2:])[:200]}: no end\n" + "\n".join(err.splitlines()[-30:]))
                raise RuntimeError(f"no end after {self.limit:.0f} s") from error
            raise OutOfTimeError from error
        except BaseException:  # Ctrl-C, or a signal of `exit_on_signals`
            end_session(process)
            raise
        return process.returncode, out, err

    def probe(self, name: str, **options: Any) -> dict[str, Any]:
        """The result of a probe of tools/gpu_probes.py. Raises RuntimeError with the error of one that failed."""
        code, out, err = self.run([sys.executable, "tools/gpu_probes.py", name, json.dumps(options)],
                                  {"HF_HUB_OFFLINE": "1"})
        if code:
            self.failures.append(f"{name}: exit code {code}\n" + "\n".join(err.splitlines()[-60:]))
            raise RuntimeError(reason_of(err) or f"exit code {code}")
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def train(self, overrides: list[str], log: str, *, ranks: int = 1,
              cuda: bool | None = None) -> list[dict[str, Any]]:
        """Train, and return the metrics by step. Raises RuntimeError with the error of a failed run."""
        cuda = self.cuda if cuda is None else cuda
        # One with --cpu: threads of a tiny model wait for each other, ten times as long on a busy machine.
        threads = 1 if self.toy else max(1, len(os.sched_getaffinity(0)) // ranks)
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       **({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})}
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        code, _, err = self.run([sys.executable, *launcher, "-m", "megatron_embed", "train", DEMO, *CURVE, *overrides,
                                 f"logging.directory={self.folder / log}"], environment)
        if code not in (0, 75):
            self.failures.append(f"{log}: exit code {code}\n" + "\n".join(err.splitlines()[-60:]))
            raise RuntimeError(reason_of(err) or f"exit code {code}")
        return [json.loads(line) for line in (self.folder / log / "metrics.jsonl").read_text("utf-8").splitlines()]


def end_session(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """End a process and all that it started; what it had written."""
    for signal_number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("a killed process ends")


def reason_of(log: str) -> str:
    """The line of a log with the reason of a failure."""
    lines = [line for line in log.splitlines() if "ChildFailedError" not in line]
    for pattern in (r"megatron-embed: error: .*", r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt): .*"):
        matching = [line for line in lines if re.match(pattern, line)]
        if matching:
            return matching[-1]
    return lines[-1] if lines else ""


class Table:
    """Table of results, printed and written to files after every check, since a machine may become unavailable."""

    def __init__(self, title: str, output: Path | None, only: str = "", machine: Machine | None = None) -> None:
        """`output`: Markdown file; the same as JSON goes beside it. `only`: regular expression of the checks to run.
        `machine`: gets each check's time limit."""
        self.rows: list[tuple[str, str, Verdict]] = []
        self.values: dict[str, Any] = {}
        self._only, self._machine, self._title = re.compile(only), machine, title
        self._lines, self._output = [title, "", "| check | result | holds |", "|---|---|---|"], output
        print("\n".join(self._lines), flush=True)

    def add(self, what: str, check: Callable[[], tuple[str, bool]] | str, *, limit: float = float("inf"),
            always: bool = False) -> bool:
        """Run a check for at most `limit` seconds, or record why it is not run. Returns whether it holds."""
        if not always and not self.wants(what):
            return False
        verdict: Verdict = "not run"
        started = time.monotonic()
        if self._machine is not None:
            self._machine.limit = limit * self._machine.patience
        if isinstance(check, str):
            result = check
        else:
            try:
                result, holds = check()
                verdict = "yes" if holds else "NO"
                result += f", {time.monotonic() - started:.0f} s"
            except OutOfTimeError:
                result = "no time left"
            except Exception as error:  # noqa: BLE001  one check must not end the others
                reason = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
                result, verdict = f"FAILED: {reason}", "NO"
        self.rows.append((what, result, verdict))
        self._lines.append(f"| {what} | {result.replace('|', '/')} | {verdict} |")
        print(self._lines[-1], flush=True)
        self.write()
        return verdict == "yes"

    def wants(self, what: str) -> bool:
        """Whether --only asks for a check of this name."""
        return bool(self._only.search(what))

    def write(self) -> None:
        """Write both files again."""
        if self._output is None:
            return
        self._output.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        content = {"title": self._title, "values": self.values, "checks": [
            {"check": what, "result": result, "holds": verdict} for what, result, verdict in self.rows]}
        self._output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
