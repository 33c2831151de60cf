"""Weights in 4 and 8 bits: the numbers are bitsandbytes', in every share of them, and no graph keeps the restored."""

import gc

import bitsandbytes.functional
import pytest
import torch

from megatron_embed.convert.quantized_shards import share
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import Context
from megatron_embed.models.families import model_shape
from megatron_embed.models.quantized_linear import QuantizedProduct
from megatron_embed.models.quantized_weight import QuantizedWeight, quantize, restored_whole
from tests.helpers.toys import save_model

QWEN3 = {"hidden_size": 192, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
         "intermediate_size": 384, "num_hidden_layers": 1}
RULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
KINDS = [("nf4", True), ("nf4", False), ("int8", True)]


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    return model_shape(save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", **QWEN3))


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("kind, double", KINDS)
def test_restored_is_bitsandbytes_own(kind, double):
    weight = random_weight(160, 192)
    if kind == "int8":
        codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        theirs = codes.float() * absmax[:, None] / 127
    else:
        theirs = bitsandbytes.functional.dequantize_4bit(
            *bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double))
    ours = restored_whole(quantize(weight, kind, double=double), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    error = float((ours - weight).norm() / weight.norm())
    assert error < (0.01 if kind == "int8" else 0.1)
    assert error > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("kind, double", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_shares_of_ranks_are_those_of_the_whole(shape, kind, double, name):
    """Quantized whole and then sliced, at one and two tensor-parallel ranks."""
    rule, layer, expert = rules_for("qwen3").rule_for(f"decoder.layers.0.{name}.weight")
    context = Context(shape=shape, layer=layer, expert=expert)
    tensors = {part: random_weight(*context.sizes(words), seed=seed) for seed, (part, words) in enumerate(
        zip(rule.hf_names(context), rule.hf_shapes(), strict=True))}
    restored = {part: restored_whole(quantize(tensor, kind, double=double), torch.float32)
                for part, tensor in tensors.items()}
    for size in (1, 2):
        for rank in range(size):
            expected = rule.shard(lambda part, dim, start, stop: restored[part].narrow(dim, start, stop - start),
                                  context, rank, size)
            weight = QuantizedWeight(tuple(expected.shape), allreduce=True)
            weight.fill(*share(rule, context, [quantize(tensor, kind, double=double) for tensor in tensors.values()],
                               rank, size))
            assert torch.equal(weight.restored(torch.float32), expected), (size, rank)
            assert torch.equal(weight.restored(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kind, double, bits", [("nf4", False, 4.5), ("nf4", True, 4.13), ("int8", True, 8.03)])
def test_bits_per_weight(kind, double, bits):
    weight = QuantizedWeight((1024, 1024), allreduce=True)
    weight.fill(quantize(random_weight(1024, 1024), kind, double=double), [(1024, 0, 16)])
    assert 8 * weight.nbytes / 1024**2 == pytest.approx(bits, abs=0.005)


def test_no_graph_keeps_the_restored_weight():
    weight = QuantizedWeight((128, 64), allreduce=True)
    weight.fill(quantize(random_weight(128, 64), "nf4", double=False))
    inputs = random_weight(5, 64, seed=1).requires_grad_()
    outputs = QuantizedProduct.apply(inputs, weight, None, False, None)
    gc.collect()
    held = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor) and tensor.shape == (128, 64)]
    assert not held, "a weight in full precision outlives its product"
    outputs.backward(torch.ones_like(outputs))
    torch.testing.assert_close(inputs.grad, weight.restored(torch.float32).sum(0).expand(5, 64))
