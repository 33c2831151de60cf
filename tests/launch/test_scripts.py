"""The launch scripts without a cluster: what they would run, which exit codes they give, and where signals go."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_embed.__main__ import build_parser, main
from megatron_embed.config.load import in_subdirectory, load_config
from tests.helpers.toys import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), *(REPOSITORY / "tools").glob("*.sh")])

# Stands in for `python -m torch.distributed.run ... -m megatron_embed train ...`: a worker below it, which leaves its
# exit code in the status file, as ours do; torchrun itself always says 1.
TORCHRUN = """#!/usr/bin/env bash
echo "$@" >>"$STUB_LOG"
echo "${MEGATRON_EMBED_SECRET:-none}" >>"$STUB_LOG.secrets"
case $* in *" doctor "*) echo "a report"; exit "${STUB_DOCTOR:-0}" ;; esac
leave() { printf '{"exit_code": %s, "message": "a \\\\"word\\\\""}\\n' "$1" >"$MEGATRON_EMBED_STATUS_FILE"; exit "$1"; }
case $STUB in
    0) exit 0 ;;
    killed) exit 1 ;;
    wait)
        (trap 'leave 75' TERM USR1; echo started >>"$STUB_LOG"; while true; do sleep 0.05; done) &
        trap 'echo torchrun was signalled >>"$STUB_LOG"; exit 143' TERM USR1
        wait $! || exit 1 ;;
    *) (leave "$STUB") || exit 1 ;;
