"""Stands in for Transformer Engine's GroupedLinear and the padding that it needs in FP8; see te_linears.py.

Signatures and checks are those of version 2.3 (module/grouped_linear.py, fp8_padding.py, fp8_unpadding.py).
"""

import torch
import torch.nn.functional as functional

from tests.helpers import te_fp8
from tests.helpers.te_linears import counted
from tests.helpers.te_regions import kernels, region


class _Products(torch.autograd.Function):
    """A product for each expert, as cuBLAS gets them on several streams."""

    @staticmethod
    def forward(ctx, inputs, linear, sizes, recipe, is_first, *weights):
        assert is_first is None, "weights in FP8 would be kept, and main_grad replaced"
        parts = inputs.split(sizes)
        with region("quantize", 0 if recipe is None else 1 + len(weights)) as tensors:
            quantized = [te_fp8.weights(weight, recipe) for weight in weights]
            cast = [_cast(part, recipe) for part in parts]
            tensors += [] if recipe is None else [inputs, *weights]
        ctx.save_for_backward(inputs, *quantized)
        ctx.linear, ctx.sizes, ctx.recipe, ctx.weights = linear, sizes, recipe, weights
        return _joined([part @ weight.T for part, weight in zip(cast, quantized, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        inputs, *quantized = ctx.saved_tensors
        recipe, weights, fuses = ctx.recipe, ctx.weights, ctx.linear.fuse_wgrad_accumulation
        parts, gradients = inputs.split(ctx.sizes), gradient.contiguous().split(ctx.sizes)
        with region("quantize", 0 if recipe is None else 1) as tensors:
            cast = [_cast(part, recipe, backward=True) for part in gradients]
            tensors += [] if recipe is None else [gradient]
        input_gradient = _joined([part @ weight for part, weight in zip(cast, quantized, strict=True)])
        results = [None] * len(weights)
        if weights[0].requires_grad:
            if recipe is not None:  # common/gemm/cublaslt_gemm.cu, of the dimension that is summed over
                assert not any(size % 16 for size in ctx.sizes), "Leading dimension requirement. Caller must pad."
            for index, (left, right) in enumerate(zip(gradients, parts, strict=True)):
                with region("quantize", 0):
                    left, right = (te_fp8.along_tokens(left, recipe, backward=True),
                                   te_fp8.along_tokens(right, recipe)) if len(left) else (left, right)
                results[index] = left.T @ right
                if fuses:
                    with region("sum of the product", 0):
                        weights[index].main_grad.add_(results[index])
                        weights[index].grad_added_to_main_grad = True
                        results[index] = torch.full_like(weights[index], torch.nan)  # torch.empty: not to be read
        return input_gradient, None, None, None, None, *results


def _joined(parts):
    """In one tensor, where the products themselves write."""
    with region("one output", 0):
        return torch.cat(parts)


def _cast(part, recipe, backward=False):
    return te_fp8.along_features(part, recipe, backward=backward) if len(part) else part


class GroupedLinear(torch.nn.Module):
    def __init__(self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
                 tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None,
                 bias=True, return_bias=False, params_dtype=None, parallel_mode=None, device="cuda",
                 ub_overlap_rs=False, ub_overlap_ag=False, ub_name=None, delay_wgrad_compute=False):
        super().__init__()
        assert not ub_overlap_rs and not ub_overlap_ag, "GroupedLinear doesn't support Userbuffer overlap."
        assert tp_group is None and tp_size == 1 and parallel_mode is None, "current scaling knows no split experts"
        assert not bias and not return_bias and not delay_wgrad_compute, "nothing here computes it"
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        for index in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))

    def forward(self, inp, m_splits, is_first_microbatch=None):
        assert type(m_splits) is list and len(m_splits) == self.num_gemms, "Number of splits should match ..."
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        assert sum(m_splits) == inp.shape[0] > 0
        weights, recipe = [getattr(self, f"weight{index}") for index in range(self.num_gemms)], (
            te_fp8.FP8GlobalStateManager.recipe)
        for name, parameter in self.named_parameters():
            assert parameter.device == inp.device and parameter.shape == (self.out_features, self.in_features), name
            if parameter.dtype != inp.dtype:
                raise TypeError(f"Data types for parameters must match: {inp.dtype} and {name!r} {parameter.dtype}")
        if recipe is not None:
            for tensor in (*inp.split(m_splits), *weights):  # utils.py, assert_dim_for_fp8_exec
                if tensor.shape[0] % 8 or tensor.shape[1] % 16:
                    raise ValueError(f"FP8 execution requires ... divisible by 8 and ... by 16, {tuple(tensor.shape)}")
        if self.fuse_wgrad_accumulation and weights[0].requires_grad and torch.is_grad_enabled():
            assert all(weight.main_grad.shape == weight.shape for weight in weights)
        counted.append(("GroupedLinear", None, recipe and type(recipe).__name__, torch.is_grad_enabled(), False))
        return _Products.apply(inp, self, m_splits, recipe, is_first_microbatch, *weights)


class Fp8Padding(torch.nn.Module):
    """[rows, width] and the rows of each group -> rows with zeros behind each group, and how many each has then."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__()
        assert align_size is not None, "in version 2.3 it would be that of the recipe in effect when this is built"
        self.num_gemms, self.align_size = num_gemms, align_size

    def padded(self, sizes):
        assert len(sizes) == self.num_gemms, "Number of splits should match number of GEMMs."
        return [-(-size // self.align_size) * self.align_size for size in sizes]

    def forward(self, inp, m_splits):
        wanted = self.padded(m_splits)
        if m_splits == wanted:
            return inp, m_splits

        def pad(inputs):
            return torch.cat([functional.pad(part, (0, 0, 0, more - len(part)))
                              for part, more in zip(inputs.split(m_splits), wanted, strict=True)])

        return kernels("padding", (1, 1), pad, inp.contiguous()), wanted


class Fp8Unpadding(Fp8Padding):
    """What Fp8Padding added is left out. `m_splits`: those before the padding."""

    def forward(self, inp, m_splits):
        wanted = self.padded(m_splits)
        if m_splits == wanted:
            return inp

        def unpad(inputs):
            return torch.cat([part[:size] for part, size in zip(inputs.split(wanted), m_splits, strict=True)])

        return kernels("padding", (1, 1), unpad, inp)
