"""A run over several data sets: metrics under the name of the set whose turn a step is, and the same turns and rows
after going on in mid-epoch at another data-parallel size."""

import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.runs import go_back
from tests.helpers.toys import MINI_EN, save_model

STEPS = 6
"""Steps to train; an epoch has 8."""


def configured(folder, model, run):
    """Queries of `plain` have all documents of a batch for negatives, those of `labels` their own alone."""
    values = settings(model, run)
    values["data"] |= {"num_negatives": 1, "train": [
        {"path": str(folder / "plain.jsonl")}, {"path": str(folder / "labels.jsonl"), "in_batch_negatives": False}]}
    values["training"] = {"global_batch_size": 8, "micro_batch_size": 2, "train_steps": STEPS, "learning_rate": 1e-3}
    values["checkpoint"] |= {"save_every_steps": 3, "keep": 0}
    values["logging"]["tensorboard"] = True
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def set_of(line):
    """The data set under whose name a step's metrics stand."""
    (name,) = {key.partition("/")[0] for key in line if "/" in key}
    return name


def test_metrics_of_each_set_and_the_same_turns_at_another_data_parallel_size(tmp_path):
    model = save_model(tmp_path / "model", "bert", tokenizer=True)
    rows = [line for line in MINI_EN.read_text(encoding="utf-8").splitlines() if json.loads(line)["negatives"]]
    for name, part in (("plain", rows[:40]), ("labels", rows[40:64])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", configured(tmp_path, model, tmp_path / "straight")])
    assert code == 0, err
    lines = logged(tmp_path / "straight")
    turns = [set_of(line) for line in lines]
    assert len(turns) == STEPS
    assert 1 <= turns.count("labels") < turns.count("plain")
    for name, line in zip(turns, lines, strict=True):
        assert line[f"{name}/loss"] == line["loss"]
        assert line[f"{name}/negatives_per_query"] == (1 if name == "labels" else 15)
        assert f"{name}/grad_norm" not in line
    board = EventAccumulator(str(tmp_path / "straight" / "tensorboard"))
    board.Reload()
    for name in ("plain", "labels"):
        losses = {event.step: event.value for event in board.Scalars(f"{name}/loss")}
        assert losses == {step: pytest.approx(line["loss"], rel=1e-6)
                         for step, (turn, line) in enumerate(zip(turns, lines, strict=True), 1) if turn == name}
    go_back(tmp_path / "straight", tmp_path / "resumed", 3)
    results = run_on_ranks(command, 2, ["train", configured(tmp_path, model, tmp_path / "resumed")])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    again = logged(tmp_path / "resumed")
    assert [set_of(line) for line in again] == turns
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert len({line["loss"] for line in lines}) == STEPS