esac
"""


@pytest.fixture
def stub(tmp_path):
    """The environment of a run whose python is the stub."""
    for name, text in {"python": TORCHRUN, "ssh": "#!/bin/sh\nshift 2\nexec sh -c \"$*\"\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return os.environ | {"PYTHON": str(tmp_path / "python"), "SSH": str(tmp_path / "ssh"),
                         "STUB_LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path)}


def run(*command, env=None):
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False, timeout=60,
                          cwd=REPOSITORY)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    assert run("bash", "-n", script).returncode == 0
    sourced = script.name in ("environment.sh", "functions.sh", "job.sh")
    assert os.access(script, os.X_OK) != (sourced or script.suffix == ".sbatch")


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: `make slurm` as root on Debian installs it")
    result = run("shellcheck", "-x", *SCRIPTS)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("left, code", [("0", 0), ("2", 2), ("75", 75), ("killed", 1)])
def test_torchrun_script_gives_the_workers_exit_code(stub, left, code):
    result = run(LAUNCH / "torchrun" / "one_node.sh", "--nproc-per-node", "2", "run.yaml",
                 "data.query_prompt=a b", env=stub | {"STUB": left})
    assert result.returncode == code, result.stderr
    called = Path(stub["STUB_LOG"]).read_text()
    assert re.fullmatch(
        "-m megatron_embed doctor --config run.yaml --ranks 2 --ranks-per-node 2 data.query_prompt=a b\n"
        r"-m torch.distributed.run --nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port \d{5} --rdzv-id \S+ "
        "--nproc-per-node 2 --max-restarts 0 -m megatron_embed train run.yaml data.query_prompt=a b\n", called)
    secrets = Path(stub["STUB_LOG"] + ".secrets").read_text().split()
    assert re.fullmatch("[0-9a-f]{64}", secrets[-1])
    repeated = 'megatron-embed: error: a "word"\n' if code == 2 else ""  # below torchrun's own lines
    assert (result.stdout, result.stderr) == ("", "a report\n" + repeated)
    assert not [name for name in os.listdir(stub["TMPDIR"]) if "status" in name]


@pytest.mark.parametrize("code", [1, 2])
def test_run_that_cannot_start_is_not_started(stub, tmp_path, code):
    environment = stub | {"STUB": "0", "STUB_DOCTOR": str(code)}
    script = LAUNCH / "torchrun" / "one_node.sh"
    assert run(script, "--nproc-per-node", "2", "run.yaml", env=environment).returncode == code
    assert "torch.distributed.run" not in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    assert run(script, "--nproc-per-node", "2", "run.yaml", env=environment | {"PREFLIGHT": "no"}).returncode == 0
    assert "doctor" not in (tmp_path / "log").read_text()
    assert "torch.distributed.run" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("script, sent", [
    ("node", signal.SIGTERM), ("node", signal.SIGUSR1), ("node", signal.SIGINT), ("hostfile", signal.SIGTERM),
    ("hostfile", signal.SIGINT)])
def test_signals_go_to_the_workers_and_not_to_torchrun(stub, tmp_path, script, sent):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n# a comment\n\nlocalhost slots=1\n")
    command = [LAUNCH / "torchrun" / "node.sh", "run.yaml"] if script == "node" else [
        LAUNCH / "torchrun" / "hostfile.sh", hosts, "run.yaml"]
    # A pytest in the background ignores SIGINT, and so would all that it starts.
    process = subprocess.Popen(list(map(str, command)), env=stub | {"STUB": "wait"}, cwd=REPOSITORY,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        nodes, deadline = 1 if script == "node" else 2, time.monotonic() + 60
        log = tmp_path / "log"
        while not log.exists() or log.read_text().count("started") < nodes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(timeout=60) == 75
        assert "torchrun was signalled" not in log.read_text()
        if script == "hostfile":
            calls = [line for line in log.read_text().splitlines() if "torch.distributed.run" in line]
            pattern = (r"--nnodes 2 --node-rank (\d) --master-addr 127.0.0.1 --master-port 29500 --rdzv-id (\S+) "
                       "--nproc-per-node 1 ")
            nodes, names = zip(*(re.findall(pattern, call)[0] for call in calls), strict=True)
            assert (sorted(nodes), len(set(names))) == (["0", "1"], 1)
            secrets = set((tmp_path / "log.secrets").read_text().split())
            assert len(secrets) == 1 and re.fullmatch("[0-9a-f]{64}", secret := secrets.pop())
            assert secret not in log.read_text() + " ".join(run(*command[:2], "--dry-run", "run.yaml", env=stub).stdout)
    finally:
        process.kill()
        process.wait()


def test_torchrun_scripts_refuse_what_cannot_run(stub, tmp_path):
    node = LAUNCH / "torchrun" / "node.sh"
    for arguments, words in [((), "CONFIG.yaml is missing"), (("--nodes", "2", "a.yaml"), "unknown option --nodes"),
                             (("--nnodes", "2", "a.yaml"), "--master-port is missing")]:
        result = run(node, *arguments, env=stub)
        assert result.returncode == 2
        assert words in result.stderr
    empty = tmp_path / "hosts"
    empty.write_text("# nobody\n")
    result = run(LAUNCH / "torchrun" / "hostfile.sh", empty, "a.yaml", env=stub)
    assert (result.returncode, result.stderr.strip().endswith("names no host")) == (2, True)


def test_dry_runs(stub, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = run("bash", LAUNCH / "slurm" / "train.sbatch", "--dry-run", "configs/a.yaml", "data.query_prompt=a b",
                 env=clean | {"CONTAINER_IMAGE": "image", "RUN_DIR": "runs/a", "PYTHON": "python"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line in ("#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=TERM@300",
                 "export NCCL_IB_TIMEOUT=19", "export PYTHONUNBUFFERED=1", "export MASTER_ADDR=FIRST_NODE",
                 "export MASTER_PORT=20000"):
        assert line in lines
    check, train = lines[-2:]
    container = (f"--container-image image --container-mounts {REPOSITORY}:{REPOSITORY} --container-workdir "
                 f"{REPOSITORY} --no-container-mount-home")
    assert check.startswith(f"srun --ntasks-per-node=1 --ntasks=1 {container} python -m megatron_embed doctor --config "
                            "configs/a.yaml --ranks 8 --ranks-per-node 8 ")
    assert train == (f"srun --kill-on-bad-exit=0 {container} python -m megatron_embed train configs/a.yaml "
                     "checkpoint.directory=runs/a data.query_prompt=a\\ b ")
    for job, start, port in ((7, 0, 20049), (7, 2, 20051), (7, 7, 20049), (8, 0, 20056), (1822, 0, 20004)):
        again = run("bash", LAUNCH / "slurm" / "train.sbatch", "--dry-run", "a.yaml", env=clean | {
            "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(start), "MASTER_ADDR": "a"})
        assert f"export MASTER_PORT={port}" in again.stdout.splitlines()
    seeds = run("bash", LAUNCH / "slurm" / "seeds.sbatch", "--dry-run", "a.yaml",
                env=clean | {"SLURM_ARRAY_TASK_ID": "7"})
    assert seeds.stdout.rstrip().endswith(
        "train a.yaml checkpoint.directory=runs/megatron-embed --subdirectory seed_7 training.seed=7")
    sweep = run("bash", LAUNCH / "slurm" / "sweep.sbatch", "--dry-run", "x/a.yaml", "x/b.yaml", "training.seed=3",
                env=clean | {"SLURM_ARRAY_TASK_ID": "1"})
    assert sweep.stdout.rstrip().endswith(
        "train x/b.yaml checkpoint.directory=runs/megatron-embed --subdirectory b training.seed=3")
    beyond = run("bash", LAUNCH / "slurm" / "sweep.sbatch", "a.yaml", env=clean | {"SLURM_ARRAY_TASK_ID": "1"})
    assert (beyond.returncode, "array task 1, but there are 1 files" in beyond.stderr) == (2, True)
    twice = run("bash", LAUNCH / "slurm" / "sweep.sbatch", "--dry-run", "x/a.yaml", "y/a.yaml", "x/b.yaml", env=clean)
    assert (twice.returncode, "two files are named a: " in twice.stderr) == (2, True)
    node = run(LAUNCH / "torchrun" / "node.sh", "--dry-run", "--nproc-per-node", "4", "a.yaml",
               env=stub | {"STUB": "0"})
    assert node.stdout.rstrip().endswith("--nproc-per-node 4 --max-restarts 0 -m megatron_embed train a.yaml")
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    hosts = run(LAUNCH / "torchrun" / "hostfile.sh", tmp_path / "hosts", "--dry-run", "a.yaml",
                env=stub | {"STUB": "0", "NCCL_SOCKET_IFNAME": "eth 0", "WANDB_API_KEY": "secret"})
    lines = hosts.stdout.splitlines()
    assert lines[::2] == ["# on a", "# on b"]
    assert all(r"NCCL_SOCKET_IFNAME=eth\ 0 " in line and "secret" not in line for line in lines[1::2])
    assert "--ranks 12 --nproc-per-node 8 a.yaml" in lines[1] and "--node-rank 1 --master-addr a " in lines[3]
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("script, options", [
    ("seeds.sbatch", ["a.yaml"]), ("sweep.sbatch", ["a.yaml", "b.yaml"])])
@pytest.mark.parametrize("sets", [
    ["checkpoint.export_at_end"], ["logging.directory"], ["checkpoint.export_at_end", "logging.directory"], []])
def test_runs_of_an_array_share_no_output(tmp_path, script, options, sets):
    """The trainer's reading of the very arguments that the array's tasks give it, and the doctor of them."""
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("\n".join(["model: {path: m}", "data: {train: [rows.jsonl]}", *(
            f"{key.partition('.')[0]}: {{{key.partition('.')[2]}: {tmp_path / key}}}" for key in sets)]))
    outputs = []
    for task in (0, 1):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "RUN_DIR": str(tmp_path / "run")}
        result = run("bash", LAUNCH / "slurm" / script, "--dry-run", *(tmp_path / name for name in options),
                     f"training.train_steps={task + 1}", env=environment)
        assert result.returncode == 0, result.stderr
        seen = []
        for line in result.stdout.splitlines()[-2:]:
            args = build_parser().parse_args(shlex.split(line.split("-m megatron_embed ")[1]))
            config = in_subdirectory(load_config(args.config, args.overrides), args.subdirectory)
            seen.append({"checkpoint.directory": config.checkpoint.directory,
                         "logging.directory": config.logging.directory,
                         "checkpoint.export_at_end": config.checkpoint.export_at_end})
        assert seen[0] == seen[1]
        outputs.append(seen[0])
    name = {"seeds.sbatch": "seed_0", "sweep.sbatch": "a"}[script]
    assert outputs[0]["checkpoint.directory"] == str(tmp_path / "run" / name)
    for key in ("checkpoint.directory", "logging.directory", "checkpoint.export_at_end"):
        if key in (*sets, "checkpoint.directory"):
            assert outputs[0][key] != outputs[1][key]
        else:
            assert outputs[0][key] is outputs[1][key] is None


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_subdirectory_is_the_name_of_a_folder(name, capsys):
    assert main(["train", "a.yaml", "--subdirectory", name]) == 2
    assert "is not the name of a folder" in capsys.readouterr().err
    assert main(["doctor", "--subdirectory", "a"]) == 2
    assert "name one with --config" in capsys.readouterr().err


SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$STUB_LOG"
case $* in *" doctor "*) exit "$STUB_DOCTOR" ;; esac
[[ -n $STUB_SIGNAL ]] && kill -s "$STUB_SIGNAL" "$PPID"
[[ -n $STUB_LATEST ]] && echo step_000003 >"$RUN_DIR/latest"
[[ $STUB_TRAIN == gave_up ]] && exit 0
[[ $STUB_TRAIN -gt 128 ]] && exit "$STUB_TRAIN"
printf '{"exit_code": %s, "message": ""}\n' "$STUB_TRAIN" >"$MEGATRON_EMBED_STATUS_FILE"
exit "$STUB_TRAIN"
"""


