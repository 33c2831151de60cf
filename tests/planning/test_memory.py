"""Bytes of parameters, gradients and optimizer as Megatron's buffers hold them."""

import json
import random

import pytest
import torch

from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.memory import grid_of, stage_memory
from megatron_embed.planning.shapes import shape_of
from tests.helpers.planned_models import BERT, MOE, QWEN3, build
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, run_config


def allocated(config):
    """(bytes that this rank's buffers and optimizer hold by kind, what the formula says)."""
    import torch.distributed as dist

    from megatron_embed.parallel.topology import initialize
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp

    topology, shape = initialize(config.parallel), shape_of(config.model.path)
    models = build(config, topology)
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    for chunk in wrapped:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.main_grad.fill_(1e-3)
    optimizer.step()
    state = set()
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state |= {tensor for tensor in part.optimizer.state[parameter].values() if torch.is_tensor(tensor)}
                if config.model.dtype == "bfloat16":
                    assert parameter.dtype == torch.float32
                    state.add(parameter)
    buffers = [buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    measured = {
        "parameters": sum(parameter.nbytes for model in models for parameter in model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in state)}
    expected = stage_memory(config, shape, grid_of(config, dist.get_world_size()), topology.pp_rank,
                            adapted_linears(config, shape))
    return measured, {name: getattr(expected, name) for name in measured}


LAYOUTS = (layout(), layout(2), layout(pp=2), layout(cp=2), layout() | {"expert_model_parallel_size": 2})


def random_case(seed):
    """(config.json, layout, training dtype, whether the optimizer is distributed, section lora) of a small model.

    Layouts take turns, the rest is drawn.
    """
    draw, sizes = random.Random(seed), LAYOUTS[seed % len(LAYOUTS)]
    values = dict(MOE if "expert_model_parallel_size" in sizes else draw.choice([BERT, QWEN3, MOE]))
    heads = draw.choice([4, 8])
    values |= {"hidden_size": 32 * draw.randint(2, 6), "num_attention_heads": heads,
               "num_hidden_layers": draw.randint(2, 6), "vocab_size": draw.randint(1000, 4000)}
    if values["model_type"] == "bert":
        values["hidden_size"] = 32 * heads
    settings = values, sizes, draw.choice(["float32", "bfloat16"]), draw.random() < 0.7
    return *settings, {"rank": 16} if draw.random() < 0.3 else {}


def test_cases_cover_every_kind_of_parallelism():
    cases = [random_case(seed) for seed in range(10)]
    for sizes in LAYOUTS:
        assert {distributed for _, other, _, distributed, _ in cases if other == sizes} >= {True}, sizes
    assert {distributed for _, _, _, distributed, _ in cases} == {True, False}
    assert {values["model_type"] for values, *_ in cases} == {"bert", "qwen3", "qwen3_moe"}
    assert {dtype for _, _, dtype, _, _ in cases} == {"float32", "bfloat16"}
    assert any(lora for *_, lora in cases)


@pytest.mark.parametrize("seed", range(10))
def test_buffers_hold_what_is_counted(seed, tmp_path):
    values, sizes, dtype, distributed, lora = random_case(seed)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = run_config(str(tmp_path), parallel=sizes, dtype=dtype, distributed=distributed, lora=lora)
    results = run_on_ranks(allocated, 2, config)
    for measured, expected in results:
        for name in ("parameters", "gradients"):
            assert measured[name] == pytest.approx(expected[name], rel=0.02), name
    # The distributed optimizer's shards are of equal length, not each rank's parameters.
    for name in ("optimizer",):
        mean = [sum(result[side][name] for result in results) for side in (0, 1)]
        assert mean[0] == pytest.approx(mean[1], rel=0.02)
        assert mean[0] > 0
