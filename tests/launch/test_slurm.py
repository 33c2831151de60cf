"""The shipped sbatch file on a real Slurm: two nodes train; a requeue and the time limit end in 75, and it goes on."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from megatron_embed.checkpoint.files import step_directories
from tests.helpers.ports import free_port
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import curve
from tests.helpers.toys import REPOSITORY, save_model

STEPS = 40
PACE = 2.0
"""Seconds per step while Slurm is to interrupt: it looks at time limits every 30 s."""
DEMO = "configs/minilm_22m_embed_dp2_cpu.yaml"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LOCAL_SLURM = REPOSITORY / "tools" / "local_slurm.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a cluster of two nodes on this machine."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name, path=PATH) is None]
    if missing:
        reason = (f"SLURM IS NOT TESTED: {', '.join(missing)} missing; `make slurm` installs them (Debian or Ubuntu, "
                  "as root or with sudo)")
        # `make slurm` has tried. Where the machine is known to allow it, REQUIRE_SLURM=1 makes its absence a failure.
        (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(reason)
    directory = tmp_path_factory.mktemp("slurm")
    # A pytest that itself runs in a job must not hand the job's variables on.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    environment = clean | {
        "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf"), "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = subprocess.run([LOCAL_SLURM, "start", directory], env=environment, capture_output=True, text=True,
                             check=False)
    try:
        assert started.returncode == 0, started.stderr + "".join(log.read_text() for log in directory.glob("*.log"))
        yield environment
    finally:
        subprocess.run([LOCAL_SLURM, "stop", directory], env=environment, check=False)


def scontrol(environment, *arguments):
    return subprocess.run(["scontrol", *arguments], env=environment, capture_output=True, text=True, check=True).stdout


def job(environment, job_id):
    """What Slurm knows of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", scontrol(environment, "show", "job", job_id)))


def set_minutes_left(environment, job_id, minutes):
    """Moves a running job's time limit so that it ends in `minutes` to `minutes` + 1."""
    hours, passed, _ = job(environment, job_id)["RunTime"].rsplit("-", 1)[-1].split(":")
    scontrol(environment, "update", f"JobId={job_id}", f"TimeLimit={60 * int(hours) + int(passed) + minutes + 1}")


def wait_until(condition, what, log, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.1)


def train_demo(overrides):
    """The same run without Slurm. Called by all ranks."""
    from megatron_embed.config.load import load_config
    from megatron_embed.run.assemble import run_training

    run_training(load_config(str(REPOSITORY / DEMO), overrides))


def test_requeue_and_time_limit_do_not_show_in_the_result(slurm, tmp_path):
    """The demonstration's configuration with a smaller model and dropout, and without its evaluation and export."""
    model, run, log, pace = save_model(tmp_path / "model", "bert", tokenizer=True), tmp_path / "run", \
        tmp_path / "log", tmp_path / "pace"
    overrides = [f"model.path={model}", f"training.train_steps={STEPS}", "training.epochs=null",
                 "training.hidden_dropout=0.1", "evaluation.retrieval=[]", "checkpoint.export_at_end=null",
                 "logging.tensorboard=false"]
    port = str(free_port())  # job.sh's own port follows from the job's number: 1 in every fresh cluster
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/helpers/paced.py {pace} "$@"\n')
    python.chmod(0o755)
    pace.write_text(str(PACE))

    def submit():
        return subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
             "--time=60", f"--output={log}", "launch/slurm/train.sbatch", DEMO, *overrides],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
            env=slurm | {"PYTHON": str(python), "RUN_DIR": str(run), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                         "MIN_FREE_GIB": "1", "PYTHONPATH": str(REPOSITORY)}).stdout.strip()

    job_id = submit()
    metrics = run / "metrics.jsonl"

    def steps():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    wait_until(lambda: steps() >= 2, "second step", log)
    scontrol(slurm, "requeue", job_id)
    # Meanwhile, what shall come out.
    run_on_ranks(train_demo, 2, [*overrides, f"checkpoint.directory={tmp_path / 'straight'}",
                                 f"data.train=[{REPOSITORY}/examples/data/mini_zh/train.jsonl]"])
    wait_until(lambda: step_directories(run), "checkpoint after the requeue", log)
    wait_until(lambda: job(slurm, job_id)["Restarts"] == "1" and job(slurm, job_id)["JobState"] == "RUNNING",
               "second start", log)
    first = max(step_directories(run))
    assert 2 <= first < STEPS
    wait_until(lambda: steps() >= first + 1, "step after the second start", log)
    # Less than the five minutes of --signal are left now, so Slurm sends it when it next looks at the limit.
    set_minutes_left(slurm, job_id, 3)
    wait_until(lambda: len(step_directories(run)) == 2, "checkpoint before the time limit", log)
    pace.unlink()
    wait_until(lambda: job(slurm, job_id)["Restarts"] == "2", "requeue", log)
    scontrol(slurm, "update", f"JobId={job_id}", "TimeLimit=60")
    second = max(step_directories(run))
    assert first < second < STEPS
    wait_until(lambda: job(slurm, job_id)["JobState"] in ("COMPLETED", "FAILED"), "end", log)
    text = log.read_text()
    assert job(slurm, job_id)["JobState"] == "COMPLETED", text
    assert (run / "DONE").exists()
    assert text.count(f"saved; requeueing job {job_id}") == 2, text
    assert re.search(r"job \d+ on node\[1-2\], start number 3", text)
    assert "2 ranks, data-parallel only; 2 of them data-parallel" in text

    assert curve(run) == curve(tmp_path / "straight")
    assert len(set(curve(run))) == STEPS
    again = submit()
    wait_until(lambda: job(slurm, again)["JobState"] == "COMPLETED", "second job", log)
    assert "the run is complete; remove it to train more steps" in log.read_text()
