"""Errors about a setting carry its key, by which the command line finds the line of the YAML file."""

import ast
import pickle
import re
from pathlib import Path

import pytest
import yaml

import megatron_embed
from megatron_embed.__main__ import main
from megatron_embed.config.load import load_with_locations
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import CheckpointError, ConfigError, UserError
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables

PACKAGE = Path(megatron_embed.__file__).parent
SETTING = re.compile(rf"({'|'.join(RunConfig.__dataclass_fields__)})\.[a-z_.]+ = ")


def errors_without_key():
    """Places where an error is made whose message begins with a setting, and that gets no key."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            message = node.args[0]
            start = message.values[0] if isinstance(message, ast.JoinedStr) else message
            text = start.value if isinstance(start, ast.Constant) and isinstance(start.value, str) else ""
            if node.func.id in ("ConfigError", "CheckpointError") and SETTING.match(text) and not any(
                    keyword.arg == "key" for keyword in node.keywords):
                yield f"{path.name}:{node.lineno}"


def test_every_error_about_a_setting_carries_its_key():
    assert list(errors_without_key()) == []


@pytest.mark.parametrize("kind", [UserError, ConfigError, CheckpointError])
def test_key_is_kept_on_the_way_to_another_rank(kind):
    error = pickle.loads(pickle.dumps(kind("training.seed = -1: must be >= 0", key="training.seed")))
    assert (type(error), str(error), error.key) == (kind, "training.seed = -1: must be >= 0", "training.seed")


def test_location_of_a_key_is_the_nearest_that_was_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata:\n  train:\n  - path: a.jsonl\ntraining:\n  seed: 1\n")
    _, location_of = load_with_locations(str(path), ["training.epochs=2"])
    assert {key: location_of(key) for key in (
        "training.seed", "training.epochs", "training.train_steps", "data.train.path", "optimizer.distributed")} == {
        "training.seed": f"{path}:6", "training.epochs": "command line", "training.train_steps": f"{path}:5",
        "data.train.path": f"{path}:3", "optimizer.distributed": f"{path}:1"}


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError])
def test_refusal_from_within_a_run_begins_with_the_line_of_its_key(monkeypatch, tmp_path, capsys, kind):
    """The words of the message do not matter: the key is not read from them."""
    def refuse(config):
        raise kind("eight GPUs are too few", key="parallel.tensor_model_parallel_size")

    monkeypatch.setattr("megatron_embed.run.assemble.run_training", refuse)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "parallel": {"tensor_model_parallel_size": 16}}))
    assert main(["train", str(path)]) == 2
    assert f"megatron-embed: error: {path}:4: eight GPUs are too few\n" == capsys.readouterr().err
