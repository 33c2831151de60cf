"""Stands in for Transformer Engine's norms and linears: their arguments, checks and communication, with torch's sums.

Signatures are those of version 2.3. Each check names the file under transformer_engine/pytorch of version 2.20.0.dev0
(commit d0067d0) and the rule that it stands for. FP8 is emulated by casts to torch's float8 types and back
(te_fp8.py); that tensors be on a GPU is not asked for.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as functional

from tests.helpers import te_fp8
from tests.helpers.te_regions import kernels, region

buffers = None
"""Arguments of `initialize_ub`, once it was called."""
counted = []
"""(class, parallel mode, recipe or None, whether with gradients, whether communication overlaps) of each forward."""


def initialize_ub(shape, tp_size, use_fp8=False, dtype=torch.bfloat16, ub_cfgs=None, bootstrap_backend=None):
    """module/base.py: buffers of one shape for all layers, once in a process."""
    global buffers
    if buffers is not None:
        raise RuntimeError("UB communicators are already initialized.")
    if bootstrap_backend not in ("gloo", "mpi", "nccl"):
        raise ValueError(f"Invalid torch.distributed backend {bootstrap_backend!r}")
    buffers = {"tokens": shape[0], "hidden": shape[1], "tp_size": tp_size, "fp8": use_fp8}


def _gathered(local, group):
    whole = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


def _scattered(whole, group):
    share = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(share, whole.contiguous(), group=group)
    return share


def _summed(tensor, group):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, group=group)
    return tensor


class _Product(torch.autograd.Function):
    """The product, its communication and its gradients. Weight gradients are added to `main_grad` if asked."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, linear, recipe, is_first):
        columns, split = linear.parallel_mode == "column", linear.tp_size > 1
        shape, local = inputs.shape, inputs.reshape(-1, inputs.shape[-1])
        whole = _gathered(local, linear.tp_group) if columns and linear.sequence_parallel else local
        with region("quantize", 0 if recipe is None else 2) as tensors:
            quantized_weight = linear.quantized_weight(weight, recipe, is_first)
            quantized = te_fp8.along_features(whole, recipe)
            tensors += [] if recipe is None else [whole, weight]
        outputs = quantized @ quantized_weight.T
        if bias is not None and not linear.gemm_bias_unfused_add:
            with region("bias of the product", 0):
                outputs = outputs + bias
        if split and linear.parallel_mode == "row":
            outputs = (_scattered if linear.sequence_parallel else _summed)(outputs, linear.tp_group)
        ctx.linear, ctx.recipe, ctx.is_first, ctx.shape = linear, recipe, is_first, shape
        ctx.save_for_backward(local, quantized_weight)
        ctx.has_bias, ctx.weight = bias is not None and not linear.gemm_bias_unfused_add, weight
        return outputs.reshape(-1, *shape[1:-1], outputs.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        linear, recipe, weight = ctx.linear, ctx.recipe, ctx.weight
        local, quantized_weight = ctx.saved_tensors
        columns, group = linear.parallel_mode == "column", linear.tp_group
        gradient = gradient.reshape(-1, gradient.shape[-1])
        if linear.sequence_parallel and not columns:
            gradient = _gathered(gradient, group)
        whole = _gathered(local, group) if columns and linear.sequence_parallel else local
        with region("quantize", 0 if recipe is None else 1) as tensors:
            quantized = te_fp8.along_features(gradient, recipe, backward=True)
            tensors += [] if recipe is None else [gradient]
        input_gradient = quantized @ quantized_weight
        if linear.tp_size > 1 and columns:
            input_gradient = (_scattered if linear.sequence_parallel else _summed)(input_gradient, group)
        weight_gradient = None
        if weight.requires_grad:
            if recipe is not None:
                # common/gemm/cublaslt_gemm.cu: the leading dimension, here the tokens, is a multiple of 16.
                assert whole.shape[0] % 16 == 0, "Leading dimension requirement on A for FP8 GEMM. Caller must pad."
            with region("quantize", 0):  # with the other direction, by one kernel
                columns_of = [te_fp8.along_tokens(gradient, recipe, backward=True), te_fp8.along_tokens(whole, recipe)]
            weight_gradient = columns_of[0].T @ columns_of[1]
            if linear.fuse_wgrad_accumulation:
                with region("sum of the product", 0):  # module/linear.py: accumulate_wgrad_into_param_main_grad
                    if ctx.is_first:
                        weight.main_grad.copy_(weight_gradient)
                    else:
                        weight.main_grad.add_(weight_gradient)
                    weight.grad_added_to_main_grad = True
                    weight_gradient = torch.full_like(weight, torch.nan)  # get_dummy_wgrad: not to be read
        bias_gradient = gradient.sum(dim=0) if ctx.has_bias else None
        return input_gradient.reshape(ctx.shape), weight_gradient, bias_gradient, None, None, None


class _Base(torch.nn.Module):
    def set_parallelism(self, tp_group, tp_size, parallel_mode, sequence_parallel):
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.tp_group = tp_group
        assert parallel_mode in (None, "column", "row"), f"parallel_mode {parallel_mode} not supported"
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        if parallel_mode == "column":
            assert self.out_features % self.tp_size == 0
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            assert self.in_features % self.tp_size == 0
            self.in_features //= self.tp_size

    def set_overlap(self, ag, rs, rs_dgrad, bulk_dgrad, bulk_wgrad, name):
        columns = self.sequence_parallel and self.parallel_mode == "column"
        rows = self.sequence_parallel and self.parallel_mode == "row"
        self.ub_overlap_ag_fprop, self.ub_overlap_rs_dgrad = ag and columns, rs_dgrad and columns
        self.ub_overlap_rs_fprop, self.ub_overlap_ag_dgrad = rs and rows, ag and rows
        self.ub_bulk_dgrad = bulk_dgrad and columns and not self.ub_overlap_rs_dgrad
        self.ub_bulk_wgrad = bulk_wgrad and columns and not self.ub_overlap_rs_dgrad
        if any((self.ub_overlap_ag_fprop, self.ub_overlap_rs_dgrad, self.ub_overlap_rs_fprop,
                self.ub_overlap_ag_dgrad, self.ub_bulk_dgrad, self.ub_bulk_wgrad)):
            assert buffers is not None, "initialize_ub() must be called before layer construction."
            assert name in ("qkv", "proj", "fc1", "fc2"), "Userbuffer name [string] is not set."
        self.ub_name = name

    def make_weights(self, bias, return_bias, dtype, device):
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        # Of a row-parallel product the bias is added after the sum over the ranks.
        self.gemm_bias_unfused_add = self.parallel_mode == "row" and self.apply_bias
        dtype = dtype or torch.get_default_dtype()
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = int(self.parallel_mode == "row"), 1
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
            if self.parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            else:
                self.bias.tensor_model_parallel = True
                self.bias.partition_dim, self.bias.partition_stride = 0, 1
        else:
            self.bias = torch.empty(0, dtype=dtype)
        self.kept_weight = None

    def quantized_weight(self, weight, recipe, is_first):
        """module/base.py, quantize_weight: kept from one micro-batch for the next unless `is_first` is None."""
        if recipe is None or is_first is None:
            return te_fp8.weights(weight, recipe)
        if is_first or self.kept_weight is None:
            self.kept_weight = te_fp8.weights(weight, recipe).detach()
        return self.kept_weight

    def check_forward(self, inputs):
        recipe = te_fp8.FP8GlobalStateManager.recipe
        for name, parameter in self.named_parameters():
            if parameter.dtype != inputs.dtype:  # module/base.py, set_activation_dtype
                raise TypeError(f"Data types for parameters must match: {inputs.dtype} and {name!r} {parameter.dtype}")
        if self.tp_size > 1 and self.tp_group is None:
            raise RuntimeError("Tensor parallel group not initialized.")
        assert inputs.shape[-1] == self.in_features, "GEMM not possible"
        if recipe is not None:
            for tensor in (inputs, self.weight):  # utils.py, assert_dim_for_fp8_exec
                if tensor.shape[:-1].numel() % 8 or tensor.shape[-1] % 16:
                    raise ValueError(f"FP8 execution requires ... divisible by 8 and ... by 16, {tuple(tensor.shape)}")
        overlaps = self.ub_overlap_ag_fprop or self.ub_overlap_rs_fprop
        backward = torch.is_grad_enabled() and (self.ub_bulk_dgrad or self.ub_bulk_wgrad or self.ub_overlap_ag_dgrad)
        if overlaps or backward:
            if recipe is not None and not recipe.per_tensor:
                raise NotImplementedError("Comm+GEMM overlap is only supported with ... per-tensor current scaling")
            if buffers["fp8"] != (recipe is not None):  # module/base.py, get_ub
                raise KeyError(f"UB for {self.ub_name} with use_fp8={recipe is not None} is not registered.")
            shares = self.tp_size if self.parallel_mode == "column" and self.sequence_parallel else 1
            if inputs.shape[:-1].numel() * shares != buffers["tokens"]:  # csrc/.../comm_gemm_overlap.cpp
                raise RuntimeError("Tried to copy an invalid tensor into a local chunk of a Userbuffers buffer")
        counted.append((type(self).__mro__[-4].__name__, self.parallel_mode, recipe and type(recipe).__name__,
                        torch.is_grad_enabled(), overlaps))
        return recipe

    def product(self, inputs, recipe, is_first_microbatch):
        if self.fuse_wgrad_accumulation and self.weight.requires_grad and torch.is_grad_enabled():
            assert self.weight.main_grad.shape == self.weight.shape  # module/linear.py, main_grad_func
        outputs = _Product.apply(inputs, self.weight, self.bias if self.apply_bias else None, self, recipe,
                                 is_first_microbatch)
        if self.gemm_bias_unfused_add:
            outputs = outputs + self.bias
        return (outputs, self.bias) if self.return_bias else outputs

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


class Linear(_Base):
    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
                 tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
                 return_bias=False, params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda",
                 ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False,
                 ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None, name=None):
        super().__init__()
        assert parameters_split is None and not delay_wgrad_compute and symmetric_ar_type is None
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.set_parallelism(tp_group, tp_size, parallel_mode, sequence_parallel)
        self.set_overlap(ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad, ub_name)
        self.make_weights(bias, return_bias, params_dtype, device)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return self.product(inp, self.check_forward(inp), is_first_microbatch)


