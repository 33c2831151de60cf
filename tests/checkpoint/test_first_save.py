"""A save before the first successful step holds the optimizer of a run that has made none, and is gone on from."""

import math

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.toys import layout, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def train_with_bad_steps(values, bad):
    """A run whose first `bad` steps have a loss of NaN."""
    from megatron_embed.training import loop, step

    original, done = loop.train_step, [0]

    def train_step(batch, trainer):
        def spoilt(batch):
            sums = trainer.grad_cache(batch)
            if done[0] < bad:
                sums.values[0] = math.nan
            return sums

        spoilt.objective = trainer.grad_cache.objective
        metrics = original(batch, step.Trainer(chunks=trainer.chunks, grad_cache=spoilt, optimizer=trainer.optimizer,
                                             scheduler=trainer.scheduler))
        done[0] += 1
        return metrics

    loop.train_step = train_step
    try:
        train(values)
    finally:
        loop.train_step = original


@pytest.mark.parametrize("ranks, sizes, distributed, lora, dtype", [
    (2, layout(), True, {}, "float32"), (1, layout(), False, {"rank": 4}, "float32"),
    pytest.param(1, layout(), False, {}, "float32", marks=pytest.mark.slow),
    pytest.param(2, layout(), True, {"rank": 4}, "float32", marks=pytest.mark.slow),
    pytest.param(2, layout(pp=2), True, {}, "bfloat16", marks=pytest.mark.slow),
    pytest.param(2, layout(tp=2), False, {}, "bfloat16", marks=pytest.mark.slow)])
def test_run_goes_on_from_a_save_before_the_first_step(model, tmp_path, ranks, sizes, distributed, lora, dtype):
    values = configuration(model, tmp_path / "run", parallel=sizes, distributed=distributed, train_steps=4,
                           checkpoint={"save_every_steps": 2, "keep": 0})
    values |= {"lora": lora, "model": values["model"] | {"dtype": dtype}}
    run_on_ranks(train_with_bad_steps, ranks, values, 2)
    expected = curve(tmp_path / "run")
    assert [loss is None for loss, *_ in expected] == [True, True, False, False]
    go_back(tmp_path / "run", tmp_path / "resumed", 2)
    values["checkpoint"]["directory"] = str(tmp_path / "resumed")
    run_on_ranks(train, ranks, values)
    assert curve(tmp_path / "resumed") == expected
    assert expected[2][0] != expected[3][0]
