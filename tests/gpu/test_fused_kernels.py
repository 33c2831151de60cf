"""The fused kernels on a GPU against the plain functions on the CPU, and the product that adds weight gradients.

NEVER RUN on a GPU so far; the pretend device has plain functions in their place, so that it tests the calls.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_embed.kernels import functions, operators
from megatron_embed.platform.weight_gradient import TorchProducts, products_can_accumulate
from tests.helpers.kernels import kernel_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
def test_kernels_are_the_plain_functions(dtype, tolerance):
    assert operators.why_no_kernels() is None
    for name, arguments in kernel_cases(dtype):
        wanted = tree_leaves(operators.kernel(name, fused=False)(*arguments))
        made = tree_leaves(operators.kernel(name, fused=True)(*tree_map_only(
            torch.Tensor, lambda tensor: tensor.cuda(), arguments)))
        for result, expected in zip(made, wanted, strict=True):
            if expected.numel() and expected.shape[0] == 1:  # a weight's gradient, in parts on a GPU
                result, expected = result.sum(0), expected.sum(0)
            scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=tolerance * scale,
                                       msg=lambda message, of=name: f"{of}: {message}")


def test_a_tensor_on_the_host_is_refused():
    x, weight = torch.ones(4, 8, device="cuda"), torch.ones(8)
    with pytest.raises((RuntimeError, ValueError), match="device|Pointer|cpu"):
        functions.rms_norm(x, weight, 1e-6, fused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_adds_to_the_gradient_buffer(dtype):
    assert products_can_accumulate()
    generator = torch.Generator().manual_seed(1)
    inputs, gradient = (torch.randn(40, width, generator=generator).to(dtype) for width in (24, 16))
    buffer = torch.randn(16, 24, generator=generator)
    expected = buffer.double() + gradient.double().t() @ inputs.double()
    buffer = buffer.cuda()
    TorchProducts.wgrad_gemm_accum_fp32(inputs.cuda(), gradient.cuda(), buffer)
    torch.testing.assert_close(buffer.cpu().double(), expected, rtol=1e-5, atol=1e-5)
