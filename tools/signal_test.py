"""Send SIGTERM to a run of two ranks at random moments, resume it, and compare it with an uninterrupted run.

    python tools/signal_test.py [--moments 20] [--seconds 5] [--documents 6000]

Both ranks are started as srun starts them (with its variables, without another launcher), each as the first task of a
node, and both get the signal at once. The moments are distributed uniformly from half a second after the start to the
end of the last evaluation. Each time, both ranks' exit codes and status files must be 75 within --seconds, and the
resumed run must end with the metrics of the uninterrupted run bit for bit, including evaluations.

Writes docs/signal_test.md; exit code 1 if any moment fails. With --rank 0 or --rank 1 only that rank gets the signal,
and the other rank stops because of it.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import children
import torch
import yaml
from crash_restart_test import write_model
from measurement import exit_on_signals

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.helpers.ports import free_port  # noqa: E402

RANKS, QUERIES = 2, 100
VOLATILE = ("tokens_per_second", "seconds", "flops", "mfu", "memory", "padding")
LONGEST_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one signal."""

    moment: float
    doing: str
    codes: list[int]
    statuses: list[int]
    seconds: list[float]
    same: bool

    def is_right(self, limit: float) -> bool:
        return (self.codes == self.statuses == [75] * RANKS and max(self.seconds) <= limit) and self.same


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--rank", type=int, choices=range(RANKS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "signal_test.md"))
    return parser.parse_args()


def rows() -> Iterator[dict[str, Any]]:
    with (REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_benchmark(folder: Path, documents: int) -> str:
    """Write a BEIR folder with this many documents, which repeat those of the training rows."""
    (folder / "qrels").mkdir(parents=True)
    samples = list(rows())
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for index in range(documents):
            positive = samples[index % len(samples)]["positive"]
            text = positive if isinstance(positive, str) else positive[0]
            file.write(json.dumps({"_id": f"d{index}", "title": "", "text": f"{text} {index}"}) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for index in range(QUERIES):
            file.write(json.dumps({"_id": f"q{index}", "text": samples[index]["query"]}) + "\n")
    labels = "".join(f"q{index}\td{index}\t1\n" for index in range(QUERIES))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + labels, encoding="utf-8")
    return str(folder)


def write_configuration(folder: Path, model: str, benchmark: str) -> Path:
    values = {
        "model": {"path": model, "dtype": "float32"}, "embedding": {"pooling": "mean"},
        "objective": {"temperature": 0.1},
        "data": {"train": [str(REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl")], "num_negatives": 1,
                 "query_max_length": 32, "document_max_length": 64, "validation_fraction": 0.05},
        "training": {"global_batch_size": 16, "micro_batch_size": 4, "train_steps": 120, "warmup_steps": 2,
                     "learning_rate": 1.0e-3, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "evaluation": {"retrieval": [benchmark], "every_steps": 60},
        "checkpoint": {"directory": str(folder / "run"), "save_every_steps": 25, "keep": 2},
        "logging": {"every_steps": 1, "tensorboard": False}}
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(configuration: Path) -> list[subprocess.Popen[bytes]]:
    """Start both ranks as srun starts them on two nodes with one task each."""
    port = free_port()
    started = []
    for rank in range(RANKS):
        status = configuration.parent / f"status_{rank}"
        status.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
        environment |= {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(RANKS), "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PYTHONPATH": str(REPOSITORY), "MEGATRON_EMBED_STATUS_FILE": str(status)}
        with (configuration.parent / f"log_{rank}").open("ab") as log:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "megatron_embed", "train", str(configuration)], cwd=REPOSITORY, env=environment,
                stdout=log, stderr=log, start_new_session=True))
    return started


def ends(processes: list[subprocess.Popen[bytes]], since: float) -> list[float]:
    """Seconds until each process ended; processes that do not end are killed."""
    ended: dict[int, float] = {}
    try:
        while len(ended) < len(processes) and time.monotonic() - since < LONGEST_SECONDS:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic() - since
            time.sleep(0.005)
    finally:
        children.end(processes)
    return [ended.get(rank, LONGEST_SECONDS) for rank in range(len(processes))]


def curve(configuration: Path) -> list[dict[str, Any]]:
    """Every line of the metrics, without times and memory."""
    lines = (configuration.parent / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if not any(word in name for word in VOLATILE)}
            for line in lines]


def log_of(configuration: Path) -> str:
    return (configuration.parent / "log_0").read_text(encoding="utf-8")


def status_of(configuration: Path, rank: int) -> int:
    try:
        return int(json.loads((configuration.parent / f"status_{rank}").read_text(encoding="utf-8"))["exit_code"])
    except (OSError, ValueError, KeyError):
        return -1


