"""A whole optimizer step: the norm it reports, the learning rate it used, and that the loss falls alike everywhere."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_on_ranks
from tests.toys import layout, run_config, save_model
from tests.training.exactness import ROWS, build, objective_settings, truth


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """(loss, norm of the gradient of the whole model)."""
    found = truth(model, tmp_path_factory.mktemp("gradients"))
    tensors = load_file(f"{found.gradients}/model.safetensors")
    return found.loss, math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def steps(config, count):
    """Metrics of `count` steps on the same batch."""
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler
    from megatron_embed.training.step import Trainer, train_step

    built, batch = build(config)
    optimizer = build_optimizer(config, built.wrapped, built.topology)
    trainer = Trainer(chunks=built.wrapped, gradients=built.gradients, optimizer=optimizer,
                      scheduler=build_scheduler(optimizer, config.training, 10))
    return [train_step(batch, trainer) for _ in range(count)]


@pytest.mark.parametrize("clip_grad", [0.0, 0.001])
@pytest.mark.parametrize("name, sizes, distributed", [
    ("one", layout(), True), ("dp2", layout(), True), ("dp2", layout(), False), ("tp2", layout(2), True),
    ("tp2", layout(2, sp=False), False), ("pp2", layout(pp=2), True), ("cp2", layout(cp=2), True)])
def test_gradient_norm_is_the_whole_models_before_clipping(model, expected, name, sizes, distributed, clip_grad):
    config = run_config(model, parallel=sizes, objective=objective_settings(), distributed=distributed,
                        training={"global_batch_size": ROWS, "micro_batch_size": 3, "clip_grad": clip_grad,
                                  "learning_rate": 1e-3, "lr_decay_style": "constant"})
    results = run_on_ranks(steps, 1 if name == "one" else 2, config, 1)
    assert expected[1] > 0.01
    for (metrics,) in results:
        assert metrics == results[0][0]
        assert metrics["loss"] == pytest.approx(expected[0], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(expected[1], rel=1e-5)
        assert metrics["learning_rate"] == 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls_on_the_same_batch(model, dtype):
    config = run_config(model, objective=objective_settings(), dtype=dtype,
                        training={"global_batch_size": ROWS, "micro_batch_size": 4, "learning_rate": 1e-3})
    (metrics,) = run_on_ranks(steps, 1, config, 8)
    losses = [step["loss"] for step in metrics]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.2
    rates = [step["learning_rate"] for step in metrics]
    torch.testing.assert_close(torch.tensor(rates), 1e-3 * 0.5 * (1 + torch.cos(torch.arange(8.0) / 10 * math.pi)))


def curves(config):
    return [(step["loss"], step["grad_norm"]) for step in steps(config, 6)]


def test_loss_curve_is_the_same_under_every_layout(model):
    training = {"global_batch_size": ROWS, "micro_batch_size": 3, "learning_rate": 1e-3}
    one = None
    for ranks, sizes in [(1, layout()), (2, layout()), (2, layout(2)), (2, layout(pp=2)), (2, layout(cp=2))]:
        config = run_config(model, parallel=sizes, objective=objective_settings(), training=training)
        found = torch.tensor(run_on_ranks(curves, ranks, config)[-1])
        one = found if one is None else one
        assert one[0, 0] - one[-1, 0] > 0.1
        torch.testing.assert_close(found, one, rtol=1e-4, atol=0)