SCONTROL = """#!/bin/sh
echo "scontrol $*" >>"$STUB_LOG"
case $* in "show job"*) echo "JobId=12 JobState=$STUB_STATE PreemptTime=None" ;; *) echo node1 ;; esac
"""


@pytest.mark.parametrize("doctor, train, restarts, code, requeued, happened", [
    (0, 0, 0, 0, False, {}), (0, 75, 3, 75, True, {}), (0, 75, 100, 75, False, {}), (0, 2, 0, 2, False, {}),
    (0, 1, 0, 1, False, {}), (1, 0, 0, 1, False, {}), (0, "gave_up", 0, 1, False, {}),
    # Killed: requeued if Slurm wanted the node back and there is a checkpoint to resume from, or nothing was begun.
    (0, 137, 0, 137, False, {"STUB_LATEST": "yes"}),
    (0, 137, 0, 75, True, {"STUB_LATEST": "yes", "STUB_SIGNAL": "TERM"}),
    (0, 137, 0, 137, False, {"STUB_SIGNAL": "TERM"}),
    (0, 137, 0, 75, True, {"STUB_LATEST": "yes", "STUB_STATE": "PREEMPTED"}),
    (0, 137, 0, 137, False, {"STUB_LATEST": "yes", "STUB_SIGNAL": "TERM", "STUB_SACCT": "OUT_OF_MEMORY"}),
    (0, 143, 0, 75, True, {"STUB_SIGNAL": "USR1"}), (0, 143, 0, 143, False, {"STUB_LATEST": "yes"}),
    (0, "gave_up", 0, 75, True, {"STUB_LATEST": "yes", "STUB_SIGNAL": "TERM"}),
    (0, 137, 100, 75, False, {"STUB_LATEST": "yes", "STUB_SIGNAL": "TERM"}),
    (0, 1, 0, 1, False, {"STUB_LATEST": "yes", "STUB_SIGNAL": "TERM"}), (0, 0, 0, 0, False, {"STUB_SIGNAL": "TERM"})])
