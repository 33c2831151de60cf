"""The shipped sbatch file on a real Slurm: two nodes train; a requeue and the time limit end in 75, and it goes on."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from megatron_embed.checkpoint.files import step_directories
from tests.checkpoint.test_resume import configuration, curve, train
from tests.ranks import run_on_ranks
from tests.toys import REPOSITORY, save_model

STEPS = 50
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster of two nodes on this machine."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name, path=PATH) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs {', '.join(missing)}: `make slurm` as root on Debian installs them" if missing else
                    "starting Slurm needs root")
    directory = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {
        "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf"), "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = subprocess.run([REPOSITORY / "tools" / "local_slurm.sh", "start", directory], env=environment,
                             capture_output=True, text=True, check=False)
    try:
        assert started.returncode == 0, started.stderr + "".join(log.read_text() for log in directory.glob("*.log"))
        yield environment
    finally:
        subprocess.run([REPOSITORY / "tools" / "local_slurm.sh", "stop", directory], env=environment, check=False)


def scontrol(environment, *arguments):
    return subprocess.run(["scontrol", *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def job(environment, number):
    """What Slurm knows of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", scontrol(environment, "show", "job", number)))


def wait_until(condition, what, log, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.2)


@pytest.mark.slow
def test_requeue_and_time_limit_do_not_show_in_the_result(slurm, tmp_path):
    model, run, log, pace = save_model(tmp_path / "model", "qwen3", tokenizer=True), tmp_path / "run", \
        tmp_path / "log", tmp_path / "pace"
    settings = {"train_steps": STEPS, "hidden_dropout": 0.1, "checkpoint": {"save_every_steps": 1000}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration(model, run, **settings)))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/launch/paced.py {pace} "$@"\n')
    python.chmod(0o755)
    pace.touch()

    def submit(*overrides):
        return subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
             "--time=60", f"--output={log}", "launch/slurm/train.sbatch", str(tmp_path / "run.yaml"), *overrides],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
            env=slurm | {"PYTHON": str(python), "RUN_DIR": str(run), "MASTER_ADDR": "127.0.0.1", "MIN_FREE_GIB": "1",
                         "PYTHONPATH": str(REPOSITORY)}).stdout.strip()

    number = submit()
    metrics = run / "metrics.jsonl"

    def steps():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    wait_until(lambda: steps() >= 3, "third step", log)
    scontrol(slurm, "requeue", number)
    wait_until(lambda: step_directories(run), "checkpoint after the requeue", log)
    wait_until(lambda: job(slurm, number)["Restarts"] == "1" and job(slurm, number)["JobState"] == "RUNNING",
               "second start", log)
    first = max(step_directories(run))
    assert 3 <= first < STEPS
    wait_until(lambda: steps() >= first + 2, "step after the second start", log)
    # Less than the five minutes of --signal are left now, so Slurm sends it when it next looks at the limit.
    scontrol(slurm, "update", f"JobId={number}", "TimeLimit=2")
    wait_until(lambda: len(step_directories(run)) == 2, "checkpoint before the time limit", log)
    pace.unlink()
    wait_until(lambda: job(slurm, number)["Restarts"] == "2", "requeue", log)
    scontrol(slurm, "update", f"JobId={number}", "TimeLimit=60")
    second = max(step_directories(run))
    assert first < second < STEPS
    wait_until(lambda: job(slurm, number)["JobState"] in ("COMPLETED", "FAILED"), "end", log)
    text = log.read_text()
    assert job(slurm, number)["JobState"] == "COMPLETED", text
    assert (run / "DONE").exists()
    assert f"saved; requeueing job {number}" in text
    assert re.search(r"job \d+ on node\[1-2\], start number 3", text)
    assert "2 ranks, data-parallel only; 2 of them data-parallel" in text

    run_on_ranks(train, 2, configuration(model, tmp_path / "straight", **settings))
    assert curve(run) == curve(tmp_path / "straight")
    assert len(set(curve(run))) == STEPS
    again = submit()
    wait_until(lambda: job(slurm, again)["JobState"] == "COMPLETED", "second job", log)
    assert "the run is complete; remove it to go on with more steps" in log.read_text()
