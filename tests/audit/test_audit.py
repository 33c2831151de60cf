"""`audit`: equal to a run in every layout; what differs is found, and named if it is a known fault."""

import json
import os
import shutil
from unittest import mock

import pytest
import torch

from megatron_embed.errors import ConfigError
from megatron_embed.platform.cuda_environment import DETERMINISTIC
from tests.audit.audits import STEPS, audit_of, run_with, values_of
from tests.audit.faults import FAULTS, train_with
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.reranker_runs import run_settings
from tests.helpers.runs import DROPOUT, go_back, model  # noqa: F401  a fixture
from tests.helpers.toys import layout, save_model, save_reranker

LAYOUTS = {"1 rank": (1, layout()), "DP=2": (2, layout()), "TP=2": (2, layout(2)), "PP=2": (2, layout(pp=2)),
           "CP=2": (2, layout(cp=2))}
"""Ranks and sizes of the runs that are audited."""
VARIANTS = [
    {"objective": {"directions": ["query_to_document", "query_to_query", "document_to_document", "document_to_query"],
                   "mask_margin": 0.3, "learnable_temperature": True},
     "embedding": {"pooling": "mean", "matryoshka_dims": [32, 16]}, "data": {"num_positives": 2}},
    {"objective": {"loss": "triplet", "margin": 1.0, "mask_duplicates": False, "temperature": 0.02}},
    {"training": {"micro_batch_tokens": 256}}, {"lora": {"rank": 4, "target_modules": ["all-linear"]}},
    {"model": {"dtype": "bfloat16"}}, {"training": DROPOUT}]
"""Settings of further runs, by section."""


@pytest.fixture(scope="module")
def clean(model, tmp_path_factory):
    """A run of one rank without faults."""
    return run_with(None, model, tmp_path_factory.mktemp("clean"))


def changed(directory, target, change):
    """A copy of a run whose records of the audited steps are changed by `change`."""
    shutil.copytree(directory, target)
    lines = [json.loads(line) for line in (target / "audit.jsonl").read_text().splitlines()]
    for record in lines:
        if record["step"] == STEPS and "metrics" in record:
            change(record)
    (target / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def test_clean_step_is_equal(clean):
    """The replay begins two steps before; every row is named."""
    code, result = audit_of(clean, STEPS)
    assert (code, result["equal"], result["replayed_steps"]) == (0, True, 2)
    assert result["checkpoint"] == str(clean / "step_000004") and len(result["rows"]) == 8
    assert result["rows"][0]["source"].startswith(f"{clean}.jsonl:")
    for name, values in result["metrics"].items():
        assert values["replayed"] == pytest.approx(values["logged"], rel=1e-5), name


def settings_of_replay(directory):
    """(exit code, setting of torch and environment variables in every replayed step, torch's setting afterwards)."""
    from megatron_embed.audit import replay

    step, seen = replay.gradient_step, []

    def recorded(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), {name: os.environ.get(name) for name in (
            *DETERMINISTIC, "CUDA_DEVICE_MAX_CONNECTIONS")}))
        return step(*arguments)

    with mock.patch.object(replay, "gradient_step", recorded):
        code, *_ = command(["audit", str(directory), "--step", "2"])
    return code, seen, torch.are_deterministic_algorithms_enabled()


def test_deterministic_run_is_replayed_by_deterministic_algorithms(model, tmp_path):
    """By the variables that the run's kernels and layout need, too; torch's own setting comes back."""
    directory = run_with(None, model, tmp_path, ranks=2, parallel=layout(2), training={
        "deterministic": True, "train_steps": 2, "warmup_steps": 0})
    wanted = {name: values[0] for name, values in DETERMINISTIC.items()} | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert run_on_ranks(settings_of_replay, 2, directory) == [(0, [(True, wanted)] * 2, False)] * 2


def test_metrics_that_are_gone_are_named(clean, tmp_path):
    """The comparison that could not be made; the others are."""
    assert audit_of(clean, STEPS)[1]["notes"] == []
    shutil.copytree(clean, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if json.loads(line)["step"] != STEPS]
    file.write_text("".join(lines))
    code, result = audit_of(tmp_path / "run", STEPS)
    assert (code, result["equal"]) == (0, True)
    assert result["notes"] == [f"{file}: no row with a loss of step 6, so its numbers are not compared with those of "
                               "audit.jsonl"]
    file.unlink()
    code, out, *_ = run_on_ranks(command, 1, ["audit", str(tmp_path / "run"), "--step", str(STEPS)])[0]
    assert code == 0 and f"\n{file}: not there, so its numbers are not compared with those of audit.jsonl\n" in out


@pytest.mark.parametrize("part, key, value", [
    ("labels", "labels", "0" * 16), pytest.param("rows", "row_order", "0" * 16, marks=pytest.mark.slow),
    pytest.param("texts", "query_tokens", 1, marks=pytest.mark.slow)])
