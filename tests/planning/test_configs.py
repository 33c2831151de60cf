"""Every shipped configuration: it fits, its layout is possible, and each stage can be built at the full world size."""

import dataclasses
import re

import pytest
import torch

from megatron_embed.config.load import load_config
from megatron_embed.planning.hardware import GPUS
from megatron_embed.planning.layouts import is_possible, plan_layout
from megatron_embed.planning.memory import grid_of
from megatron_embed.planning.parameters import stage_parameters, total_parameters
from megatron_embed.planning.shapes import shape_of
from tests.ranks import run_on_ranks
from tests.toys import REPOSITORY

FILES = sorted((REPOSITORY / "configs").glob("*h100.yaml"))


def gpus_of(path):
    return int(re.search(r"_(\d+)xh100$", path.stem).group(1))


def test_there_are_configurations():
    assert len(FILES) >= 8
    assert {gpus_of(path) for path in FILES} >= {8, 16, 32, 64}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_fits_and_its_name_says_its_layout(path):
    config, gpus = load_config(str(path), []), gpus_of(path)
    shape = shape_of(config.model.path)
    assert is_possible(config, shape, gpus)
    plan = plan_layout(config, shape, gpus, GPUS["h100"])
    assert plan.fits
    named = {name: int(size) for name, size in re.findall(r"_(tp|pp|cp|ep|dp)(\d+)", path.stem)}
    sizes = config.parallel
    actual = {"tp": sizes.tensor_model_parallel_size, "pp": sizes.pipeline_model_parallel_size,
              "cp": sizes.context_parallel_size, "ep": sizes.expert_model_parallel_size}
    if "dp" in named:
        assert grid_of(config, gpus).dp == named.pop("dp")
    assert {name: size for name, size in actual.items() if size > 1} == named
    assert config.checkpoint.directory == f"runs/{path.stem}"
    assert f"configs/{path.name}" in path.read_text()


def stages_on_meta(config, gpus):
    """Parameters of a rank of each pipeline stage of a world of `gpus` ranks, built without memory."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_embed.models.encoder import build_model
    from megatron_embed.parallel.topology import initialize, shutdown

    shape, counts = shape_of(config.model.path), []
    stages = config.parallel.pipeline_model_parallel_size
    new_group = dist.new_group
    # Megatron asks for gloo twins of some groups: fake as well.
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
    try:
        for stage in range(stages):
            dist.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=stage * gpus // stages, world_size=gpus)
            topology = dataclasses.replace(initialize(config.parallel), device=torch.device("meta"))
            assert topology.pp_rank == stage
            with torch.device("meta"):
                chunks = build_model(config, shape, topology, "lasttoken")
            named = [item for chunk in chunks for item in chunk.named_parameters()]
            assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for _, parameter in named)
            counts.append(tuple(sum(parameter.numel() for name, parameter in named if ("experts" in name) == expert)
                                for expert in (False, True)))
            shutdown()
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    finally:
        dist.new_group = new_group
    return counts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rank_of_each_stage_is_built_at_the_full_world_size(path):
    config, gpus = load_config(str(path), []), gpus_of(path)
    shape = shape_of(config.model.path)
    (counts,) = run_on_ranks(stages_on_meta, 1, config, gpus)
    expected = [stage_parameters(shape, config.parallel, stage) for stage in range(len(counts))]
    assert counts == [(stage.dense, stage.expert) for stage in expected]
    # Put together again, the shards are the model: what tensor parallelism copies is known from one rank's share.
    sizes = config.parallel
    alone = dataclasses.replace(sizes, tensor_model_parallel_size=1, expert_model_parallel_size=1,
                                expert_tensor_parallel_size=1)
    whole = sum(stage_parameters(shape, alone, stage).total for stage in range(len(counts)))
    assert whole == total_parameters(shape)
