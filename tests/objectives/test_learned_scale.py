"""The temperature and bias that a run trains: Adam's steps, CLIP's bound, and what is remembered. Their gradients under
every layout: tests/objectives/test_losses.py; a resumed run: tests/checkpoint/test_resume.py."""

import json
import math

import pytest
import torch

from megatron_embed.objectives.learned_scale import LearnedScale
from tests.helpers.toys import run_config

GRADIENTS = [(0.3, -2.0), (-0.1, 0.5), (0.02, 0.1), (4.0, -0.3), (-0.2, 0.0)]
RATES = [0.0, 1e-3, 2e-3, 1.5e-3, 1e-3]
"""Learning rates of the model."""


def scale(loss="sigmoid", **objective):
    return LearnedScale(run_config("none", training={"learning_rate": 2e-3, "adam_beta2": 0.95}, objective={
        "loss": loss, "temperature": 0.1, "learnable_temperature": True, **objective}))


def metrics(gradients):
    return dict(zip(("log_scale_gradient", "bias_gradient"), gradients, strict=False))


@pytest.mark.parametrize("rate", [None, 0.02])
def test_steps_are_those_of_torch(rate):
    ours = scale(bias=-3.0, temperature_learning_rate=rate)
    values = torch.tensor([math.log(10.0), -3.0], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([values], betas=(0.9, 0.95), eps=1e-8)
    for gradients, learning_rate in zip(GRADIENTS, RATES, strict=True):
        adam.param_groups[0]["lr"] = learning_rate * (10 if rate else 1)  # the model's is 2e-3
        values.grad = torch.tensor(gradients, dtype=torch.float64)
        adam.step()
        ours.step(metrics(gradients), learning_rate)
        assert [ours.temperature, ours.bias] == pytest.approx([math.exp(-values[0].item()), values[1].item()],
                                                              rel=1e-12)
    assert abs(ours.temperature - 0.1) > 1e-5


def test_temperature_of_info_nce_goes_no_lower_than_clips_and_comes_back():
    ours = scale("info_nce", temperature_learning_rate=1.0)
    assert ours.names == ("temperature", "log_scale_gradient")
    for _ in range(5):
        ours.step(metrics((-1.0,)), 2e-3)
    assert ours.temperature == pytest.approx(0.01, rel=1e-12)
    for _ in range(20):
        ours.step(metrics((1.0,)), 2e-3)
    assert ours.temperature > 0.02
    free = scale(temperature_learning_rate=1.0)
    for _ in range(5):
        free.step(metrics((-1.0, 0.0)), 2e-3)
    assert free.temperature < 0.001


def test_a_gradient_that_is_not_finite_changes_nothing():
    ours, other = scale(), scale()
    ours.step(metrics((float("nan"), 1.0)), 1e-3)
    assert ours.state_dict() == other.state_dict()


def test_state_survives_json():
    straight, resumed = scale(), scale(temperature=0.3, bias=2.0)
    for gradients in GRADIENTS[:3]:
        straight.step(metrics(gradients), 1e-3)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for gradients in GRADIENTS[3:]:
        straight.step(metrics(gradients), 1e-3)
        resumed.step(metrics(gradients), 1e-3)
    assert (resumed.temperature, resumed.bias) == (straight.temperature, straight.bias)
