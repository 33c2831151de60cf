"""A resumed run: what it may change, what it keeps for life, when it is complete, and who may write."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_embed.checkpoint.files import step_directories
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import MINI_EN, MINILM, layout, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """A run of 2 steps, saved after each."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    run_on_ranks(train, 1, configuration(model, directory, train_steps=2, checkpoint={"save_every_steps": 1}))
    return directory


@pytest.fixture
def write(model, begun, tmp_path):
    """A copy of that run and a configuration that continues to 4 steps with some keys replaced."""

    def write(**sections):
        directory = tmp_path / "run"
        if not directory.exists():
            shutil.copytree(begun, directory)
        values = configuration(model, directory, train_steps=4)
        for section, keys in sections.items():
            values[section] = values.get(section, {}) | keys
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.mark.parametrize("section, key, value, words", [
    ("training", "seed", 7, "began with 1234"),
    ("training", "global_batch_size", 16, "began with 8"),
    ("data", "shuffle", False, "began with true"),
    ("data", "num_negatives", 0, "began with 1"),
    ("embedding", "normalize", False, "began with true"),
    ("embedding", "pooling", "lasttoken", "began with 'mean'"),
    ("model", "bidirectional", True, "began with false"),
    ("objective", "learnable_temperature", True, "began with false"),
])
def test_what_a_run_keeps_for_life(write, tmp_path, section, key, value, words):
    path = write(**{section: {key: value}})
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    line = next(line for line, text in enumerate(Path(path).read_text().splitlines(), 1) if f"{key}:" in text)
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    assert_refused(run_on_ranks(command, 2 if key == "seed" else 1, ["train", path]),
                   f"error: {path}:{line}: {section}.{key} = {shown}: ", words, "set it back, or start a new run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_another_objective_of_a_run_without_steps_left_is_refused(write, tmp_path):
    """Its export would be a model that no step trained with this objective."""
    path = write(training={"train_steps": 2}, objective={"temperature": 0.2})
    out = tmp_path / "out"
    assert_refused(run_on_ranks(command, 1, ["train", path, f"checkpoint.export_at_end={out}"]),
                   "objective.temperature = 0.2: the run in ", "has done all its 2 steps with 0.3",
                   "choose another checkpoint.directory, or raise training.train_steps")
    assert not out.exists()
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path, "training.train_steps=3"])
    assert code == 0, err


def test_another_model_and_another_tokenizer_are_refused(write, model, tmp_path):
    wider = save_model(tmp_path / "wider", "qwen3", tokenizer=True, intermediate_size=64)
    assert_refused(run_on_ranks(command, 1, ["train", write(model={"path": wider})]),
                   f"model.path = {wider!r}: another model (ffn_hidden_size = 64, this run began with 48)")
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["of"] = vocabulary["of"], vocabulary["the"]
    (other / "vocab.txt").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_refused(run_on_ranks(command, 1, ["train", write(model={"path": str(other)})]),
                   f"model.path = {str(other)!r}: its tokenizer gives other ids")


@pytest.mark.parametrize("before, words", [
    ({"score_range": []}, "a.jsonl: score_range was [] and is [0, 5]"), ({"path": "b.jsonl"}, "those of b.jsonl"),
    ({}, "the files are not the same")])
def test_changed_rows_are_named_by_the_setting_that_differs(before, words):
    """A setting that an earlier version did not save is not a difference."""
    from megatron_embed.run.resume_check import _changed_entries

    now = {"path": "a.jsonl", "score_range": [0, 5], "a_newer_setting": 1}
    assert _changed_entries([{"path": "a.jsonl", "score_range": [0, 5]} | before], [now]) == words


def test_other_rows_are_refused_and_the_same_rows_elsewhere_are_not(write, tmp_path):
    lines = MINI_EN.read_text().splitlines()
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n".join([*lines[:500], *lines[501:], lines[500]]))
    assert_refused(run_on_ranks(command, 1, ["train", write(data={"train": [str(moved)]})]), "data.train = ",
                   "1000 rows that are not the 1000 rows this run began with", str(MINI_EN))
    moved.write_text("\r\n".join(lines))
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", write(data={"train": [str(moved)]})])
    assert code == 0, err
    assert len(curve(tmp_path / "run")) == 4


def test_other_changes_take_effect_and_are_logged(write, tmp_path):
    path = write(training={"learning_rate": 5e-4, "micro_batch_size": 4, "lr_decay_style": "constant",
                           "adam_beta1": 0.5, "weight_decay": 0.5},
                 parallel=layout(2), objective={"temperature": 0.5}, model={"dtype": "bfloat16"})
    before = tmp_path / "run" / "step_000002" / "config.yaml"
    values = yaml.safe_load(before.read_text())
    assert values["optimizer"]["overlap_param_gather"] == "auto"
    values["optimizer"] |= {"overlap_grad_reduce": True, "overlap_param_gather": False}
    before.write_text(yaml.safe_dump(values))
    results = run_on_ranks(command_with_log, 2, ["train", path])
    assert [code for code, *_ in results] == [0, 0], results[0][1]
    log = results[0][1]
    for words in ("training.learning_rate: 0.001 -> 0.0005", "training.micro_batch_size: 2 -> 4",
                  "parallel.tensor_model_parallel_size: 1 -> 2", "objective.temperature: 0.3 -> 0.5",
                  "optimizer.overlap_grad_reduce: true -> 'auto'"):
        assert words in log, log
    assert "overlap_param_gather" not in log, "`auto` has the effect of `false` here"
    assert [rate for _, _, rate, _ in curve(tmp_path / "run")[2:]] == [5e-4, 5e-4]
    assert results[0][2] == [({0.5}, {0.5, 0.0})]