def status_message(configuration: Path) -> str:
    """Message in rank 0's status file."""
    status = configuration.parent / "status_0"
    return json.loads(status.read_text(encoding="utf-8"))["message"] if status.is_file() else "no status"


def interrupt(configuration: Path, moment: float,
              only_rank: int | None) -> tuple[list[int], list[int], list[float], str]:
    """Exit codes, codes of the status files, seconds from the signal to each end, and rank 0's message."""
    began = time.monotonic()
    processes = start(configuration)
    try:
        time.sleep(max(0.0, began + moment - time.monotonic()))
        sent = time.monotonic()
        for rank, process in enumerate(processes):
            if only_rank in (None, rank) and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        seconds = ends(processes, sent)
    finally:
        children.end(processes)
    codes = [process.returncode for process in processes]
    statuses = [status_of(configuration, rank) for rank in range(RANKS)]
    return codes, statuses, seconds, status_message(configuration)


def run_to_the_end(configuration: Path) -> float:
    """Run to the end. Returns the seconds; exits if it fails."""
    began = time.monotonic()
    processes = start(configuration)
    seconds = ends(processes, began)
    if any(process.returncode for process in processes):
        sys.exit(log_of(configuration)[-3000:])
    return max(seconds)


def main() -> int:
    arguments = parse_arguments()
    exit_on_signals()
    chance = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model, benchmark = write_model(root / "model"), write_benchmark(root / "beir", arguments.documents)
        straight = write_configuration(root / "straight", model, benchmark)
        whole = run_to_the_end(straight)
        expected = curve(straight)
        print(f"uninterrupted: {whole:.1f} s, {len(expected)} lines of metrics", flush=True)
        while len(outcomes) < arguments.moments:
            moment = chance.uniform(0.5, whole - 0.5)
            path = write_configuration(root / f"run_{chance.getrandbits(40):x}", model, benchmark)
            codes, statuses, seconds, message = interrupt(path, moment, arguments.rank)
            if codes == [0] * RANKS:
                print(f"{moment:.1f} s: the run had ended; another moment", flush=True)
                continue
            run_to_the_end(path)
            outcome = Outcome(moment=moment, doing=message, codes=codes, statuses=statuses, seconds=seconds,
                              same=curve(path) == expected)
            outcomes.append(outcome)
            print(f"{len(outcomes)}: {line_of(outcome)}{'' if outcome.is_right(arguments.seconds) else '  WRONG'}",
                  flush=True)
            write_page(Path(arguments.output), arguments, whole, summary_of(outcomes, arguments.seconds), outcomes)
    print(summary_of(outcomes, arguments.seconds))
    return 0 if all(outcome.is_right(arguments.seconds) for outcome in outcomes) else 1


def summary_of(outcomes: list[Outcome], limit: float) -> str:
    right = sum(outcome.is_right(limit) for outcome in outcomes)
    slowest = max(max(outcome.seconds) for outcome in outcomes)
    return (f"{right} of {len(outcomes)} moments right: 75 from both ranks and in both status files within {limit:g} "
            f"s, the same curve bit for bit; slowest end {slowest:.2f} s, codes 75: "
            f"{sum(outcome.codes == [75] * RANKS for outcome in outcomes)}, equal curves: "
            f"{sum(outcome.same for outcome in outcomes)}")


def line_of(outcome: Outcome) -> str:
    seconds = " and ".join(f"{value:.2f}" for value in outcome.seconds)
    return (f"{outcome.moment:.1f} s | {outcome.doing} | {outcome.codes} | {outcome.statuses} | {seconds} | "
            f"{'equal' if outcome.same else 'DIFFERENT'}")


def write_page(path: Path, arguments: argparse.Namespace, whole: float, result: str, outcomes: list[Outcome]) -> None:
    receivers = "both ranks" if arguments.rank is None else f"rank {arguments.rank} only"
    table = "\n".join(f"| {index} | {line_of(outcome)} |" for index, outcome in enumerate(outcomes, 1))
    path.write_text(
        f"# Stopped by SIGTERM and resumed\n\nTwo ranks, started as srun starts them; SIGTERM to {receivers} at random "
        "moments; the same command resumes the run.\nEvery rank must exit with code 75 within "
        f"{arguments.seconds:g} seconds, and the loss curve must be that of an uninterrupted run.\n\n"
        "This file is generated by `python tools/signal_test.py`; do not edit.\n\n## Measured\n\n"
        f"{datetime.date.today()}, {arguments.documents} documents, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[2]:.1f} (15 minutes); the uninterrupted run took {whole:.1f} s.\n\n{result}.\n\n"
        "| | moment | status of rank 0 | codes | in status files | seconds to the end | resumed curve |\n"
        f"|---|---|---|---|---|---|---|\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