def test_changed_record_is_different(clean, tmp_path, part, key, value):
    code, result = audit_of(changed(clean, tmp_path / "run", lambda record: record.update({key: value})), STEPS)
    assert (code, result["first_difference"]["part"], result["first_difference"]["step"]) == (3, part, STEPS)


def test_what_cannot_be_audited(clean, tmp_path):
    for directory, step, words in ((clean, STEPS + 1, "its log has the steps 1 to 6"), (tmp_path, 1, "no audit.jsonl")):
        code, _, error, *_ = run_on_ranks(command, 1, ["audit", str(directory), "--step", str(step)])[0]
        assert code == 2 and words in error


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_clean_steps_of_a_layout_are_equal(tmp_path, name):
    """From the first weights on, in one process; BERT, whose biases of keys move by rounding alone."""
    ranks, sizes = LAYOUTS[name]
    training = {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "train_steps": 20,
                "warmup_steps": 2, "weight_decay": 0.1}
    directory = run_with(None, save_model(tmp_path / "bert", "bert", tokenizer=True), tmp_path, ranks=ranks,
                         parallel=sizes, training=training, checkpoint={"save_every_steps": 20})
    code, result = audit_of(directory, 20)
    assert (code, result["replayed_steps"], result["first_difference"]) == (0, 20, None)


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS, ids=[str(index) for index in range(len(VARIANTS))])
def test_other_losses_and_settings_are_equal(model, tmp_path, settings):
    directory = run_with(None, model, tmp_path, ranks=2, **settings)
    code, result = audit_of(directory, STEPS)
    assert (code, result["first_difference"]) == (0, None)


@pytest.mark.slow
def test_negatives_of_micro_batches_need_as_many_ranks(model, tmp_path):
    directory = run_with(None, model, tmp_path, ranks=2, objective={"negatives": "micro_batch"})
    assert audit_of(directory, STEPS, 2)[0] == 0
    code, error = audit_of(directory, STEPS)
    assert code == 2 and "objective.negatives = 'micro_batch'" in error and "2 data-parallel ranks" in error


@pytest.mark.slow
def test_reranker_is_equal(tmp_path):
    directory = save_reranker(tmp_path / "model", "Qwen3ForCausalLM")
    file = run_settings(directory, tmp_path, training={"train_steps": 4}, checkpoint={
        "directory": str(tmp_path / "run"), "save_every_steps": 2})
    assert run_on_ranks(command, 2, ["train", file])[0][0] == 0
    code, result = audit_of(tmp_path / "run", 4)
    assert (code, result["first_difference"]) == (0, None)


@pytest.mark.slow
def test_run_that_was_resumed_under_another_layout_is_equal(model, tmp_path):
    """Steps 1 to 4 on two data-parallel ranks, 5 and 6 on two tensor-parallel ones."""
    values = values_of(model, tmp_path)
    run_on_ranks(train_with, 2, None, values)
    directory = go_back(tmp_path / "run", tmp_path / "resumed", 4)
    values["checkpoint"]["directory"], values["parallel"] = str(directory), layout(2)
    run_on_ranks(train_with, 2, None, values)
    for step in (4, 6):
        code, result = audit_of(directory, step)
        assert (code, result["first_difference"]) == (0, None)


@pytest.mark.slow
def test_run_that_goes_on_with_other_rows(model, tmp_path):
    """It notes from which step on; its steps are audited with the new rows, those before with the old ones."""
    values = values_of(model, tmp_path)
    run_on_ranks(train_with, 1, None, values)
    directory = go_back(tmp_path / "run", tmp_path / "more", 4)
    file = tmp_path / "more.jsonl"
    file.write_text("".join((tmp_path / "run.jsonl").read_text().splitlines(keepends=True)[5:]))
    values["checkpoint"]["directory"], values["data"]["train"] = str(directory), [str(file)]
    with pytest.raises(ConfigError, match="195 rows that are not the 200 rows this run began with"):
        run_on_ranks(train_with, 1, None, values)
    values["data"]["allow_changes"] = True
    run_on_ranks(train_with, 1, None, values)
    assert [audit_of(directory, step)[0] for step in (4, STEPS)] == [0, 0]
    starts = [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines() if '"start"' in line]
    assert [(record["step"], record["start"]["rows"]["rows"]) for record in starts] == [(0, 200), (4, 195)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_named(model, tmp_path, name):
    fault = FAULTS[name]
    directory = run_with(name, model, tmp_path)
    code, result = audit_of(directory, fault.step)
    assert code == 3
    assert result["first_difference"]["part"] == fault.part, result["first_difference"]
    assert result["causes"] and result["causes"][0]["name"] == fault.name, result["causes"]
