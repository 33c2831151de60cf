"""The CPU adapter's linear against torch's, values and gradients; under tensor parallelism in tests/models."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_embed.platform import cpu_linear
from megatron_embed.platform.cpu_linear import OneDnnFrozenLinear, OneDnnLinear
from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("inner, outer, bias", [(48, 16, True), (16, 48, True), (32, 32, False)])
def test_equals_torchs_linear(inner, outer, bias, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 1, inner), (outer, inner)] + [(outer,)] * bias
    results = []
    for linear in (lambda x, w, b=None: OneDnnLinear.apply(x, w, b, False, False, False, None, None, None),
                   torch.nn.functional.linear):
        inputs = [torch.randn(shape, generator=generator.manual_seed(5), dtype=torch.float64).to(dtype).requires_grad_()
                  for shape in shapes]
        output = linear(*inputs)
        grad = torch.randn(output.shape, generator=generator.manual_seed(6), dtype=torch.float64).to(dtype)
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and theirs.norm() > 1
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("bias", [None, torch.ones(16)])
def test_frozen_weights_give_the_same_output_and_input_gradient(bias):
    generator = torch.Generator().manual_seed(1)
    inputs, weight, grad = (torch.randn(shape, generator=generator) for shape in ((7, 1, 48), (16, 48), (7, 1, 16)))
    inputs.requires_grad_()
    output, expected = OneDnnFrozenLinear.apply(inputs, weight, bias, False, None), torch.nn.functional.linear(
        inputs, weight, bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad),
                               rtol=1e-5, atol=1e-5)


def test_each_kind_of_product_has_its_library():
    inputs, weight, grad = _example()
    calls = []
    multiply = cpu_linear.product

    def recorded(*arguments, library):
        calls.append(library)
        return multiply(*arguments, library=library)

    with mock.patch.object(cpu_linear, "product", recorded):
        for libraries in (("torch", "onednn", "torch"), ("onednn", "torch", "onednn"), ("torch", "torch", "onednn")):
            calls.clear()
            with libraries_set(libraries):
                output = OneDnnLinear.apply(inputs.requires_grad_(), weight.requires_grad_(), None, False, False, False,
                                            None, None, None)
                results = [output, *torch.autograd.grad(output, [inputs, weight], grad)]
            assert tuple(calls) == libraries
            expected = torch.nn.functional.linear(inputs, weight)
            for ours, theirs in zip(results, [expected, *torch.autograd.grad(expected, [inputs, weight], grad)],
                                    strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def libraries_set(libraries):
    cpu_linear.use_libraries(libraries)
    try:
        yield
    finally:
        cpu_linear.use_libraries(cpu_linear.DEFAULT_LIBRARIES)


@pytest.mark.skipif(not cpu_linear.is_available(), reason="no oneDNN on this processor")
def test_onednn_multiplies_where_it_is_chosen():
    left, right = torch.randn(9, 64), torch.randn(5, 64)
    with mock.patch.object(torch.nn.functional, "linear", side_effect=AssertionError):
        cpu_linear.product(left, right, library="onednn")
        with pytest.raises(AssertionError):
            cpu_linear.product(left, right, library="torch")


def test_no_rows_give_a_zero_gradient():
    inputs, weight = torch.zeros(0, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    output = OneDnnLinear.apply(inputs, weight, None, False, False, False, None, None, None)
    output.sum().backward()
    assert output.shape == (0, 4)
    assert inputs.grad.shape == (0, 6)
    assert torch.equal(weight.grad, torch.zeros(4, 6))


def _gradients_of_a_share(sequence_parallel):
    """Rank r holds half of the output columns; returns (output columns, input gradient, weight gradient)."""
    rank, group = dist.get_rank(), dist.group.WORLD
    inputs, weight, grad = _example()
    mine = inputs.chunk(2)[rank].clone() if sequence_parallel else inputs.clone()
    mine, share = mine.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    output = OneDnnLinear.apply(mine, share, None, False, not sequence_parallel, sequence_parallel, None, None, group)
    output.backward(grad.chunk(2, dim=-1)[rank])
    return output.detach(), mine.grad, share.grad


def _example():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(shape, generator=generator) for shape in ((6, 1, 8), (10, 8), (6, 1, 10)))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_shares_make_up_the_whole(sequence_parallel):
    inputs, weight, grad = _example()
    inputs.requires_grad_(), weight.requires_grad_()
    output = torch.nn.functional.linear(inputs, weight)
    output.backward(grad)
    outputs, input_grads, weight_grads = zip(*run_on_ranks(_gradients_of_a_share, 2, sequence_parallel), strict=True)
    torch.testing.assert_close(torch.cat(outputs, dim=-1), output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(weight_grads), weight.grad, rtol=1e-5, atol=1e-5)
    whole = torch.cat(input_grads) if sequence_parallel else input_grads[1]
    torch.testing.assert_close(whole, inputs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpu_linear.is_available(), reason="no oneDNN on this processor")
def test_megatron_uses_it():
    import megatron_embed.platform.compat  # noqa: F401, I001  installs the adapter
    from megatron.core.tensor_parallel import layers

    assert layers.LinearWithGradAccumulationAndAsyncCommunication is OneDnnLinear
    assert layers.LinearWithFrozenWeight is OneDnnFrozenLinear