def test_job_ends_as_its_ranks_do(tmp_path, doctor, train, restarts, code, requeued, happened):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sacct": '#!/bin/sh\necho "$STUB_SACCT"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run_directory = tmp_path / "run"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB_LOG": str(tmp_path / "log"), "STUB_DOCTOR": str(doctor),
        "STUB_TRAIN": str(train), "RUN_DIR": str(run_directory), "SLURM_JOB_ID": "12", "STUB_SIGNAL": "",
        "STUB_LATEST": "", "STUB_STATE": "RUNNING", "STUB_SACCT": "RUNNING", **happened,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2", "SLURM_NTASKS": "16", "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    result = run("bash", LAUNCH / "slurm" / "train.sbatch", "a.yaml", env=environment)
    assert result.returncode == code, result.stderr
    log = (tmp_path / "log").read_text()
    assert ("scontrol requeue 12" in log) == requeued
    assert ("megatron_embed train" in log) == (doctor == 0)
    assert "srun --ntasks-per-node=1 --ntasks=2 " in log
    assert "--ranks 16 --ranks-per-node 8 " in log
    assert (run_directory / "DONE").exists() == (code == 0)
    if code == 0 and not happened:
        again = run("bash", LAUNCH / "slurm" / "train.sbatch", "a.yaml", env=environment)
        assert (again.returncode, "the run is complete" in again.stdout) == (0, True)
        other = run("bash", LAUNCH / "slurm" / "train.sbatch", "b.yaml", env=environment)
        assert other.returncode == 2
        assert (f"RUN_DIR = {run_directory} is the directory of {REPOSITORY}/a.yaml, not of {REPOSITORY}/b.yaml: set "
                "RUN_DIR") in other.stderr
        assert (tmp_path / "log").read_text().count("srun") == log.count("srun")


