"""Values and gradients of the element-wise functions against torch's own operators and autograd, in float64."""

import pytest
import torch
import torch.nn.functional as functional

from megatron_embed.kernels import functions, operators, reference
from megatron_embed.kernels.reference import ACTIVATIONS
from tests.helpers.kernels import kernel_cases

EPS = 1e-6


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(function, expected, *tensors, rtol=1e-12):
    """Equal results, and equal gradients of a random sum of them; none of them zero."""
    results, wanted = function(*tensors), expected(*tensors)
    results, wanted = (part if isinstance(part, tuple) else (part,) for part in (results, wanted))
    gradients = []
    for parts in (results, wanted):
        total = sum((part * random(*part.shape, seed=7 + index, dtype=part.dtype).detach()).sum()
                    for index, part in enumerate(parts))
        gradients.append(torch.autograd.grad(total, tensors))
    torch.testing.assert_close(results, wanted, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def norm(x, weight):
    return functional.rms_norm(x, x.shape[-1:], weight, EPS)


def test_rms_norm():
    x, weight = random(5, 1, 12), random(12, seed=1)
    assert_same(lambda x, weight: functions.rms_norm(x, weight, EPS, fused=False), norm, x, weight)


@pytest.mark.parametrize("residuals", [0, 1])
def test_norm_of_a_sum_and_the_sum(residuals):
    tensors = [random(5, 1, 12, seed=index) for index in range(1 + residuals)]
    assert_same(lambda weight, x, *others: functions.rms_norm_of_sum(x, *(others or (None,)), weight, EPS, fused=False),
                lambda weight, *parts: (sum(parts), norm(sum(parts), weight)), random(12, seed=9), *tensors)


def rotated(x, angles):
    """The usual formula: x cos + (the second half negated, the first) sin."""
    first, second = x.chunk(2, dim=-1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("heads, groups", [(6, 2), (3, 3)])
def test_query_key_norm_and_rotation(heads, groups, normed):
    head_dim, angles = 8, random(5, 4, seed=3).detach()
    cos_sin = torch.stack((angles.cos(), angles.sin()))
    weights = [random(head_dim, seed=5), random(head_dim, seed=6)] if normed else []

    def expected(mixed, *weights):
        query, key = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2]
        if weights:
            query, key = norm(query, weights[0]), norm(key, weights[1])
        return rotated(query, angles), rotated(key, angles), mixed[:, :, -1]

    assert_same(lambda mixed, *weights: functions.qkv_rotary(
        mixed, cos_sin, *(weights or (None, None)), heads, EPS, fused=False),
        expected, random(5, groups, heads // groups + 2, head_dim), *weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    function = ACTIVATIONS[activation]
    assert_same(lambda x: functions.glu(x, activation, fused=False),
                lambda x: function(x[..., :6]) * x[..., 6:], random(5, 1, 12))
    assert_same(lambda x, weights: functions.weighted_glu(x, weights, activation, fused=False),
                lambda x, weights: function(x[:, :6]) * x[:, 6:] * weights[:, None], random(5, 12), random(5, seed=4))
    assert_same(lambda x, bias: functions.bias_activation(x, bias, activation, fused=False),
                lambda x, bias: function(x + bias), random(5, 1, 12), random(12, seed=2))


def test_half_precision_is_rounded_where_transformers_rounds():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    module = Qwen3RMSNorm(64, eps=EPS).bfloat16()
    module.weight.data = random(64, seed=1, dtype=torch.bfloat16).detach()
    x, angles = random(5, 1, 64, dtype=torch.bfloat16).detach(), random(5, 16, seed=3).detach().float()
    assert torch.equal(functions.rms_norm(x, module.weight, EPS, fused=False), module(x))
    cos_sin = torch.stack((angles.cos(), angles.sin())).bfloat16()
    mixed = random(5, 2, 4, 32, seed=4, dtype=torch.bfloat16).detach()
    query, key, _ = functions.qkv_rotary(mixed, cos_sin, None, None, 4, EPS, fused=False)
    by_head = (mixed[:, :, :2].flatten(1, 2).transpose(0, 1)[None], mixed[:, :, 2].transpose(0, 1)[None])
    wanted = apply_rotary_pos_emb(*by_head, *torch.cat((cos_sin, cos_sin), dim=-1)[:, None].unbind())
    assert torch.equal(query, wanted[0][0].transpose(0, 1)) and torch.equal(key, wanted[1][0].transpose(0, 1))


def test_autograd_keeps_what_plan_counts():
    """Inputs of the functions and a number per row, whatever the operators in between."""
    kept = []
    x, mixed = random(6, 1, 32), random(6, 2, 4, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        functions.glu(x, "silu", fused=False)
        total, _ = functions.rms_norm_of_sum(x, x, random(32), EPS, fused=False)
        functions.qkv_rotary(mixed, random(2, 6, 4).detach(), random(8), random(8), 4, EPS, fused=False)
    sizes = sorted(tensor.numel() for tensor in kept if tensor.numel() > 8)
    assert sizes == sorted([x.numel(), total.numel(), 32, mixed.numel(), 2 * 6 * 4, 6 * 6]), sizes


@pytest.mark.parametrize("name, arguments", list(kernel_cases(torch.float32)), ids=lambda value: str(value)[:20])
def test_fake_tensors_get_the_shapes_of_real_ones(name, arguments):
    """By which full-size steps are counted (tests/pretend_cuda/full_step.py)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    with FakeTensorMode() as mode:
        faked = operators.kernel(name, fused=True)(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for fake, real in zip(tree_leaves(faked), tree_leaves(vars(reference)[name](*arguments)), strict=True):
        parts = bool(real.numel() and real.shape[0] == 1)  # sums of a weight's gradient; on a GPU there are more
        assert fake.dtype == real.dtype and fake.shape[parts:] == real.shape[parts:]


def test_every_operator_has_a_plain_function_and_needs_a_gpu():
    assert all(callable(vars(reference)[name]) for name in operators.SCHEMAS)
    with pytest.raises(NotImplementedError, match="megatron_embed::rms_norm"):
        functions.rms_norm(random(2, 4), random(4), EPS, fused=True)