class LayerNormLinear(_Base):
    def __init__(self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False,
                 tp_group=None, tp_size=1, get_rng_state_tracker=None, init_method=None, bias=True,
                 normalization="LayerNorm", return_bias=False, params_dtype=None, parallel_mode=None,
                 return_layernorm_output=False, return_layernorm_output_gathered=False, parameters_split=None,
                 zero_centered_gamma=False, device="cuda", ub_overlap_ag=False, ub_overlap_rs=False,
                 ub_overlap_rs_dgrad=False, ub_bulk_wgrad=False, ub_bulk_dgrad=False, ub_name=None,
                 delay_wgrad_compute=False, symmetric_ar_type=None, name=None):
        super().__init__()
        assert not return_layernorm_output and parameters_split is None
        self.zero_centered_gamma = zero_centered_gamma
        assert normalization in ("LayerNorm", "RMSNorm"), "Unsupported normalization type!"
        if parallel_mode == "row":
            raise NotImplementedError("Normalization does not support tensor-parallel distribution.")
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation, self.eps = fuse_wgrad_accumulation, eps
        self.set_parallelism(tp_group, tp_size, parallel_mode, sequence_parallel)
        self.set_overlap(ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad, ub_name)
        ones = torch.full((in_features,), float(not zero_centered_gamma), dtype=params_dtype, device=device)
        self.layer_norm_weight = torch.nn.Parameter(ones)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros_like(ones))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel
        self.make_weights(bias, return_bias, params_dtype, device)

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        # module/layernorm_linear.py: this overlap only with gradients
        kept, self.ub_overlap_ag_fprop = self.ub_overlap_ag_fprop, self.ub_overlap_ag_fprop and torch.is_grad_enabled()
        recipe = self.check_forward(inp)
        self.ub_overlap_ag_fprop = kept
        return self.product(_normalized(inp, self.layer_norm_weight, self.layer_norm_bias, self), recipe,
                            is_first_microbatch)


