"""Every shipped configuration: it fits, its layout is possible, and each stage can be built at the full world size."""

import dataclasses
import re

import pytest
import torch

from megatron_embed.config.load import load_config
from megatron_embed.convert.lora_names import adapter_tensors, resolve_modules
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.planning.advice import adapted_linears, budget_holds
from megatron_embed.planning.hardware import GPU_CHOICES, GPUS
from megatron_embed.planning.layouts import is_possible, plan_layout
from megatron_embed.planning.memory import grid_of
from megatron_embed.planning.parameters import adapter_parameters, held_parameters, stage_parameters, total_parameters
from megatron_embed.planning.shapes import known_models, shape_of
from megatron_embed.planning.token_budget import advised_budget
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import REPOSITORY

FILES = sorted((REPOSITORY / "configs").glob("*h100.yaml"))
SMALL = sorted((REPOSITORY / "configs").glob("*_1x24gb.yaml"))
LARGEST = 512
"""Ranks that the configurations of the largest clusters are built for, too, with more replicas."""


def gpus_of(path):
    return int(re.search(r"_(\d+)xh100$", path.stem).group(1))


def test_there_are_configurations():
    assert {gpus_of(path) for path in FILES} == {8, 16, 32, 64}
    configs = [load_config(str(path), []) for path in FILES]
    assert {config.task for config in configs if config.lora.rank == 0} == {"embedding", "reranker"}
    assert sum(config.lora.rank > 0 for config in configs) >= 5
    # tests/planning/test_parameters.py counts every one of these in Transformers' model.
    assert {config.model.path for config in configs} == set(known_models())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_fits_and_its_name_says_its_layout(path):
    config, gpus = load_config(str(path), []), gpus_of(path)
    shape = shape_of(config.model.path)
    assert is_possible(config, shape, gpus)
    plan = plan_layout(config, shape, gpus, GPUS["h100"], adapted_linears(config, shape))
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_token_budget_is_the_one_that_plan_advises(path):
    config, gpus, gpu = load_config(str(path), []), gpus_of(path), GPUS["h100"]
    shape = shape_of(config.model.path)
    advised = advised_budget(config, shape, gpus, gpu, adapted_linears(config, shape), budget_holds)
    assert config.training.micro_batch_tokens == advised.config.training.micro_batch_tokens
    assert f" {advised.memory.total / 2**30:.1f} of {gpu.memory_gib:.0f} GiB by `plan`" in path.read_text()


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_it_fits_one_small_gpu_with_the_budget_that_plan_advises(path):
    config, gpu = load_config(str(path), []), GPU_CHOICES["24gb"]
    shape = shape_of(config.model.path)
    advised = advised_budget(config, shape, 1, gpu, adapted_linears(config, shape), budget_holds)
    assert config.training.micro_batch_tokens == advised.config.training.micro_batch_tokens
    assert f" {advised.memory.total / 2**30:.1f} of {gpu.memory_gib:.0f} GiB by `plan`" in path.read_text()
    assert ("qlora" in path.stem) == (config.model.quantization == "nf4")
    assert config.checkpoint.directory == f"runs/{path.stem}"
    assert f"configs/{path.name}" in path.read_text()


