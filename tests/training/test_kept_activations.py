"""Activations kept for the second pass change no bit; how many are kept, and by which memory."""

import dataclasses
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_embed.config.load import load_config
from megatron_embed.config.schema import DataConfig
from megatron_embed.errors import ConfigError
from megatron_embed.planning.advice import with_adapters
from megatron_embed.planning.memory import GIB, grid_of, stage_memory
from megatron_embed.planning.shapes import shape_of
from megatron_embed.platform import free_memory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, build, objective_settings
from tests.helpers.toys import REPOSITORY, copy_tokenizer, layout, run_config, save_model, save_toy

LARGE = str(REPOSITORY / "configs" / "qwen3_8b_embed_tp2_8xh100.yaml")


def steps_of(configs):
    """Per configuration, one step: (outputs by forward pass, gradients, sums, router losses, random numbers after)."""
    from megatron_embed.platform.compat import get_all_rng_states, router_losses

    results = []
    for config in configs:
        built, batch = build(config)
        seen = []
        built.chunks[-1].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        sums = built.gradients(batch).values
        losses = router_losses(built.chunks[0].config.num_layers, len(batch.micro_batches))
        gradients = {name: parameter.main_grad.clone()
                     for name, parameter in built.chunks[0].global_parameters().items()}
        results.append((seen, gradients, sums, losses, get_all_rng_states()[0]))
    return results


def kept_configs(model, sizes, numbers, **training):
    return [run_config(model, parallel=sizes, objective=objective_settings(), distributed=True, training={
        "global_batch_size": ROWS, "micro_batch_size": 3, "keep_activations": kept, **training})
        for kept in numbers]


def check_equal(results, numbers, micro_batches):
    """Every step ran as many forward passes as its kept micro-batches leave, and equals the first in every bit."""
    seen, gradients, sums, losses, random = results[0]
    assert len(seen) == 2 * micro_batches and any(gradient.any() for gradient in gradients.values())
    for kept, other in zip(numbers[1:], results[1:], strict=True):
        assert len(other[0]) == 2 * micro_batches - min(kept, micro_batches)
        assert all(map(torch.equal, seen, other[0][:micro_batches]))
        assert gradients.keys() == other[1].keys()
        assert all(torch.equal(gradient, other[1][name]) for name, gradient in gradients.items())
        assert torch.equal(sums, other[2]) and losses == other[3] and torch.equal(random, other[4])


def test_no_bit_changes_with_dropout(tmp_path):
    model, numbers = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True), (0, 1, 9)
    configs = kept_configs(model, layout(), numbers, hidden_dropout=0.2, attention_dropout=0.2)
    (results,) = run_on_ranks(steps_of, 1, configs)
    check_equal(results, numbers, 4)


