"""Weight gradients that the matrix product itself adds to their float32 buffer.

Megatron's linears do so by Apex's extension `fused_weight_gradient_mlp_cuda`. Where that is not installed, cuBLAS can
do the same through torch: a product of half-precision matrices whose result is float32 and is added to.
"""

import functools
import logging

import torch
from torch import Tensor

from megatron_embed.platform.compat import HAS_CUDA, linear_layers

logger = logging.getLogger(__name__)


class TorchProducts:
    """Stands for Apex's extension, under its functions' names and arguments."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad += grad_output.T @ inputs: [tokens, inner], [tokens, outer] and [outer, inner] in float32."""
        if inputs.dtype == torch.float32:
            torch.addmm(main_grad, grad_output.t(), inputs, out=main_grad)
        else:
            torch.ops.aten.addmm.dtype_out(main_grad, grad_output.t(), inputs, torch.float32, out=main_grad)


@functools.cache
def products_can_accumulate() -> bool:
    """Whether Megatron's `gradient_accumulation_fusion` can be used: with Apex's extension, or, put in its place,
    torch's product if this torch and GPU have it. The same on ranks with the same packages and GPUs."""
    if not HAS_CUDA:
        return False
    if linear_layers._grad_accum_fusion_available:
        return True
    sums, ones = torch.ones(16, 16, device="cuda"), torch.ones(8, 16, dtype=torch.bfloat16, device="cuda")
    try:
        TorchProducts.wgrad_gemm_accum_fp32(ones, ones, sums)
    except (AttributeError, RuntimeError, TypeError) as error:  # torch 2.6 to 2.9 has no such product
        logger.info("weight gradients are added to their buffers by operators of their own: %s", error)
        return False
    if not bool((sums == 9).all()):
        logger.warning("torch's product does not add to its result; weight gradients are added by operators of their "
                       "own")
        return False
    vars(linear_layers).update(fused_weight_gradient_mlp_cuda=TorchProducts, _grad_accum_fusion_available=True)
    return True
