"""Lists of hosts and GPUs as the torchrun scripts read them, and what they answer to arguments."""

import os
import re
import subprocess

import pytest

from megatron_embed.cli.doctor import ranks_of_node
from megatron_embed.platform.gpus import visible_gpus
from tests.helpers.toys import REPOSITORY

LAUNCH = REPOSITORY / "launch"
HOSTFILE, NODE = LAUNCH / "torchrun" / "hostfile.sh", LAUNCH / "torchrun" / "node.sh"
SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), *sorted(LAUNCH.rglob("*.sbatch"))]


def run(*command, **environment):
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("SLURM_") and name not in ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR")}
    return subprocess.run(["bash", *map(str, command)], env=clean | environment, capture_output=True, text=True,
                          check=False, timeout=60, cwd=REPOSITORY)


def hosts_of(text):
    """[(host of ssh, its --nproc-per-node)], the master address and --ranks of a dry run's output."""
    hosts = re.findall(r"^# on (\S+)\n.*?(?:--nproc-per-node (\d+))? run.yaml $", text, re.M)
    (master,) = set(re.findall(r"--master-addr (\S+)", text))
    ranks = set(re.findall(r"--ranks (\d+)", text))
    return hosts, master, ranks.pop() if ranks else None


@pytest.mark.parametrize("text, hosts, master, ranks", [
    ("a slots=8\nb slots=8", [("a", "8"), ("b", "8")], "a", "16"),  # no newline at the end
    ("a", [("a", "")], "a", None),
    ("a # slots=4\nb slots=2\n", [("a", ""), ("b", "2")], "a", None),
    ("a slots=4 # of 8\n#b slots=2\n  # c\n\n \t\nd slots=1\t#\n", [("a", "4"), ("d", "1")], "a", "5"),
    ("a\r\nb\r\n", [("a", ""), ("b", "")], "a", None),
    ("a slots=3\r\n\r\nb slots=4\r", [("a", "3"), ("b", "4")], "a", "7"),
    ("  a\tslots=2  \n", [("a", "2")], "a", "2"),
    ("me@node-1.example.org slots=2\nnode_2\n", [("me@node-1.example.org", "2"), ("node_2", "")],
     "node-1.example.org", None),
    ("10.0.0.1 slots=1\nfe80::1 slots=1\n", [("10.0.0.1", "1"), ("fe80::1", "1")], "10.0.0.1", "2"),
], ids=["no_newline", "one", "comment", "comments", "crlf", "crlf_slots", "blanks", "user", "addresses"])
def test_hosts_are_those_of_the_list(tmp_path, text, hosts, master, ranks):
    (tmp_path / "hosts").write_bytes(text.encode())
    result = run(HOSTFILE, tmp_path / "hosts", "--dry-run", "run.yaml")
    assert result.returncode == 0, result.stderr
    assert hosts_of(result.stdout) == (hosts, master, ranks)
    assert "\r" not in result.stdout


@pytest.mark.parametrize("line", [
    "b slots = 8", "b lots=8", "b max_slots=16 slots=8", "b slots=0", "b slots=8x", "b slots=08", "b slots=",
    "b slots=99999", "b slots=2 slots=4", "b slots=2 c", "b:8", "-oProxyCommand=x", "$(touch x)", "@b", "b\x1b[2J"])
def test_other_lines_are_refused_by_their_place(tmp_path, line):
    (tmp_path / "hosts").write_text(f"a slots=1\n\n{line}\nz slots=1\n", encoding="utf-8")
    result = run(HOSTFILE, tmp_path / "hosts", "--dry-run", "run.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{tmp_path}/hosts:3: " in result.stderr
    assert "a line is `HOST [slots=N] [# comment]`" in result.stderr
    assert "\x1b" not in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("first, second", [("a", "a slots=2"), ("me@a", "a"), ("Node1", "node1"), ("u@a", "v@a # c")])
def test_host_given_twice_is_refused(tmp_path, first, second):
    (tmp_path / "hosts").write_text(f"{first}\nb\n{second}")
    result = run(HOSTFILE, tmp_path / "hosts", "--dry-run", "run.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(rf"{tmp_path}/hosts:3: \w+ is given twice", result.stderr)


def test_nodes_of_a_mixed_list_know_the_number_of_all_ranks(tmp_path):
    """A line without slots: the host itself is asked how many GPUs it has."""
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho \"$@\" >>\"$LOG\"\n"
                   "case $* in *--count-gpus*) echo 4 ;; *) exit 3 ;; esac\n")
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("a slots=8\nb")
    result = run(HOSTFILE, tmp_path / "hosts", "run.yaml", SSH=str(ssh), LOG=str(tmp_path / "log"))
    log = (tmp_path / "log").read_text()
    assert result.returncode == 3
    assert log.count("--ranks 12 ") == 2 and log.count("--count-gpus") == 1
    assert "--nproc-per-node 8 run.yaml" in log and "--nproc-per-node 4 run.yaml" in log


EIGHT = "".join(f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu}abc)\n" for gpu in range(8))
MIG = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-0)
  MIG 3g.20gb     Device  0: (UUID: MIG-a)
  MIG 3g.20gb     Device  1: (UUID: MIG-b)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1)
  MIG 7g.40gb     Device  0: (UUID: MIG-c)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-2)