@pytest.mark.parametrize("tasks, listed", [("8(x2)", "8"), ("8(x2),4", r"8\(x2\)\,4"), ("3,1", r"3\,1"), ("5", "5")])
def test_job_tells_every_node_its_own_number_of_ranks(tasks, listed):
    environment = os.environ | {"SLURM_TASKS_PER_NODE": tasks, "SLURM_NTASKS": "20", "SLURM_NNODES": "3"}
    result = run("bash", LAUNCH / "slurm" / "train.sbatch", "--dry-run", "a.yaml", env=environment)
    assert f"--ranks 20 --ranks-per-node {listed} " in result.stdout, result.stderr


def test_heterogeneous_job_is_refused():
    result = run("bash", LAUNCH / "slurm" / "train.sbatch", "a.yaml", env=os.environ | {"SLURM_HET_SIZE": "2"})
    assert (result.returncode, result.stdout) == (2, "")
    assert "SLURM_HET_SIZE = 2: a heterogeneous job" in result.stderr


@pytest.mark.parametrize("when, sent", [("doctor", signal.SIGTERM), ("doctor", signal.SIGUSR1),
                                          ("torch.distributed.run", signal.SIGTERM)])
def test_node_that_is_told_before_it_has_workers_ends_with_75(stub, tmp_path, when, sent):
    """In the preflight, and while torchrun loads its libraries."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >>"$STUB_LOG"\n'
                                     'case $* in *" $WHEN "*) exec sleep 60 ;; esac\n')
    process = subprocess.Popen([LAUNCH / "torchrun" / "node.sh", "run.yaml"], env=stub | {"WHEN": when}, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").exists() or f" {when} " not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.1)  # the stub has become `sleep`
        process.send_signal(sent)
        assert process.wait(timeout=30) == 75
        assert ("torch.distributed.run" in (tmp_path / "log").read_text()) == (when != "doctor")
    finally:
        process.kill()
        process.wait()
