"""`megatron_embed.train` in one plain process: the run of the command line, and a callback for each step."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.helpers.ranks import REPOSITORY
from tests.helpers.refusals import model, settings  # noqa: F401  fixtures

SCRIPT = """
import json, sys
from pathlib import Path
import megatron_embed
file, calls = Path(sys.argv[1]), []
last = megatron_embed.train(file, ["training.train_steps=3"], on_step=lambda *told: calls.append(told))
from megatron_embed.run import assemble
read_inputs, assemble.read_inputs = assemble.read_inputs, None  # the run is known to be complete before rows are read
again = megatron_embed.train(str(file), ["training.train_steps=3"])
assemble.read_inputs = read_inputs
values = json.loads(file.with_suffix(".json").read_text())
other = megatron_embed.train(values)
refusals = []
for broken in ({**values, "trianing": {}}, {**values, "model": {"path": Path("/nowhere")}}):
    try:
        megatron_embed.train(broken)
    except megatron_embed.errors.UserError as error:
        refusals.append(str(error))
print(json.dumps({"last": last, "again": again, "other": other, "calls": calls, "refusals": refusals}))
"""


@pytest.mark.slow
def test_the_run_of_the_command_line(tmp_path, model):
    values = settings(model, tmp_path / "run")
    held_out = values["data"] | {"validation_fraction": 0.02}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"data": held_out}))
    values["checkpoint"] = {}
    (tmp_path / "run.json").write_text(json.dumps(values))
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "run.yaml")], capture_output=True, text=True,
                          cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in told["calls"]] == [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert [metrics for _, metrics in told["calls"]] == [{key: value for key, value in row.items() if key != "step"}
                                                         for row in rows]
    assert told["last"]["loss"] == rows[3]["loss"] and told["again"] == {}  # the run is complete
    assert told["other"]["learning_rate"] > 0
    for refusal, words in zip(told["refusals"], ("config: unknown key 'trianing'", "config: model.path"), strict=True):
        assert words in refusal or "/nowhere" in refusal
    assert "INFO megatron_embed.run.assemble: task embedding" in done.stderr and "finished in" in done.stderr


@pytest.mark.slow
def test_types_of_a_users_script(tmp_path):
    """mypy reads the hints of the package, as one that is installed, and finds mistakes with them."""
    good = ("import megatron_embed\nfrom collections.abc import Mapping\n"
            "def told(step: int, metrics: Mapping[str, float]) -> None:\n    print(step, metrics['loss'])\n"
            "last: dict[str, float] = megatron_embed.train({'model': {'path': 'm'}}, ['a.b=1'], on_step=told)\n"
            "model = megatron_embed.load('m')\nvectors = model.encode(['a'], role='query')\n"
            "scores = model.rerank('a', passages=['b'])\nprint(vectors.shape, scores.dtype)\n")
    bad = good.replace("role='query'", "role='passage'").replace("'loss'", "step.x")
    for name, text in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir",
                           str(tmp_path / "cache"), "good.py", "bad.py"], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"MYPYPATH": str(REPOSITORY)})
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.partition(":")[0] for line in errors] == 3 * ["bad.py"], done.stdout + done.stderr
    assert (REPOSITORY / "megatron_embed" / "py.typed").is_file()
