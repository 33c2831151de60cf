"""Steps without a finite loss or gradient, and jumps of the loss."""

import json
import math

import pytest
import torch

from megatron_embed.errors import ConfigError
from megatron_embed.training.health import REPORT_FILE, Health, deviations
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, train
from tests.helpers.toys import layout, run_config, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def train_with(values, broken, what):
    """(fingerprint of the parameters and moments after each step, error's text) with steps `broken` (from 1) made bad.

    `loss`: the loss is NaN. `gradient`: after their reduction, the last rank's gradients are infinite.
    """
    import torch.distributed as dist

    from megatron_embed.training import loop, step

    seen, original, gradients_of = [], loop.train_step, {}

    def train_step(batch, trainer):
        def spoil(batch):
            sums = gradients_of["call"](batch)
            if len(seen) + 1 in broken and what == "loss":
                sums.values[0] = math.nan
            if len(seen) + 1 in broken and what == "gradient" and dist.get_rank() == dist.get_world_size() - 1:
                for parameter in trainer.chunks[0].parameters():
                    parameter.main_grad.fill_(math.inf)
            return sums

        gradients_of["call"], spoil.objective = trainer.grad_cache, trainer.grad_cache.objective
        metrics = original(batch, step.Trainer(chunks=trainer.chunks, grad_cache=spoil, optimizer=trainer.optimizer,
                                             scheduler=trainer.scheduler))
        seen.append((sum(parameter.double().abs().sum().item() for parameter in trainer.chunks[0].parameters()),
                     moments(trainer.optimizer)))
        return metrics

    loop.train_step = train_step
    try:
        train(values)
    except ConfigError as error:
        return seen, str(error)
    finally:
        loop.train_step = original
    return seen, ""


def moments(optimizer):
    return sum(state["exp_avg"].double().abs().sum().item()
               for part in optimizer.chained_optimizers for state in part.optimizer.state.values())


@pytest.mark.parametrize("what, ranks, sizes, distributed", [
    ("loss", 1, layout(), True), ("gradient", 2, layout(), True), ("gradient", 2, layout(2), False)],
    ids=["loss", "gradient_dp2", "gradient_tp2"])
def test_bad_step_is_skipped_and_counted(model, tmp_path, what, ranks, sizes, distributed):
    values = configuration(model, tmp_path / "run", train_steps=5, parallel=sizes, distributed=distributed)
    for seen, error in run_on_ranks(train_with, ranks, values, (2, 4), what):
        assert not error
        assert seen[1] == seen[0]
        assert seen[3] == seen[2]
        assert seen[2] != seen[1]
        assert seen[4] != seen[3]
        assert all(math.isfinite(value) for pair in seen for value in pair)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 1, 0]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, False]
    assert [line["loss"] is None for line in lines] == [False, what == "loss", False, what == "loss", False]
    assert [line["learning_rate"] for line in lines] == [rate for _, _, rate, _ in curve(tmp_path / "run")]
    assert len({line["learning_rate"] for line in lines}) == 5  # the schedule goes on
    reports = [json.loads(line) for line in (tmp_path / "run" / REPORT_FILE).read_text().splitlines()]
    assert [report["step"] for report in reports] == [2, 4]
    assert all(len(report["rows"]) == 8 and "skipped" in report["what"] for report in reports)
    assert all(row.rpartition(":")[0].endswith("train.jsonl") and int(row.rpartition(":")[2]) for row in
               reports[0]["rows"])


def test_too_many_bad_steps_end_the_run(model, tmp_path):
    values = configuration(model, tmp_path / "run", train_steps=8, max_skipped_steps=2)
    ((seen, error),) = run_on_ranks(train_with, 1, values, (1, 2, 4, 5, 6, 7), "loss")
    assert len(seen) == 6
    assert error.startswith("training.learning_rate = 0.001: the loss became nan in step 6 (3 steps in a row, ")
    values = configuration(model, tmp_path / "first", train_steps=8, max_skipped_steps=0)
    ((seen, error),) = run_on_ranks(train_with, 1, values, (2,), "loss")
    assert len(seen) == 2
    assert "in step 2 (training.max_skipped_steps = 0)" in error


def test_jump_of_the_loss_is_reported_with_its_rows(model, tmp_path, caplog):
    health = Health(run_config(model), lambda step: [f"train.jsonl:{step + line}" for line in range(1, 6)],
                    str(tmp_path), active=True)
    torch.manual_seed(0)
    for step, noise in enumerate(torch.randn(60).tolist()):
        loss = 9.0 if step == 45 else 2.0 + 0.1 * noise
        health.after_step(step, {"loss": loss, "grad_norm": 1.0}, skipped=False)
    (report,) = [json.loads(line) for line in (tmp_path / REPORT_FILE).read_text().splitlines()]
    assert report["step"] == 46
    assert report["rows"] == [f"train.jsonl:{line}" for line in range(46, 51)]
    assert "loss = 9 is " in report["what"]
    assert "train.jsonl:46, train.jsonl:47, train.jsonl:48, ...; all of them in " in caplog.text


def test_deviations():
    flat = [2.0] * 50
    assert deviations(2.1, flat) == pytest.approx(5.0)  # a hundredth of the mean counts as one deviation at least
    assert deviations(1.0, flat) < 0
    assert deviations(100.0, flat[:19]) == 0.0
    spread = [1.0, 3.0] * 25
    assert deviations(6.0, spread) == pytest.approx(4.0)


def test_silent_ranks_write_nothing(model, tmp_path):
    health = Health(run_config(model), lambda step: [], str(tmp_path), active=False)
    health.after_step(0, {"loss": math.nan, "grad_norm": math.nan}, skipped=True)
    assert health.skipped == 1
    assert not list(tmp_path.iterdir())