GPU 3: NVIDIA A100-SXM4-40GB (UUID: GPU-3)
"""


SEEN = [
    (EIGHT, None, 8), (EIGHT, "0,1", 2), (EIGHT, " 3 , 5,7", 3), (EIGHT, "", 0), (EIGHT, "-1", 0), (EIGHT, "0,-1,1", 1),
    (EIGHT, "0,8,1", 1), (EIGHT, "GPU-3,GPU-5abc", 2), (EIGHT, "GPU-9,0", 0), (EIGHT, "NoDevFiles", 0),
    (MIG, None, 1), (MIG, "MIG-a,MIG-b", 1), (MIG, "MIG-c", 1), (MIG, "2,3", 2), (MIG, "0,1", 1), (MIG, "", 0),
    ("", None, 0)]


def test_gpus_are_those_that_cuda_sees(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat \"$LISTED\"\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = [f"source {LAUNCH}/functions.sh", f"export PATH={tmp_path}:$PATH"]
    for index, (listed, visible, gpus) in enumerate(SEEN):
        file = tmp_path / f"list_{index}"
        file.write_text(listed)
        monkeypatch.setenv("LISTED", str(file))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == gpus, (listed, visible)
        script += [f"export LISTED={file}", "unset CUDA_VISIBLE_DEVICES" if visible is None
                   else f"export CUDA_VISIBLE_DEVICES='{visible}'", "count_gpus"]
    result = run("-euo", "pipefail", "-c", "\n".join(script))
    assert list(map(int, result.stdout.split())) == [gpus for _, _, gpus in SEEN], result.stderr
    result = run(LAUNCH / "torchrun" / "one_node.sh", "--dry-run", "run.yaml", CUDA_VISIBLE_DEVICES="0,1",
                 PATH=os.environ["PATH"], LISTED=str(tmp_path / "list_0"))
    assert "--nproc-per-node 2 " in result.stdout, result.stderr


@pytest.mark.parametrize("arguments, words", [
    ((HOSTFILE,), "HOSTFILE is missing"), ((HOSTFILE, "--dry-run", "hosts"), "HOSTFILE is missing"),
    ((HOSTFILE, "/tmp", "a.yaml"), "not a readable file"), ((HOSTFILE, NODE), "CONFIG.yaml is missing"),
    ((HOSTFILE, NODE, "--master-port"), "--master-port needs a value"),
    ((HOSTFILE, NODE, "--master-port", "99999", "a.yaml"), "--master-port 99999: must be a whole number from 1 to"),
    ((HOSTFILE, NODE, "--port", "1", "a.yaml"), "unknown option --port"),
    ((NODE, "--nnodes"), "--nnodes needs a value"), ((NODE, "--nnodes", "two", "a.yaml"), "--nnodes two: must be a"),
    ((NODE, "--nproc-per-node=0", "a.yaml"), "--nproc-per-node 0: must be a whole number from 1"),
    ((NODE, "--nnodes", "2", "--node-rank", "2", "--master-port", "1", "a.yaml"), "--node-rank 2 of --nnodes 2"),
    ((NODE, "--nproc-per-node=", "a.yaml"), "--nproc-per-node needs a value"), ((NODE, "-n", "2"), "unknown option -n"),
    ((LAUNCH / "slurm" / "train.sbatch",), "CONFIG.yaml is missing"),
    ((LAUNCH / "slurm" / "train.sbatch", "--nodes=2", "a.yaml"), "unknown option --nodes=2"),
    ((LAUNCH / "slurm" / "seeds.sbatch",), "CONFIG.yaml is missing"),
    ((LAUNCH / "slurm" / "sweep.sbatch", "a.yml.txt"), "no configuration is given")])
def test_arguments_are_answered_with_a_sentence(arguments, words):
    result = run(*arguments, PREFLIGHT="no", PYTHON="false")
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_says_how_it_is_used(script):
    result = run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    comment = [line[1:].removeprefix(" ") for line in script.read_text().splitlines() if line.startswith("#")]
    assert len(lines) >= 2 and lines == [line for line in comment if not line.startswith("!")][: len(lines)]
    if script.name not in ("environment.sh", "functions.sh", "job.sh"):
        assert any("CONFIG.yaml" in line or "A.yaml" in line for line in lines)


@pytest.mark.parametrize("node, ranks", [("0", 8), ("1", 8), ("2", 4), ("", 8)])
def test_ranks_of_a_node_where_nodes_differ(monkeypatch, node, ranks):
    monkeypatch.setenv("SLURM_NODEID", node)
    assert ranks_of_node("8(x2),4") == ranks
    assert ranks_of_node("3") == 3
