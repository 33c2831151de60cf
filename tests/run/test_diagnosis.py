"""`doctor --run`: what it says of real runs that have one fault each, and of good ones (tools/run_examples.py)."""

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.config.load import config_of_values, save_resolved
from megatron_embed.errors import ConfigError
from megatron_embed.models.reranker_settings import RerankerSettings, write_reranker_settings
from megatron_embed.run.diagnosis import AT_ONCE, GUESSING, RULES, mistakes
from megatron_embed.run.logged_run import RunLog, read_run

EXAMPLES = Path(__file__).parent / "examples"
CAUSES = {
    "rate_too_small": "learning rate too small", "temperature_too_large": "temperature too large",
    "temperature_too_small": "temperature too small", "wrong_positives": "wrong positives",
    "vectors_alike": "vectors alike", "positive_repeats_query": "positive repeats query",
    "copies_in_batch": "copies in a batch", "gradient_spikes": "gradient spikes", "padding": "padding",
    "cut_texts": "cut texts", "evaluation_falls": "evaluation falls", "endless_warmup": "endless warmup",
    "few_negatives": "few negatives", "labels_of_one_kind": "labels of one kind", "not_finite": "not finite",
    "swapped": "evaluation below the start", "similarities_sink": "similarities sink",
    "labels_inverted": "labels inverted", "rate_too_high": "learning rate too high",
    "entropy_of_labels": "entropy of the labels"}
"""The fault that each of the runs was given -> the rule that has to name it first."""
STEP = {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0}


def put(example, folder):
    """The example as a run left it in a logging.directory."""
    first, *rows = example.read_text(encoding="utf-8").splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    save_resolved(config_of_values(json.loads(first)["settings"]), folder / "config.yaml")
    return str(folder)


def run_of(rows, evaluations=(), **settings):
    """A run of made-up rows."""
    return RunLog(steps=[{"step": step, **STEP, **row} for step, row in enumerate(rows, 1)],
                  evaluations=evaluations, config=settings)


ROW = {"in_batch_accuracy": 0.5, "negatives_per_query": 7, "positive_similarity": 0.5, "negative_similarity": 0.1}


@pytest.mark.parametrize("change", [
    {"step": None}, {"step": "x"}, {"negatives_per_query": -2}, {"loss": 10**400}, {"loss": float("nan")},
    {"learning_rate": float("inf")}, {"grad_norm": [1]}, {"step": 10**400}, {"in_batch_accuracy": True}])
def test_odd_rows_are_left_out(tmp_path, change):
    rows = [{"step": step, **STEP, **ROW} for step in range(1, 9)]
    text = "".join(f"{json.dumps(row)}\n" for row in [*rows, {**rows[-1], **change}, [1], 7])
    (tmp_path / "metrics.jsonl").write_text(text + "[" * 100_000 + "\n")
    (tmp_path / "suspicious_steps.jsonl").write_text(
        '[1]\n{"what": "9 standard deviations", "rows": 5}\n{"what": 3, "step": {}}\n')
    log = read_run(str(tmp_path))
    assert len(log.steps) in (8, 9) and [name for name, _ in mistakes(log)] in (
        ["gradient spikes"], ["few negatives", "gradient spikes"])


@pytest.mark.parametrize("config, words", [
    ("objective: {temperature: warm}", "objective.temperature = 'warm', which must be a number"),
    ("training: {train_steps: [1]}", r"training.train_steps = \[1\], which must be a number"),
    ("logging: [a]", r"logging = \['a'\] must be a section"), ("logging: hello", "logging = 'hello' must be a section"),
    ("data: 7", "data = 7 must be a section")])
def test_a_damaged_configuration_is_refused(tmp_path, config, words):
    rows = [{**STEP, **ROW, "step": step, "learning_rate": step} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "config.yaml").write_text(config + "\n")
    with pytest.raises(ConfigError, match=words):
        list(mistakes(read_run(str(tmp_path))))


def test_every_example_is_expected():
    assert {path.stem for path in (EXAMPLES / "faulty").glob("*.jsonl")} == set(CAUSES)
    assert len(list((EXAMPLES / "good").glob("*.jsonl"))) >= 12
    assert set(GUESSING) | set(AT_ONCE) <= set(RULES)


