"""Activations as `plan` estimates them against what a step's forward and backward passes allocate on CPU ranks.

All of it is the code that a GPU runs, but for the attention kernel: in place of the CPU's, which keeps copies of its
own, stands one that keeps what flash kernels keep, its inputs and its result.
"""

import dataclasses
import json

import pytest
import torch

from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.memory import activation_bytes, first_pass_bytes, grid_of
from megatron_embed.planning.shapes import shape_of
from tests.helpers.planned_models import BERT, MOE, QWEN3, build
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, pack_all, random_texts, run_config


class LikeFlash(torch.autograd.Function):
    """Keeps queries, keys, values and a result of the queries' shape; computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = query.clone()
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        _, key, value, _ = ctx.saved_tensors
        return gradient.clone(), torch.zeros_like(key), torch.zeros_like(value)


def allocated_at_most(action):
    """The most bytes that tensors made by `action` took at one time."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    changes, nodes = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.alloc_size, node.extra_fields.ptr))
    held, most, sizes = 0, 0, {}
    for _, size, address in sorted(changes):
        # What a thread of gloo's frees leaves no event: another tensor at its address shows it.
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
        most = max(most, held)
    return most


def random_models(config, topology):
    """A rank's model chunks with small random weights."""
    models = build(config, topology)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.02)
    return models


def measured(config, tokens, micro_batches):
    """(bytes that this rank's step allocates, what `plan` says of the activations)."""
    import torch.distributed as dist

    from megatron_embed.models.attention import PackedAttention
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import run_schedule
    from megatron_embed.parallel.topology import initialize
    from megatron_embed.platform.compat import forget_router_losses
    from megatron_embed.training.optimizer import wrap_in_ddp
    from megatron_embed.training.step import seed_step

    topology, shape = initialize(config.parallel), shape_of(config.model.path)
    models = random_models(config, topology)
    wrapped = wrap_in_ddp(models, config, topology)
    seed_step(1, 0, topology)
    batches = [to_device(pack_all(random_texts([tokens // 4] * 4, seed=seed), config), topology, "mean", kernel="sdpa",
                         causal=models[0].causal, shape=shape) for seed in range(micro_batches)]

    def attend(self, query, key, value, *args, **options):
        result = LikeFlash.apply(query, key, value)
        return result.reshape(result.shape[0], 1, -1)

    def step():
        forget_router_losses()
        run_schedule(wrapped, batches, topology, lambda micro_batch: lambda output: (output.square().sum(), None),
                     forward_only=False)

    original, PackedAttention.forward = PackedAttention.forward, attend
    try:
        step()  # Megatron keeps some buffers from the first step on
        allocated = allocated_at_most(step)
    finally:
        PackedAttention.forward = original
    assert any(parameter.main_grad.any() for model in models for parameter in model.parameters()
               if parameter.requires_grad)
    grid = dataclasses.replace(grid_of(config, dist.get_world_size()), num_microbatches=micro_batches,
                               micro_batch_tokens=tokens)
    return allocated, activation_bytes(config, shape, grid, topology.pp_rank, adapted_linears(config, shape))


WIDE = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512, "moe_intermediate_size": 128,
        "num_hidden_layers": 8, "max_position_embeddings": 512, "vocab_size": 103}
SLOW = pytest.mark.slow
CASES = [
    pytest.param(BERT, layout(), {}, 1, 1, id="bert", marks=SLOW),
    pytest.param(BERT, layout(), {"recompute": "full"}, 1, 2, id="bert, full", marks=SLOW),
    pytest.param(BERT, layout(2), {}, 2, 1, id="bert, TP 2"),
    pytest.param(QWEN3, layout(), {}, 1, 1, id="qwen3"),
    pytest.param(QWEN3, layout(), {"dtype": "float32"}, 1, 1, id="qwen3, float32", marks=SLOW),
    pytest.param(QWEN3, layout(), {"recompute": "selective"}, 1, 1, id="qwen3, selective", marks=SLOW),
    pytest.param(QWEN3, layout(), {"recompute": "full"}, 1, 2, id="qwen3, full"),
    pytest.param(QWEN3, layout(), {"lora": {"rank": 8}}, 1, 2, id="qwen3, adapters", marks=SLOW),
    pytest.param(QWEN3, layout(2), {}, 2, 1, id="qwen3, TP 2", marks=SLOW),
    pytest.param(QWEN3, layout(2), {"recompute": "full"}, 2, 2, id="qwen3, TP 2, full", marks=SLOW),
    pytest.param(QWEN3, layout(pp=2), {}, 2, 3, id="qwen3, PP 2"),
    pytest.param(QWEN3, layout(pp=2), {"recompute": "full"}, 2, 3, id="qwen3, PP 2, full", marks=SLOW),
    pytest.param(QWEN3, layout(pp=2, vpp=2), {}, 2, 4, id="qwen3, PP 2, VPP 2", marks=SLOW),
    pytest.param(QWEN3, layout(cp=2), {}, 2, 2, id="qwen3, CP 2", marks=SLOW),
    pytest.param(MOE, layout(), {}, 1, 1, id="moe", marks=SLOW),
    pytest.param(MOE, layout() | {"expert_model_parallel_size": 2}, {}, 2, 1, id="moe, EP 2"),
]


@pytest.mark.parametrize("values, sizes, settings, ranks, micro_batches", CASES)
def test_estimate_within_a_fifth(values, sizes, settings, ranks, micro_batches, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values | WIDE))
    config = run_config(str(tmp_path), parallel=sizes, dtype=settings.get("dtype", "bfloat16"),
                        lora=settings.get("lora"), training={"recompute": settings.get("recompute", "none")})
    for allocated, estimated in run_on_ranks(measured, ranks, config, 512, micro_batches):
        assert estimated == pytest.approx(allocated, rel=0.2)
        assert allocated > 2**22


def measured_first_pass(config, tokens):
    """(bytes that a first pass over one micro-batch allocates, what `plan` says of it)."""
    import torch.distributed as dist

    from megatron_embed.models.attention import PackedAttention
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import embed
    from megatron_embed.parallel.topology import initialize
    from megatron_embed.training.step import seed_step

    topology, shape = initialize(config.parallel), shape_of(config.model.path)
    models = random_models(config, topology)
    seed_step(1, 0, topology)
    batches = [to_device(pack_all(random_texts([tokens // 8] * 8), config), topology, "mean", kernel="sdpa",
                         causal=models[0].causal, shape=shape)]
    original, PackedAttention.forward = PackedAttention.forward, lambda self, query, *args, **options: query.flatten(1)[
        :, None].clone()
    try:
        embed(models, batches, topology)
        allocated = allocated_at_most(lambda: embed(models, batches, topology))
    finally:
        PackedAttention.forward = original
    grid = dataclasses.replace(grid_of(config, dist.get_world_size()), micro_batch_tokens=tokens)
    return allocated, first_pass_bytes(config, shape, grid, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("values", [BERT, QWEN3, MOE], ids=["bert", "qwen3", "moe"])
def test_first_pass_within_a_fifth(values, dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values | WIDE))
    ((allocated, estimated),) = run_on_ranks(measured_first_pass, 1, run_config(str(tmp_path), dtype=dtype), 2048)
    assert estimated == pytest.approx(allocated, rel=0.2)
