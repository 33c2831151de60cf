"""A run that is evaluated on texts and pairs: its best checkpoint, its curves, its sheet for the projector."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml

from tests.helpers.charts import charts_of
from tests.helpers.commands import evaluated, small_beir  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.runs import go_back
from tests.helpers.scored_pairs import pairs  # noqa: F401  fixtures
from tests.helpers.toys import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def write(folder, model, small_beir, pairs, **evaluation):
    values = settings(model, folder / "run")
    values["training"] |= {"train_steps": 4, "learning_rate": 3e-2, "lr_decay_style": "constant"}
    values["checkpoint"] |= {"keep": 1, "save_every_steps": 100}
    values["evaluation"] = {"retrieval": [str(small_beir)], "sts": [pairs], "every_steps": 1, "at_start": False,
                            **evaluation}
    values["embedding"]["matryoshka_dims"] = [32, 8]
    values["data"]["validation_fraction"] = 0.02
    values["logging"]["tensorboard"] = True
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def test_best_checkpoint_and_projector(model, small_beir, pairs, tmp_path):
    config, run = write(tmp_path, model, small_beir, pairs), tmp_path / "run"
    results = run_on_ranks(command, 2, ["train", config])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    assert results[0][1] == ""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["eval/ndcg@10"] for line in lines if "eval/ndcg@10" in line}
    assert len(values) == 4 and len(set(values.values())) > 1
    assert all("eval/spearman" in line for line in lines if "eval/ndcg@10" in line)
    best = max(values, key=values.get)
    assert os.readlink(run / "best") == f"step_{best:06d}"
    assert {path.name for path in run.glob("step_*")} == {f"step_{best:06d}", "step_000004"}
    assert_found_again(run, lines, best, small_beir, pairs)
    assert_charted(lines)
    sheet = run / "tensorboard" / "00004" / "evaluation"
    vectors = np.loadtxt(sheet / "tensors.tsv", delimiter="\t")
    header, *labels = (sheet / "metadata.tsv").read_text().splitlines()
    assert header == "set\trole\ttext" and len(labels) == len(vectors) > 40
    assert vectors.shape[1] == 32 and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    assert {tuple(label.split("\t")[:2]) for label in labels} == {
        ("few", "query"), ("few", "document"), ("pairs", "query"), ("pairs", "document")}


def assert_found_again(run, lines, step, small_beir, pairs):
    """The run logged what `evaluate` finds, names and values, at every width of its loss."""
    (logged,) = [line for line in lines if line["step"] == step and "eval/ndcg@10" in line]
    metrics = {}
    for data in (str(small_beir), pairs):
        metrics |= evaluated(["--model", str(run / "best"), "--data", data, "--dims", "32,8"], 1)
    assert metrics["dim_8/ndcg@10"] != metrics["dim_32/ndcg@10"] == metrics["ndcg@10"]
    assert metrics["dim_8/spearman"] != metrics["dim_32/spearman"]
    for name, value in metrics.items():
        assert logged[f"eval/{name}"] == pytest.approx(value, abs=1e-6), name


def assert_charted(lines):
    tags = {name if "/" in name else f"train/{name}" for line in lines for name in line} - {"train/step"}
    assert {"train/loss@8", "eval/loss@8", "eval/dim_8/precision@10", "eval/dim_32/pearson"} < tags
    assert [tag for tag in sorted(tags) if len(charts_of(tag)) != 1] == []


def ending_early(folder, model, pairs, **checkpoint):
    """Steps so large that the loss of held-out rows soon rises."""
    values = settings(model, folder / "run")
    values["training"] |= {"train_steps": 12, "learning_rate": 0.3, "lr_decay_style": "constant"}
    values["data"]["validation_fraction"] = 0.02
    values["checkpoint"] |= {"keep": 0, "save_every_steps": 1, "export_at_end": str(folder / "export"),
                             "export": "best", **checkpoint}
    values["evaluation"] = {"sts": [pairs], "every_steps": 1, "best_metric": "eval/loss", "patience": 3,
                            "at_start": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.mark.slow
def test_a_run_without_gain_ends_early_and_its_best_is_exported(model, pairs, tmp_path):
    """However often it is started, and wherever it resumes; the export is the best checkpoint, not the last."""
    config, run, export = ending_early(tmp_path, model, pairs), tmp_path / "run", tmp_path / "export"
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", config])
    assert code == 0, err
    values = {line["step"]: line for line in logged(run) if "eval/loss" in line}
    losses = {step: line["eval/loss"] for step, line in values.items()}
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 3 < 12, losses
    assert (run / "latest").read_text() == f"step_{last:06d}\n" and os.readlink(run / "best") == f"step_{best:06d}"
    metrics = evaluated(["--model", str(export), "--data", pairs], 1)
    assert metrics["spearman"] == pytest.approx(values[best]["eval/spearman"], abs=1e-6)
    assert abs(metrics["spearman"] - values[last]["eval/spearman"]) > 1e-4
    weights, metrics = (export / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_bytes()
    stamp = (export / "model.safetensors").stat().st_mtime_ns
    assert run_on_ranks(command, 1, ["train", config])[0][0] == 0  # nothing to do
    assert (export / "model.safetensors").stat().st_mtime_ns == stamp
    shutil.rmtree(export)
    go_back(run, tmp_path / "other", best + 1)
    shutil.copyfile(run / "metrics.jsonl", tmp_path / "other" / "metrics.jsonl")
    for ranks, directory in ((2, run), (1, tmp_path / "other")):  # only the export; the last two steps as well
        results = run_on_ranks(command, ranks, ["train", config, f"checkpoint.directory={directory}"])
        assert [code for code, *_ in results] == [0] * ranks, results[0][2]
        assert (directory / "latest").read_text() == f"step_{last:06d}\n"
        assert (export / "model.safetensors").read_bytes() == weights
        shutil.rmtree(export)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert [line["step"] for line in logged(tmp_path / "other") if "eval/loss" in line] == list(losses)


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("override, words", [
    ("evaluation.best_metric=eval/losses", ["best_metric = 'eval/losses'", "did you mean 'loss'?", "pearson"]),
    ("data.validation_fraction=0", ["best_metric = 'eval/loss'", "not a metric of this run's evaluations",
                                         "the metrics are pearson, spearman"]),
    ("evaluation.patience=0", ["evaluation.patience = 0", ">= 1"]),
    ("checkpoint.export_at_end=null", ["checkpoint.export = 'best'", "set checkpoint.export_at_end"])])
def test_a_best_that_there_is_not_is_refused(model, pairs, tmp_path, override, words):
    assert_refused(run_on_ranks(command, 1, ["train", ending_early(tmp_path, model, pairs), override]), *words)


@pytest.mark.parametrize("section, key, value", [("checkpoint", "export", "best"), ("evaluation", "patience", 2)])
def test_the_best_of_a_run_that_measures_nothing_is_refused(model, pairs, tmp_path, section, key, value):
    values = settings(model, tmp_path / "run")
    values["checkpoint"]["export_at_end"] = str(tmp_path / "export")
    values[section] = {**values.get(section, {}), key: value}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), f"{section}.{key} = {value!r}",
                   "there is nothing to evaluate")


def test_metrics_that_no_set_has_are_refused(model, small_beir, pairs, tmp_path):
    config = write(tmp_path, model, small_beir, pairs, best_metric="spearmen")
    assert_refused(run_on_ranks(command, 1, ["train", config]), "evaluation.best_metric = 'spearmen'",
                   "did you mean 'spearman'?")
    config = write(tmp_path, model, small_beir, pairs, best_metric="spearman", retrieval=[], sts=[])
    assert_refused(run_on_ranks(command, 1, ["train", config, "data.validation_fraction=0"]),
                   "there is nothing to evaluate")