def stages_on_meta(config, gpus):
    """Parameters of a rank of each pipeline stage of a world of `gpus` ranks, built without memory: (frozen dense,
    frozen expert, trained dense, trained expert)."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_embed.models.encoder import build_model
    from megatron_embed.models.heads import HeadSpec
    from megatron_embed.models.lora_settings import Adapters
    from megatron_embed.parallel.topology import initialize, shutdown

    shape, counts = shape_of(config.model.path), []
    parts = adapted_linears(config, shape)
    adapters = None if parts is None else Adapters(rank=config.lora.rank, scale=1.0, dropout=0.0, seed=1, parts=parts)
    head = HeadSpec(kind=config.reranker.head, true_token_id=1, false_token_id=0) if config.task == "reranker" else None
    stages = config.parallel.pipeline_model_parallel_size
    new_group = dist.new_group
    # Megatron also creates gloo versions of some groups: fake those as well.
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
    try:
        for stage in range(stages):
            dist.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=stage * gpus // stages, world_size=gpus)
            topology = dataclasses.replace(initialize(config.parallel), device=torch.device("meta"))
            assert topology.pp_rank == stage
            with torch.device("meta"):
                chunks = build_model(config, shape, topology, "lasttoken", head, adapters)
            named = [item for chunk in chunks for item in chunk.named_parameters()]
            assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for _, parameter in named)
            counts.append(tuple(
                sum(parameter.numel() for name, parameter in named
                    if parameter.requires_grad == trained and ("experts" in name) == expert)
                for trained in (False, True) for expert in (False, True)))
            shutdown()
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    finally:
        dist.new_group = new_group
    return counts


@pytest.mark.parametrize("path, gpus", [(path, gpus_of(path)) for path in FILES] + [
    (path, LARGEST) for path in FILES if gpus_of(path) == 64],
    ids=lambda value: value if isinstance(value, int) else value.stem)
def test_a_rank_of_each_stage_is_built_at_the_full_world_size(path, gpus):
    config = load_config(str(path), [])
    shape, sizes = shape_of(config.model.path), config.parallel
    parts = adapted_linears(config, shape)
    (counts,) = run_on_ranks(stages_on_meta, 1, config, gpus)
    expected = [held_parameters(config, shape, stage, parts) for stage in range(len(counts))]
    assert counts == [(held.frozen.dense, held.frozen.expert, held.trained.dense, held.trained.expert)
                      for held in expected]
    # Put together again, the shards are the model: what tensor parallelism copies is known from one rank's share.
    alone = dataclasses.replace(sizes, tensor_model_parallel_size=1, expert_model_parallel_size=1,
                                expert_tensor_parallel_size=1)
    whole = sum(stage_parameters(shape, alone, stage).total for stage in range(len(counts)))
    assert whole == total_parameters(shape)
    if parts is not None:
        family = rules_for(shape.family)
        tensors = adapter_tensors(family, shape, resolve_modules(family, ["all-linear"], "lora"), config.lora.rank)
        assert adapter_parameters(shape, alone, config.lora.rank, parts).total * shape.num_layers == sum(
            tensor.shape[0] * tensor.shape[1] for tensor in tensors)


SIZES = {"TP": "parallel.tensor_model_parallel_size", "PP": "parallel.pipeline_model_parallel_size"}


def planned(path, gpus, *overrides):
    """A line of the tables of docs/parallelism.md: GiB by kind, and whether it fits."""
    config = load_config(str(path), list(overrides))
    shape = shape_of(config.model.path)
    plan = plan_layout(config, shape, gpus, GPUS["h100"], adapted_linears(config, shape))
    memory = plan.memory
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.loss, memory.total)
    return [*(f"{size / 2**30:.1f}" for size in parts), "yes" if plan.fits else "no"]


def test_tables_of_the_documentation_are_those_of_plan():
    first = next(path for path in FILES if path.stem == "qwen3_8b_embed_tp2_8xh100")
    checked, adapters = 0, []
    for line in (REPOSITORY / "docs" / "parallelism.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        adapters = ["lora.rank=16"] if "`lora.rank: 16`" in line else adapters
        path = REPOSITORY / "configs" / f"{name.strip('`')}.yaml"
        if path in FILES:
            assert cells == planned(path, gpus_of(path)), name
        elif len(cells) == 7 and re.match(r"(DP|TP|PP) \d", name):
            overrides = [f"{SIZES[key]}={size}" for key, size in re.findall(r"(TP|PP) (\d+)", name)]
            overrides += [f"training.micro_batch_tokens={tokens.replace(',', '')}"
                          for tokens in re.findall(r"([\d,]+) tokens", name)]
            overrides += [] if "TP" in name else [f"{SIZES['TP']}=1"]
            overrides += ["training.recompute=full"] if "recompute full" in name else []
            assert cells == planned(first, 8, *overrides, *adapters), name
        else:
            continue
        checked += 1
    assert checked == 20
