"""Bytes of parameters, gradients and optimizer as Megatron's buffers hold them; activations as autograd keeps them."""

import json
import random

import pytest
import torch

from megatron_embed.planning.memory import grid_of, layer_activation_bytes, stage_memory
from megatron_embed.planning.shapes import shape_of
from tests.planning.test_parameters import BERT, MOE, QWEN3
from tests.ranks import run_on_ranks
from tests.toys import layout, pack_all, random_texts, run_config


def allocated(config):
    """(bytes that this rank's buffers and optimizer hold by kind, what the formula says)."""
    import torch.distributed as dist

    from megatron_embed.models.encoder import build_model
    from megatron_embed.parallel.topology import initialize
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp

    topology, shape = initialize(config.parallel), shape_of(config.model.path)
    models = build_model(config, shape, topology, "mean")
    wrapped = wrap_in_ddp(models, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    for chunk in wrapped:
        for parameter in chunk.parameters():
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
    expected = stage_memory(config, shape, grid_of(config, dist.get_world_size()), topology.pp_rank)
    return measured, {name: getattr(expected, name) for name in measured}


def random_case(seed):
    """(config.json, layout, training dtype, whether the optimizer is distributed) of a small model."""
    draw = random.Random(seed)
    values = dict(draw.choice([BERT, QWEN3, MOE]))
    heads = draw.choice([4, 8])
    values |= {"hidden_size": 32 * draw.randint(2, 6), "num_attention_heads": heads,
               "num_hidden_layers": 2 * draw.randint(1, 3), "vocab_size": draw.randint(1000, 4000)}
    if values["model_type"] == "bert":
        values["hidden_size"] = 32 * heads
    sizes = draw.choice([layout(), layout(2), layout(pp=2), layout(cp=2)])
    if values["model_type"] == "qwen3_moe" and draw.random() < 0.6:
        sizes = layout() | {"expert_model_parallel_size": 2}
    return values, sizes, draw.choice(["float32", "bfloat16"]), draw.random() < 0.7


@pytest.mark.parametrize("seed", range(10))
def test_buffers_hold_what_is_counted(seed, tmp_path):
    values, sizes, dtype, distributed = random_case(seed)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = run_config(str(tmp_path), parallel=sizes, dtype=dtype, distributed=distributed)
    results = run_on_ranks(allocated, 2, config)
    for measured, expected in results:
        for name in ("parameters", "gradients"):
            assert measured[name] == pytest.approx(expected[name], rel=0.02), name
    # The distributed optimizer's shards are of equal length, not each rank's parameters.
    for name in ("optimizer",):
        mean = [sum(result[side][name] for result in results) for side in (0, 1)]
        assert mean[0] == pytest.approx(mean[1], rel=0.02)
        assert mean[0] > 0


def kept(config, tokens):
    """Bytes that autograd keeps of a forward pass, parameters not counted.

    Of attention what flash kernels keep, its inputs and its result: the CPU's kernels keep float32 copies besides.
    """
    from megatron_embed.models.attention import PackedAttention
    from megatron_embed.models.encoder import attention_kernel, build_model, to_device
    from megatron_embed.parallel.topology import initialize

    topology = initialize(config.parallel)
    (model,) = build_model(config, shape_of(config.model.path), topology, "mean")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    micro = to_device(pack_all(random_texts([tokens // 4] * 4), config), topology, "mean",
                      kernel=attention_kernel(config), causal=model.causal)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def forward(self, query, key, value, *args, **options):
        for tensor in (query, key, value):
            keep(tensor)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return original(self, query, key, value, *args, **options)

    original, PackedAttention.forward = PackedAttention.forward, forward
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(micro)
    finally:
        PackedAttention.forward = original
    assert output.requires_grad
    return sum(size for size, _ in storages.values())


def per_layer(values, folder, tokens=256):
    sizes = []
    for layers in (1, 3):
        path = folder / str(layers)
        path.mkdir()
        (path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers, "vocab_size": 103,
                                                               "max_position_embeddings": 256}))
        config = run_config(str(path), dtype="bfloat16")
        sizes.append(run_on_ranks(kept, 1, config, tokens)[0])
    return (sizes[1] - sizes[0]) / 2 / tokens, config


@pytest.mark.parametrize("values", [BERT, QWEN3], ids=["bert", "qwen3"])
def test_activations_of_a_layer_within_a_fifth(values, tmp_path):
    wide = values | {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256,
                     "moe_intermediate_size": 96}
    measured, config = per_layer(wide, tmp_path)
    assert layer_activation_bytes(config, shape_of(config.model.path)) == pytest.approx(measured, rel=0.2)
