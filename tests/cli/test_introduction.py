"""What a run says of itself: `train --dry-run`, its first and last words, the evaluation before it, saves by epochs."""

import json
import logging

import pytest
import yaml

from megatron_embed.config.schema import CheckpointConfig
from megatron_embed.errors import ConfigError
from tests.helpers.commands import small_beir  # noqa: F401  fixtures
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, model, settings  # noqa: F401  fixtures
from tests.helpers.toys import MINI_EN


def write(folder, model, small_beir, **sections):
    values = settings(model, folder / "run")
    values["data"]["train"] = [str(folder / "train.jsonl")]
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in MINI_EN.read_text().splitlines()[:20]))
    values["training"] |= {"learning_rate": 1e-3, "epochs": 1.6, "train_steps": None}
    values["evaluation"] = {"retrieval": [str(small_beir)], "every_steps": 2}
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def with_log(arguments):
    """(exit code, stdout, stderr, lines of the log) of a command in this worker."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("megatron_embed").addHandler(handler)
    try:
        code, out, err, _ = command(arguments)
    finally:
        logging.getLogger("megatron_embed").removeHandler(handler)
    return code, out, err, "\n".join(messages).splitlines()


def started(arguments, ranks=1):
    """(stdout, lines of the log) of each rank."""
    results = run_on_ranks(with_log, ranks, ["train", *arguments])
    assert [code for code, *_ in results] == [0] * ranks, results[0][2]
    return [(out, log) for _, out, _, log in results]


def test_dry_run_says_all_and_leaves_nothing(tmp_path, model, small_beir):
    config = write(tmp_path, model, small_beir, lora={"rank": 4}, data={"validation_fraction": 0.1},
                   checkpoint={"save_every_epochs": 0.5, "export_at_end": str(tmp_path / "new" / "export")})
    before = sorted(tmp_path.rglob("*"))
    (out, _), other = started([config, "--dry-run"], ranks=2)
    assert other[0] == ""
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["task", "device", "model", "layout", "batch", "rows", "steps", "lengths", "evaluates",
                           "writes"]
    assert "2 ranks on the CPU" in lines["device"] and "2 data-parallel ranks" in lines["layout"]
    trained = 4 * 4 * ((32 + 64) + (64 + 32) + 2 * (32 + 32) + 3 * (32 + 48))
    assert f"{trained:,} trained (" in lines["model"] and "%) by adapters; dtype float32" in lines["model"]
    assert "8 queries per step = 1 micro-batch x 4 queries x 2 data-parallel ranks" in lines["batch"]
    assert "18 to train on, 2 held out" in lines["rows"]
    assert "4 = 1.778 epochs of 2.25 steps" in lines["steps"]
    assert "up to 48 tokens of a query, 48 of a document" in lines["lengths"]
    assert "queries, 40 documents), 2 held-out rows; every 2 steps, before the first and after the last" in lines[
        "evaluates"]
    assert "a checkpoint every 0.5 epochs; the newest 3 and the best by ndcg@10 are kept" in lines["writes"]
    assert sorted(tmp_path.rglob("*")) == before


def test_negatives_that_no_step_takes_are_named(tmp_path, model, small_beir):
    config = write(tmp_path, model, small_beir)
    for number in (0, 1):
        ((out, _),) = started([config, "--dry-run", f"data.num_negatives={number}"])
        assert ("data.num_negatives is 0, so the negatives of rows (up to 1) are not used" in out) == (number == 0)


def test_dry_run_refuses_what_a_run_refuses(tmp_path, model, small_beir):
    config = write(tmp_path, model, small_beir, data={"query_max_length": 100000})
    ((code, out, err, _),) = run_on_ranks(command, 1, ["train", config, "--dry-run"])
    assert code == 2 and out == "" and "run.yaml:" in err and "is longer than the model's" in err
    assert not (tmp_path / "run").exists()


def test_first_and_last_words_of_a_run_and_its_saves(tmp_path, model, small_beir):
    """An evaluation that changes nothing never beats the one before the first step, which is not a checkpoint."""
    config = write(tmp_path, model, small_beir, training={"learning_rate": 1e-30},
                   checkpoint={"save_every_epochs": 1, "keep": 0})
    ((_, words),) = started([config])
    introduction = next(index for index, line in enumerate(words) if line.startswith("task embedding; megatron_embed"))
    assert words[introduction + 6].split()[:2] == ["steps", "4"]
    epochs = [line for line in words if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in epochs] == ["epoch 1 of 1.6, steps 1 to 3",
                                                           "epoch 2 of 1.6, steps 4 to 4"]
    steps = [line for line in words if line.startswith("step 3  loss")]
    assert len(steps) == 1 and "tokens/s  3/4  epoch 1.20  ETA 0:00:0" in steps[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [(row["step"], row["eval/ndcg@10"]) for row in rows if "eval/ndcg@10" in row]
    assert [step for step, _ in scores] == [0, 2, 4] and len({score for _, score in scores}) == 1
    assert "loss" not in rows[0] and [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == [
        "step_000002", "step_000003", "step_000004"]  # the best, the epoch, the last
    end = "\n".join(words[-5:])
    score = f"{scores[0][1]:.4f}"
    assert f"best      {tmp_path}/run/best (step 2): ndcg@10 {score}; before training {score}" in end
    assert f"model = megatron_embed.load('{tmp_path}/run/best')" in end and "model.encode(" in end


def test_last_words_of_a_start_that_has_the_export_left(tmp_path, model, small_beir):
    config = write(tmp_path, model, small_beir)
    started([config, "evaluation.every_steps=4"])
    ((_, words),) = started([config, "evaluation.every_steps=4", f"checkpoint.export_at_end={tmp_path}/export"])
    end = "\n".join(words[-6:])
    assert "finished in 0:0" in end and ": no step was left" in end
    assert f"model = megatron_embed.load('{tmp_path}/export')" in end


@pytest.mark.slow
def test_an_evaluation_before_training_changes_no_step(tmp_path, model, small_beir):
    """Not even one with dropout, whose random numbers follow from the step alone."""
    curves = []
    for name, at_start in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        config = write(tmp_path / name, model, small_beir, training={"hidden_dropout": 0.1},
                       evaluation={"at_start": at_start})
        started([config], ranks=2)
        rows = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        assert (rows[0]["step"] == 0) == at_start
        curves.append([(row["loss"], row["grad_norm"]) for row in rows if "loss" in row])
    assert curves[0] == curves[1] and len(curves[0]) == 4


@pytest.mark.parametrize("values, words", [
    ({"save_every_epochs": 0.0}, "checkpoint.save_every_epochs = 0.0: must be > 0 or null"),
    ({"save_every_epochs": 1.0, "save_every_steps": 100}, "save_every_steps = 100 is set too; keep one of them")])
def test_saves_by_epochs_that_cannot_be(values, words):
    with pytest.raises(ConfigError, match=words):
        CheckpointConfig(**values)