@pytest.mark.parametrize("name", CAUSES)
def test_the_fault_of_a_run_is_named_first(name, tmp_path, capsys):
    assert main(["doctor", "--run", put(EXAMPLES / "faulty" / f"{name}.jsonl", tmp_path)]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{CAUSES[name]}: "), first
    assert re.match(r"1 likely mistake in |([2-9]|1\d) likely mistakes in ", last) and "unknown" not in first


@pytest.mark.parametrize("path", sorted((EXAMPLES / "good").glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_good_run_has_none(path, tmp_path, capsys):
    assert main(["doctor", "--run", put(path, tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 likely mistakes in ")


@pytest.mark.parametrize("name, log", [
    ("learning rate too high", run_of([{"loss": 1.0 + step / 5} for step in range(20)])),
    ("gradient spikes", RunLog(steps=run_of([{}] * 20).steps, evaluations=(), config={}, suspicious=[
        {"step": 9, "what": "loss = 9 is 12.0 standard deviations above the mean", "rows": ["a.jsonl:7"]}])),
    ("negatives too easy", run_of([{"loss": 0.001, "in_batch_accuracy": 1.0, "positive_similarity": 0.8}] * 20)),
    ("masked negatives", run_of([{"masked_fraction": 0.4}] * 20))])
def test_rules_without_an_example(name, log):
    assert [rule for rule, _ in mistakes(log)] == [name]


def test_the_length_that_cuts_a_rerankers_pairs_is_named(tmp_path):
    """reranker.max_length has effect, whatever data.*_max_length are; where it is null, a checkpoint says its value."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **STEP, "truncated_fraction": 0.77}) + "\n")

    def said(length, saved=None):
        config = {"task": "reranker", "reranker": {"max_length": length},
                  "data": {"query_max_length": 512, "document_max_length": 512}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        if saved is not None:
            write_reranker_settings(tmp_path / "step_000001" / "hf", saved)
        ((name, text),) = mistakes(read_run(str(tmp_path)))
        return name, text

    (tmp_path / "step_000001" / "hf").mkdir(parents=True)
    words = ("77% of the pairs are cut at reranker.max_length = {}: raise it, up to the model's positions; `data "
             "check` counts lengths")
    assert said(128) == ("cut texts", words.format(128))
    assert said(None) == ("cut texts", words.format("unknown"))
    settings = RerankerSettings(head="score", template=None, instruction="", true_token="yes", false_token="no",
                                max_length=96, activation="sigmoid")
    assert said(None, settings) == ("cut texts", words.format(96))
    assert said(128) == ("cut texts", words.format(128))


def test_little_is_said_of_a_few_steps():
    steps = [{"loss": 4.0, "negatives_per_query": 31.0, "in_batch_accuracy": 0.0, "positive_similarity": 0.5,
              "negative_similarity": 0.5, "padding_fraction": 0.5, "margin_to_mean_negative": 0.0}] * 2
    assert [name for name, _ in mistakes(run_of(steps))] == ["padding"]
    assert [name for name, _ in mistakes(run_of([*steps, steps[0]]))] == ["wrong positives", "padding"]


@pytest.mark.parametrize("margin, names", [(0.001, ["wrong positives"]), (0.1, [])])
def test_wrong_positives_that_are_learned_by_heart_are_named(margin, names):
    steps = [{"loss": 3.3, "negatives_per_query": 31.0, "in_batch_accuracy": 0.15, "positive_similarity": 0.92,
              "negative_similarity": 0.91}] * 8
    evaluations = [{"step": 8, "eval/margin_to_mean_negative": margin}]
    assert [name for name, _ in mistakes(run_of(steps, evaluations)) if name == "wrong positives"] == names


def test_evaluation_below_the_start_names_the_metric_as_it_was_logged():
    evaluations = [{"step": step, "eval/loss": loss} for step, loss in ((0, 1.7280), (4, 2.9957), (8, 3.0))]
    said = dict(mistakes(run_of([{"loss": 3.0 - step / 10} for step in range(8)], evaluations)))
    assert "no evaluation reaches the eval/loss 1.7280 of before training (best 2.9957)" in said[
        "evaluation below the start"]


def test_runs_are_found_by_either_directory(tmp_path):
    """Metrics may lie elsewhere than checkpoints; a line that a kill cut short and null values are left out."""
    logs, checkpoints = tmp_path / "logs", tmp_path / "run"
    (checkpoints / ".assets").mkdir(parents=True)
    logs.mkdir()
    settings = {"training": {"learning_rate": 0.5}, "logging": {"directory": str(logs)}}
    (checkpoints / ".assets" / "config.yaml").write_text(yaml.safe_dump(settings))
    row = {"step": 1, **STEP, "grad_norm": None}
    (logs / "metrics.jsonl").write_text(f'{{"step": 0, "eval/ndcg@10": 0.5}}\n{json.dumps(row)}\n{{"step": 2, "lo')
    log = read_run(str(checkpoints))
    assert [row.keys() for row in log.steps] == [{"step", "loss", "learning_rate"}] and len(log.evaluations) == 1
    assert log.setting("training.learning_rate") == 0.5 and log.setting("training.seed", 7) == 7
    assert read_run(str(logs)).config == {}
    (tmp_path / "above").mkdir()
    logs.rename(tmp_path / "above" / "checkpoints")
    assert len(read_run(str(tmp_path / "above")).steps) == 1


@pytest.mark.parametrize("content, words", [(None, "cannot be read"), ("", "no step is logged")])
def test_directories_that_are_no_run(content, words, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_run(str(tmp_path))


def test_settings_beside_a_run_are_refused(tmp_path, capsys):
    assert main(["doctor", "--run", str(tmp_path), "training.seed=1"]) == 2
    assert "the run's own configuration is read" in capsys.readouterr().err
