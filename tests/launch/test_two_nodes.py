"""launch/torchrun/node.sh as two nodes on this machine's loopback, with real training: stopped, resumed, and killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_embed.checkpoint.files import step_directories
from tests.helpers.ports import free_port
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import REPOSITORY, save_model

pytestmark = pytest.mark.slow
STEPS = 80


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


class Nodes:
    """The scripts of node 0 and node 1, one rank each."""

    def __init__(self, path):
        port = free_port()
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.scripts = [subprocess.Popen(
            [REPOSITORY / "launch" / "torchrun" / "node.sh", "--nnodes", "2", "--node-rank", str(node), "--master-addr",
             "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1", str(path)],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for node in range(2)]

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for script in self.scripts:
            for pid in [*descendants(script.pid), script.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            script.communicate()

    def wait_for_steps(self, run, count):
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < count:
            assert time.monotonic() < deadline and all(script.poll() is None for script in self.scripts)
            time.sleep(0.05)

    def ends(self):
        """(exit code, stderr) of both."""
        errors = [script.communicate(timeout=400)[1] for script in self.scripts]
        return [(script.returncode, text) for script, text in zip(self.scripts, errors, strict=True)]


def descendants(pid):
    """Process numbers below this one, those of its children first."""
    children = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children")
                for child in file.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


def worker_of(script):
    """The process that trains: the last of script, torchrun and worker."""
    workers = [pid for pid in descendants(script.pid)
               if b"megatron_embed\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
               and b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 1
    return workers[0]


def config_file(tmp_path, model, **training):
    values = configuration(model, tmp_path / "run", hidden_dropout=0.1, checkpoint={"save_every_steps": 10**6},
                           **training)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml", values


def test_both_nodes_stop_and_resume_from_one_checkpoint(model, tmp_path):
    path, values = config_file(tmp_path, model, train_steps=STEPS)
    run = tmp_path / "run"
    with Nodes(path) as nodes:
        nodes.wait_for_steps(run, 3)
        nodes.scripts[1].send_signal(signal.SIGTERM)  # one node is told, both stop
        ends = nodes.ends()
    assert [code for code, _ in ends] == [75, 75], ends
    (saved,) = step_directories(run)
    assert 3 <= saved < STEPS
    with Nodes(path) as nodes:
        ends = nodes.ends()
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"resumed {run}/step_{saved:06d} after {saved} steps" in ends[0][1]
    straight = {**values, "checkpoint": {**values["checkpoint"], "directory": str(tmp_path / "straight")}}
    run_on_ranks(train, 2, straight)
    assert curve(run) == curve(tmp_path / "straight")
    assert len(set(curve(run))) == STEPS


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_ends_the_other_node_with_a_line_that_names_it(model, tmp_path, victim):
    path, _ = config_file(tmp_path, model, train_steps=100000)
    with Nodes(path) as nodes:
        nodes.wait_for_steps(tmp_path / "run", 2)
        os.kill(worker_of(nodes.scripts[victim]), signal.SIGKILL)
        start = time.monotonic()
        ends = nodes.ends()
        assert time.monotonic() - start < 120
    assert [code for code, _ in ends] == [1, 1], ends
    lines = [line for line in ends[1 - victim][1].splitlines() if line.startswith("megatron-embed: error: ")]
    assert len(lines) == 1, ends[1 - victim][1]
    assert re.match(rf"megatron-embed: error: rank {victim}\b.* (is|are) gone", lines[0])
    assert "resumes from its last checkpoint" in lines[0]