def command_with_log(arguments):
    """(exit code, what was logged, (beta1, weight decay) of the optimizers' groups at the end)."""
    import logging

    from megatron_embed.__main__ import main
    from megatron_embed.training import loop

    records, groups = [], []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    original, handler = loop.train_step, Keep()

    def train_step(batch, trainer):
        metrics = original(batch, trainer)
        all_groups = trainer.optimizer.param_groups
        groups[:] = [({group["betas"][0] for group in all_groups}, {group["weight_decay"] for group in all_groups})]
        return metrics

    logging.getLogger("megatron_embed").addHandler(handler)
    loop.train_step = train_step
    try:
        return main(arguments), "\n".join(records), groups
    finally:
        loop.train_step = original
        logging.getLogger("megatron_embed").removeHandler(handler)


def test_assets_of_a_resumed_run_come_from_its_checkpoint(write, model, tmp_path):
    """The same model at another path, whose untouched files changed meanwhile, does not leak into new checkpoints."""
    other = shutil.copytree(model, tmp_path / "other")
    (other / "README.md").write_text("another release")
    path = write(model={"path": str(other)}, data={"query_prompt": "ask: "})
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
    assert code == 0, err
    new = step_directories(tmp_path / "run")[4]
    assert not (new / "hf" / "README.md").exists()
    assert yaml.safe_load((new / "config.yaml").read_text())["model"]["path"] == str(other)
    prompts = json.loads((new / "hf" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "ask: "


def test_complete_run_with_its_export_is_left_alone(model, begun, tmp_path):
    directory, export = shutil.copytree(begun, tmp_path / "run"), tmp_path / "export"
    values = configuration(model, directory, train_steps=2, checkpoint={"export_at_end": str(export)})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", str(path)])  # the export was missing
    assert code == 0, err
    weights = load_file(export / "model.safetensors")
    assert weights
    stamps = {file: file.stat().st_mtime_ns for folder in (export, directory) for file in folder.rglob("*")}
    for ranks in (1, 2):
        results = run_on_ranks(command_with_log, ranks, ["train", str(path)])
        assert [code for code, *_ in results] == [0] * ranks
        assert "the run is complete" in results[0][1]
        assert str(export) in results[0][1]
    assert {file: file.stat().st_mtime_ns for folder in (export, directory) for file in folder.rglob("*")} == stamps
    more = [str(path), "training.train_steps=3"]
    assert_refused(run_on_ranks(command, 1, ["train", *more]), "checkpoint.export_at_end", "exists already",
                   "not as the export of this run's last step")
    shutil.rmtree(export)
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", *more])
    assert code == 0, err
    assert (export / "model.safetensors").is_file()
    assert_refused(run_on_ranks(command, 1, ["train", *more, f"checkpoint.export_at_end={MINILM}"]), "exists already")


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.seek(0); file.truncate(); file.write("host elsewhere, process 4711\\n"); file.flush()
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_do_not_write_one_directory(write, tmp_path):
    path = write()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert_refused(run_on_ranks(command, 2, ["train", path]), f"checkpoint.directory = {str(tmp_path / 'run')!r}",
                       "another run writes there (host elsewhere, process 4711)")
        after = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.name != ".lock"}
        assert {file: stamp for file, stamp in before.items() if file.name != ".lock"} == after
    finally:
        holder.kill()
        holder.communicate()
    results = run_on_ranks(command, 2, ["train", path])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    assert f"process {os.getpid()}" not in (tmp_path / "run" / ".lock").read_text()
    assert (tmp_path / "run" / ".lock").read_text().startswith("host ")
    with (tmp_path / "run" / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the worker lives on, its lock does not


def test_checkpoint_that_another_run_wrote_meanwhile(write, begun, tmp_path):
    path = write()
    assert_refused(run_on_ranks(command_while_another_ends, 2, ["train", path], str(tmp_path / "run")),
                   "another run wrote", "step_000001", "start it again")


def command_while_another_ends(arguments, directory):
    """`command`, where the newest checkpoint is another one when the lock is had."""
    from megatron_embed.run import assemble as training

    original = training.initialize

    def initialize(sizes):
        (Path(directory) / "latest").write_text("step_000001\n")
        return original(sizes)

    training.initialize = initialize
    try:
        return command(arguments)
    finally:
        training.initialize = original