def _normalized(inputs, weight, bias, norm):
    """In float32, rounded once. common/normalization: one kernel, backward two (the second sums over tokens)."""
    def rms_norm(inputs, weight):
        weight = weight.float() + float(norm.zero_centered_gamma)
        return functional.rms_norm(inputs.float(), inputs.shape[-1:], weight, norm.eps).to(inputs.dtype)

    def layer_norm(inputs, weight, bias):
        weight = weight.float() + float(norm.zero_centered_gamma)
        return functional.layer_norm(inputs.float(), inputs.shape[-1:], weight, bias.float(),
                                     norm.eps).to(inputs.dtype)

    if bias is not None:
        return kernels("layer norm", (1, 2), layer_norm, inputs, weight, bias)
    return kernels("rms norm", (1, 2), rms_norm, inputs, weight)


class RMSNorm(torch.nn.Module):
    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, *, device=None, dtype=None, sm_margin=0):
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None) and not (params_dtype and dtype)
        size = hidden_size if normalized_shape is None else normalized_shape
        self.eps, self.bias, self.zero_centered_gamma = eps, None, zero_centered_gamma
        ones = torch.full((size,), float(not zero_centered_gamma), dtype=params_dtype or dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, inputs):
        assert inputs.shape[-1] == self.weight.shape[0], "the input's last dimension is the normalized one"
        assert inputs.dtype == self.weight.dtype
        rows = inputs.contiguous().view(-1, inputs.shape[-1])  # ops/basic/rmsnorm.py: contiguous, and the output a view
        return _normalized(rows, self.weight, self.bias, self).view(inputs.shape)


class LayerNorm(RMSNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = self.weight.sequence_parallel


class SwiGLU(torch.nn.Module):
    """ops/basic/swiglu.py: the first half of the last dimension is the gate."""

    def __init__(self, *, cache_quantized_input=False):
        super().__init__()
        assert not cache_quantized_input

    def forward(self, inputs):
        assert inputs.dtype in (torch.float32, torch.bfloat16), f"Unsupported dtype ({inputs.dtype})"

        def swiglu(inputs):
            gate, value = inputs.float().chunk(2, dim=-1)
            return (functional.silu(gate) * value).to(inputs.dtype)

        return kernels("swiglu", (1, 1), swiglu, inputs.contiguous())
