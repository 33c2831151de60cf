"""The parts of a step's expected time that come from counts (docs/performance.md)."""

import dataclasses

import pytest

from megatron_embed.config.load import load_config
from megatron_embed.errors import ConfigError
from megatron_embed.planning.flops import (
    PLAIN_TRAFFIC,
    elementwise_bytes,
    expert_copies,
    layer_launches,
    model_flops,
)
from megatron_embed.planning.hardware import GPUS
from megatron_embed.planning.layouts import plan_layout
from megatron_embed.planning.shapes import shape_of
from tests.helpers.toys import REPOSITORY

LARGE = str(REPOSITORY / "configs/qwen3_8b_embed_tp2_8xh100.yaml")
SMALL = str(REPOSITORY / "configs/qwen3_0.6b_embed_dp8_8xh100.yaml")


def time_of(path, *overrides):
    config = load_config(path, list(overrides))
    return config, shape_of(config.model.path), plan_layout(config, shape_of(config.model.path), 8, GPUS["h100"]).time


def test_traffic_is_that_of_the_kernels():
    """Counted: 16.2 and 21.7 GB for 5,248 tokens of 36 layers, without the word embedding."""
    config, shape, _ = time_of(LARGE)
    forward, backward = (5248 * 36 * size / 1e9 for size in elementwise_bytes(config, shape))
    assert (forward, backward) == (pytest.approx(16.2, rel=0.05), pytest.approx(21.7, rel=0.05))
    config, _, _ = time_of(LARGE, "model.fused_kernels=off")
    plain = (5248 * 36 * size / 1e9 for size in elementwise_bytes(config, shape))
    assert tuple(plain) == pytest.approx((forward * PLAIN_TRAFFIC[0], backward * PLAIN_TRAFFIC[1]))


def test_experts_cost_what_grouped_products_do():
    """Counted for a layer of Qwen3-30B-A3B, 16 experts on a rank, 2,048 tokens: 0.96 and 2.06 GB; 51 and 164
    launches."""
    config = load_config(str(REPOSITORY / "configs/qwen3_30b_a3b_embed_pp2_ep8_16xh100.yaml"), [])
    shape = shape_of(config.model.path)
    (forward, backward), copied = elementwise_bytes(config, shape), expert_copies(config, shape)
    traffic = 2048 * forward + copied, 2048 * (forward + backward) + 2 * copied
    assert [size / 1e9 for size in traffic] == pytest.approx([0.96, 2.06], rel=0.05)
    launches = layer_launches(config, shape)
    assert (launches[0], sum(launches)) == (51, 164)
    for alone, overrides in ((True, ["parallel.expert_model_parallel_size=128"]), (False, ["model.backend=te"])):
        other = load_config(str(REPOSITORY / "configs/qwen3_30b_a3b_embed_pp2_ep8_16xh100.yaml"), overrides)
        assert expert_copies(other, shape) == 0
        assert (layer_launches(other, shape) == layer_launches(config, shape)) is not alone


def test_utilization_is_that_of_the_counted_step():
    """39.8 % by the arithmetic of tools/count_step.py, one first-pass micro-batch for each of the second."""
    config, shape, time = time_of(LARGE, "training.micro_batch_tokens=5248", "training.first_pass_micro_batches=1")
    share = model_flops(config, shape) / 8 / time.total / (GPUS["h100"].peak_tflops * 1e12)
    assert share == pytest.approx(0.398, abs=0.01)


def test_short_micro_batches_wait_for_the_host():
    _, _, long = time_of(SMALL)
    _, _, short = time_of(SMALL, "training.micro_batch_tokens=1024")
    assert long.launches == 0.0 < short.launches and short.total > 1.5 * long.total
    _, _, plain = time_of(SMALL, "training.micro_batch_tokens=1024", "model.fused_kernels=off")
    assert plain.launches > 2 * short.launches
    assert short.total == pytest.approx(sum(dataclasses.asdict(short).values()))


def test_the_setting_has_two_values():
    with pytest.raises(ConfigError, match=r"model\.fused_kernels"):
        load_config(LARGE, ["model.fused_kernels=on"])
