"""A run whose micro-batches are filled by tokens is the run whose micro-batches hold a number of queries."""

import json

import pytest
import yaml

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import MINI_EN, layout, save_model

STEPS = 2
BUDGET = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def metrics_of_run(model, folder, rows, parallel, **training):
    folder.mkdir()
    values = settings(model, folder / "run")
    values["data"] |= {"train": [str(rows)], "shuffle": False, "num_negatives": 2}
    values["training"] |= {"train_steps": STEPS, "learning_rate": 1e-3, **training}
    values |= {"objective": {"mask_duplicates": True, "temperature": 0.3}, "parallel": parallel}
    values["checkpoint"] = {}
    values["logging"] |= {"directory": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    results = run_on_ranks(command, 2, ["train", str(folder / "run.yaml")])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    return lines


@pytest.mark.parametrize("parallel, first_pass", [
    (layout(), 1), pytest.param(layout(pp=2, vpp=2), 2, marks=pytest.mark.slow)], ids=["dp2", "pp2"])
def test_budget_changes_no_number_but_the_padding(model, tmp_path, parallel, first_pass):
    rows = tmp_path / "rows.jsonl"
    source = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:8 * STEPS]]
    for row, other in zip(source[::2], source[1::2], strict=True):
        other["negatives"] = [row["positive"][0], *other["negatives"][:1]]  # a text of another row: masked for that one
    for index, row in enumerate(source):
        if index % 8 >= 4:
            row["negatives"] = []  # the second rank's rows: it comes with fewer micro-batches
    rows.write_text("".join(json.dumps(row) + "\n" for row in source), encoding="utf-8")
    by_size = metrics_of_run(model, tmp_path / "size", rows, parallel, micro_batch_size=2)
    by_tokens = metrics_of_run(model, tmp_path / "tokens", rows, parallel, micro_batch_tokens=BUDGET,
                               first_pass_micro_batches=first_pass)
    speed = {"tokens_per_second", "step_seconds", "padding_fraction", "tflops_per_rank", "memory_gib",
             "data_wait_seconds"}
    for ours, plain in zip(by_tokens, by_size, strict=True):
        assert ours["masked_fraction"] == plain["masked_fraction"] > 0
        assert plain["loss"] > 0.3
        for key in plain.keys() - speed:
            assert ours[key] == pytest.approx(plain[key], rel=1e-4), key
        assert 0.02 < ours["padding_fraction"] < 0.6
    # Every bin that was run is counted, those of the agreement included: real tokens of a step are the same.
    real = [line["tokens_per_second"] * line["step_seconds"] for line in (by_size[0], by_tokens[0])]
    assert real[1] == pytest.approx(real[0])
    flops = [line["tflops_per_rank"] * line["step_seconds"] for line in (by_size[0], by_tokens[0])]
    assert flops[1] == pytest.approx(flops[0])
    assert by_tokens[0]["memory_gib"] > 0.1
    eighths = real[1] / (1 - by_tokens[0]["padding_fraction"]) / BUDGET * 8
    assert eighths == pytest.approx(round(eighths))
    assert (round(eighths) % 8 == 0) == (parallel["pipeline_model_parallel_size"] == 2), "a pipeline has one size"