def test_no_bit_changes_with_experts_and_their_losses(tmp_path):
    model = save_toy(tmp_path / "moe", "Qwen3MoeModel", vocab_size=30522)
    copy_tokenizer(model)
    numbers = (0, 1)
    configs = kept_configs(str(model), layout() | {"expert_model_parallel_size": 2}, numbers,
                           moe_aux_loss_coefficient=0.1)
    for results in run_on_ranks(steps_of, 2, configs):
        assert "load_balancing_loss" in results[0][3]
        check_equal(results, numbers, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("sizes", [layout(2), layout(2, sp=False), layout(cp=2), layout()],
                         ids=["tp2", "tp2nosp", "cp2", "dp2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_bit_changes_under_every_layout(tmp_path, kind, sizes, recompute):
    model, numbers = save_model(tmp_path / kind, kind, tokenizer=True), (0, 1, 2, 4)
    configs = kept_configs(model, sizes, numbers, hidden_dropout=0.2, recompute=recompute)
    micro_batches = 4 // (2 // math.prod(list(sizes.values())[:3]))
    for results in run_on_ranks(steps_of, 2, configs):
        check_equal(results, numbers, micro_batches)


def most_kept(config):
    """The most elements that autograd keeps for backward passes at one time of a step."""
    built, batch = build(config)
    held = most = 0

    def pack(tensor):
        nonlocal held, most
        held += tensor.numel()
        most = max(most, held)
        return tensor

    def unpack(tensor):
        nonlocal held
        held -= tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        built.gradients(batch)
    return most


@pytest.mark.slow
def test_k_micro_batches_need_the_memory_of_k(tmp_path):
    model = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True)
    one, two, four = (run_on_ranks(most_kept, 1, config)[0] for config in kept_configs(model, layout(), (0, 2, 4)))
    assert 1.5 * one < two < 2.6 * one
    assert 3.0 * one < four < 5.2 * one


def counts_of_ranks(limits):
    """How many micro-batches a step keeps by each limit in tokens, if rank r has three of 10 * (r + 1) tokens."""
    from megatron_embed.training.kept_activations import KeptActivations

    tokens = 10 * (dist.get_rank() + 1)
    micro_batches = [SimpleNamespace(token_ids=torch.zeros(tokens)) for _ in range(3)]
    return [KeptActivations(micro_batches=most, tokens=limit).count(micro_batches, dist.group.WORLD)
            for most, limit in limits]


def test_every_rank_keeps_as_many_as_the_fullest():
    limits = [(None, 9), (None, 10), (None, 20), (None, 39), (None, 40), (None, 60), (2, None), (7, None)]
    assert run_on_ranks(counts_of_ranks, 1, limits) == [[0, 1, 2, 3, 3, 3, 2, 3]]
    assert run_on_ranks(counts_of_ranks, 2, limits) == [[0, 0, 1, 1, 2, 3, 2, 3]] * 2


def kept_by(config, free, device="cpu", pp_size=1):
    """(what a run keeps with free bytes of each rank, what it logs)."""
    from megatron_embed.training import kept_activations

    topology = SimpleNamespace(device=torch.device(device), world_size=8, pp_size=pp_size)
    own, logged = free[dist.get_rank()], []
    with mock.patch.object(free_memory, "host_bytes", return_value=own), \
            mock.patch.object(free_memory, "gpu_bytes", return_value=own), \
            mock.patch.object(kept_activations.logger, "info", lambda text, *values: logged.append(text % values)):
        kept = kept_activations.build_kept_activations(config, shape_of(config.model.path), topology)
    return kept, logged


def kept_of(config, free, **options):
    """The same on as many ranks as `free` has, which agree."""
    first, *others = run_on_ranks(kept_by, len(free), config, free, **options)
    assert all(other == first for other in others)
    return first


def test_auto_keeps_what_the_fullest_gpu_holds():
    config = load_config(LARGE, [])
    grid, shape = grid_of(config, 8), shape_of(config.model.path)
    planned = stage_memory(config, shape, grid, 0)
    total = 140 * GIB

    def tokens(*free):
        kept, (line,) = kept_of(config, [(total, left) for left in free], device="cuda")
        assert line.startswith("training.keep_activations = auto: ")
        return 0 if kept is None else kept.tokens

    alone, beside = tokens(total - GIB), tokens(total, 120 * GIB)
    assert 0 < beside < alone == tokens(total, total)
    spare = 0.9 * total - planned.total
    assert alone == pytest.approx(spare / (1.06 * planned.activations) * grid.micro_batch_tokens, rel=0.01)
    assert tokens(20 * GIB) == 0
    frozen = with_adapters(config, SimpleNamespace(rank=8, alpha=16.0, use_rslora=False, modules=("all-linear",)))
    assert kept_of(frozen, [(total, total)], device="cuda")[0].tokens > 1.3 * alone


def test_auto_keeps_what_half_of_the_host_holds(tmp_path):
    model = save_model(tmp_path / "qwen3", "qwen3")
    config = run_config(model, objective=objective_settings(),
                        training={"global_batch_size": 64, "micro_batch_size": 4})
    one, _ = kept_of(config, [GIB])
    two, (line,) = kept_of(config, [GIB, GIB])
    assert one.tokens > 2 * two.tokens > 1000 and one.micro_batches is None
    assert f"{two.tokens:,} tokens" in line and "micro-batches of a step" in line
    assert kept_of(config, [GIB, GIB // 4])[0].tokens < two.tokens
    # Attention keeps fewer probabilities of shorter texts, and none of those above 256 tokens.
    of_lengths = {length: kept_of(dataclasses.replace(config, data=DataConfig(
        query_max_length=length, document_max_length=length)), [GIB])[0].tokens for length in (64, 256, 512)}
    assert of_lengths[64] > 1.05 * of_lengths[256]
    assert of_lengths[512] == pytest.approx(of_lengths[256], rel=0.06)
    assert kept_of(config, [0])[0] is None


def test_auto_is_off_where_it_cannot_be(tmp_path):
    config, free = load_config(LARGE, []), [(140 * GIB, 140 * GIB)]
    kept, (line,) = kept_of(config, free, device="cuda", pp_size=2)
    assert kept is None and "a pipeline computes every micro-batch again" in line
    assert kept_of(load_config(LARGE, ["objective.negatives=micro_batch"]), free, device="cuda") == (None, [])
    deterministic = ["training.deterministic=true"]
    kept, (line,) = kept_of(load_config(LARGE, deterministic), free, device="cuda")
    assert kept is None and "training.deterministic" in line
    assert kept_of(load_config(LARGE, [*deterministic, "training.first_pass_micro_batches=1"]), free, device="cuda")[0]
    assert kept_of(load_config(LARGE, ["training.keep_activations=0"]), free, device="cuda") == (None, [])


@pytest.mark.parametrize("settings, words", [
    ({"training": {"keep_activations": -1}}, "must be >= 0 or auto"),
    ({"training": {"keep_activations": 2}, "objective": {"negatives": "micro_batch"}}, "has no effect"),
    ({"training": {"keep_activations": 2}, "parallel": layout(pp=2)}, "a pipeline .* computes every micro-batch again"),
])
def test_refusals(settings, words):
    with pytest.raises(ConfigError, match=f"training.keep_activations = .*{words}") as raised:
        run_config("model", **settings)
    assert raised.value.key == "training.keep_activations"


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_the_host(tmp_path, monkeypatch, version):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    mount = tmp_path / "groups" / ("memory" if version == 1 else "")
    limit, used, cache = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if version == 1
                          else ("memory.max", "memory.current", "inactive_file"))
    (mount / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/x\n4:memory:/outer/inner\n" if version == 1
                                     else "0::/outer/inner\n")
    for name, path in (("_MEMINFO", "meminfo"), ("_GROUPS", "cgroup"), ("_MOUNT", "groups")):
        monkeypatch.setattr(free_memory, name, tmp_path / path)
    assert free_memory.host_bytes() == 8000 << 10

    def write(folder, most):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("3000\n")
        (folder / "memory.stat").write_text(f"anon 7\n{cache} 1000\n")

    write(mount / "outer" / "inner", "max" if version == 2 else 1 << 62)
    write(mount / "outer", 9000)
    assert free_memory.host_bytes() == 7000
    write(mount / "outer", 1500)
    assert free_memory.host_bytes() == 0


def test_memory_of_an_unknown_host_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "absent")
    assert free_memory.host_bytes() == 0
