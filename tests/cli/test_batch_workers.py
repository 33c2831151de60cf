"""Runs whose batches are prepared by worker processes: the same curve, one tokenizer per replica."""

import json
from pathlib import Path

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, layout, model, train  # noqa: F401

pytestmark = pytest.mark.slow


def train_and_count(values):
    """Also the number of texts that this process has tokenized for batches. Called by all ranks."""
    from megatron_embed.data.loader import StepLoader

    steps, prepare = [], StepLoader.prepare
    StepLoader.prepare = lambda self, step: steps.append(step) or prepare(self, step)
    try:
        train(values)
    finally:
        StepLoader.prepare = prepare
    return len(steps)


@pytest.mark.parametrize("parallel", [layout(tp=2), layout(pp=2), layout(tp=2, pp=2), layout()])
def test_the_curve_is_the_same(parallel, model, tmp_path):
    ranks = 4
    values = configuration(model, tmp_path / "0", parallel=parallel, train_steps=5)
    curves, prepared = {}, {}
    for workers in (0, None, 3):
        values["data"]["workers"] = workers
        values["checkpoint"]["directory"] = str(tmp_path / str(workers))
        prepared[workers] = run_on_ranks(train_and_count, ranks, values)
        curves[workers] = curve(tmp_path / str(workers))
        line = json.loads((tmp_path / str(workers) / "metrics.jsonl").read_text().splitlines()[-1])
        assert 0 <= line["data_wait_seconds"] < line["step_seconds"]
    assert curves[0] == curves[None] == curves[3] and len(curves[0]) == 5
    assert all(count >= 5 for count in prepared[0]) and prepared[3] == [0] * ranks
    assert (prepared[None] == [0] * ranks) == (parallel != layout())


def test_a_file_that_changes_ends_all_ranks_alike(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"q {row}", "positive": f"p {row}"}) + "\n" for row in range(4000)))
    values = configuration(model, tmp_path / "run", parallel=layout(tp=2), train_steps=400)
    values["data"] |= {"train": [str(rows)], "num_negatives": 0, "workers": 2}
    results = run_on_ranks(train_and_break, 4, values, str(rows))
    assert len(set(results)) == 1 and "the file was changed after it was checked" in results[0]


def train_and_break(values, rows):
    """The message that ends the run; rank 0 changes the rows after the third step. Called by all ranks."""
    import torch.distributed as dist

    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.errors import DataError
    from megatron_embed.run.assemble import run_training

    overrides = [f"{section}.{key}={json.dumps(value)}" for section, keys in values.items()
                 for key, value in keys.items()]

    def on_step(step, metrics):
        if step == 3 and dist.get_rank() == 0:
            Path(rows).write_text("{}\n")

    try:
        run_training(config_of_overrides(overrides), on_step)
    except DataError as error:
        return str(error)
    return ""
