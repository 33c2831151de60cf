"""Stands in for Transformer Engine where there is none: its call's layout and checks, computed by torch's attention.

The signature and the checks of DotProductAttention are those of version 2.3, the oldest that setup.py asks for; later
ones add arguments at the end. FusedAdam's are of the same version. Only that tensors be on a GPU is not asked for.
"""

import contextlib
import importlib.util
import sys
import types

import torch
import torch.nn.functional as functional

from tests.helpers import te_fp8, te_grouped, te_linears

MASKS = ("no_mask", "padding", "causal", "padding_causal", "causal_bottom_right", "padding_causal_bottom_right",
         "arbitrary")


def checked_window(mask_type, window):
    """Transformer Engine only warns of a window that does not go with the mask, and takes another: refused here."""
    if window is None:
        return (-1, 0) if "causal" in mask_type else (-1, -1)
    none, right = ((-1, 0), window[1] == 0) if "causal" in mask_type else ((-1, -1), window[1] >= 0)
    assert window == none or (window[0] >= 0 and right), window
    return window


class DotProductAttention(torch.nn.Module):
    """[tokens, heads/tp, head_dim] and sequence bounds -> [tokens, heads/tp * head_dim]."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
                 attn_mask_type="causal", window_size=None, sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
                 cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None):
        super().__init__()
        assert attn_mask_type in MASKS and attention_type in ("self", "cross")
        self.attn_mask_type, self.window_size = attn_mask_type, checked_window(attn_mask_type, window_size)
        self.qkv_format, self.dropout, self.kv_channels = qkv_format, attention_dropout, kv_channels
        self.softmax_scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % groups == 0
        self.num_gqa_groups_per_partition = groups // self.tp_size
        assert cp_group is None and attention_dropout == 0, "nothing here computes it"

    def get_extra_state(self):
        """The real one saves its state for FP8, which is empty, under `_extra_state`."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None,
                cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
                max_seqlen_kv=None, attn_mask_type=None, window_size=None, checkpoint_core_attention=False,
                core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True,
                inference_params=None, pad_between_seqs=None):
        layers = (query_layer, key_layer, value_layer)
        mask_type = attn_mask_type or self.attn_mask_type
        window = checked_window(mask_type, self.window_size if window_size is None else window_size)
        assert (qkv_format or self.qkv_format) == "thd", "nothing here computes another"
        assert all(layer.dim() == 3 for layer in layers), "Queries, keys and values must be 3D tensors"
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        assert key_layer.shape == value_layer.shape and query_layer.shape[-1] == key_layer.shape[-1]
        assert key_layer.shape[-1] == self.kv_channels
        assert key_layer.shape[-2] == self.num_gqa_groups_per_partition
        assert "padding" in mask_type, "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.dim() == 1 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        lengths = cu_seqlens_q.diff()
        # Kernels run over as many tokens as they are told.
        assert max_seqlen_q >= int(lengths.max()) and max_seqlen_kv >= int(lengths.max())
        assert int(cu_seqlens_q[-1]) == query_layer.shape[0], "the real one leaves tokens beyond as they come"
        assert attention_mask is None and not pad_between_seqs
        outputs = [self._attend(*(layer[start:end] for layer in layers), window, "causal" in mask_type)
                   for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query, key, value, window, causal):
        """One sequence."""
        places = [torch.arange(len(layer), device=query.device) for layer in (query, key)]
        ahead = places[1] - places[0][:, None]
        mask = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        mask = mask & (ahead >= -window[0]) if window[0] >= 0 else mask
        mask = mask & (ahead <= window[1]) if window[1] >= 0 else mask
        repeats = query.shape[1] // key.shape[1]
        query, key, value = (layer.transpose(0, 1) for layer in (
            query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)))
        return functional.scaled_dot_product_attention(query, key, value, mask,
                                                       scale=self.softmax_scale).transpose(0, 1)


class FusedAdam(torch.optim.Optimizer):
    """AdamW in float32 over state of the dtypes asked for, with Transformer Engine's names for it."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
                 bias_correction=True, adam_w_mode=True, capturable=False, master_weights=False,
                 master_weight_dtype=torch.float32, exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32,
                 use_decoupled_grad=False, store_param_remainders=False, set_grad_none=None):
        assert not amsgrad and not capturable and set_grad_none is None and adam_w_mode and bias_correction
        assert master_weights and master_weight_dtype == torch.float32 and not store_param_remainders
        assert use_decoupled_grad, "gradients and parameters differ in dtype"
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}

    def get_unscaled_state(self, param, state_name):
        assert self.state[param][state_name].dtype == self.dtypes[state_name]
        return self.state[param][state_name].float()

    def set_scaled_state(self, param, state_name, unscaled_state):
        assert unscaled_state.dtype == torch.float32
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.empty_like(param, dtype=self.dtypes[state_name])
        state[state_name].copy_(unscaled_state)

    def initialize_state(self, param, store_param_remainders):
        assert not store_param_remainders
        self.state[param] = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self.dtypes.items()}
        self.state[param]["master_param"].copy_(param)

    def state_dict(self):
        values = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        values["state"] = {index: {name: self.get_unscaled_state(parameters[index], name) for name in state}
                          for index, state in values["state"].items()}
        return values

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = {}
            for name, value in state.items():
                self.set_scaled_state(parameters[index], name, value.float())

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.decoupled_grad
                assert gradient.dtype == torch.float32
                if not state:
                    self.initialize_state(parameter, False)
                    state = self.state[parameter]
                average = state["exp_avg"].float().lerp(gradient, 1 - beta1)
                square = state["exp_avg_sq"].float().lerp(gradient**2, 1 - beta2)
                update = average / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
                main = state["master_param"]
                main.sub_(group["lr"] * (update + group["weight_decay"] * main))
                parameter.copy_(main)
                state["exp_avg"].copy_(average)
                state["exp_avg_sq"].copy_(square)


EXTENSION = "megatron.core.extensions.transformer_engine"


def _modules():
    """The modules of the package by name, with what Megatron and we take from them."""
    class Absent:
        """A base class of what is not used here."""

    linears = {name: vars(te_linears)[name] for name in ("Linear", "LayerNormLinear", "RMSNorm", "LayerNorm")}
    grouped = {name: vars(te_grouped)[name] for name in ("GroupedLinear", "Fp8Padding", "Fp8Unpadding")}
    fp8 = {name: vars(te_fp8)[name] for name in ("FP8GlobalStateManager", "fp8_autocast")}
    supported = dict.fromkeys(("check_fp8_support", "check_fp8_block_scaling_support"), lambda: (True, ""))
    recipes = {name: vars(te_fp8)[name]
               for name in ("Format", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")}
    contents = {
        "": {"__version__": "2.3.0"}, ".common": {}, ".common.recipe": recipes,
        ".pytorch": {**linears, **grouped, "DotProductAttention": DotProductAttention,
                     "fp8_autocast": te_fp8.fp8_autocast},
        ".pytorch.optimizers": {"FusedAdam": FusedAdam},
        ".pytorch.ops": {"SwiGLU": te_linears.SwiGLU, "Sequential": Absent, "FusibleOperation": Absent},
        # Megatron-Core 0.19 imports fp8_model_init as well; ours keep no weights in FP8 alone.
        ".pytorch.fp8": {**fp8, **supported, "fp8_model_init": None}, ".pytorch.tensor": {"QuantizedTensor": Absent},
        ".pytorch.attention": {}, ".pytorch.attention.rope": {"apply_rotary_pos_emb": None},  # ours are used
        ".pytorch.distributed": {"CudaRNGStatesTracker": Absent, "checkpoint": te_fp8.checkpoint},
        ".pytorch.module": {}, ".pytorch.module.base": {"initialize_ub": te_linears.initialize_ub}}
    modules = {}
    for ending, names in contents.items():
        module = modules[f"transformer_engine{ending}"] = types.ModuleType(f"transformer_engine{ending}")
        vars(module).update(names)
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(modules[parent], name, module)
    return modules


def _loaded_again(name):
    """A new copy of a module of Megatron, which chose its base classes when it was imported."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def installed():
    """Within it `import transformer_engine` finds these classes, Megatron that it is version 2.3, and the layers that
    Megatron builds of it are made of them."""
    from megatron.core import fp8_utils, utils
    from megatron.core.transformer import transformer_block

    assert not any(name.startswith("transformer_engine") for name in sys.modules), "the real one is there"
    modules = _modules()
    sys.modules |= modules
    before = {EXTENSION: sys.modules[EXTENSION], fp8_utils.__name__: fp8_utils}
    known, utils._te_version = utils._te_version, None
    bound = {(transformer_block, "get_fp8_context"): transformer_block.get_fp8_context,
             (transformer_block, "te_checkpoint"): transformer_block.te_checkpoint}
    te_linears.buffers = None
    te_linears.counted.clear()
    try:
        extension = _loaded_again(EXTENSION)
        transformer_block.te_checkpoint = extension.te_checkpoint
        transformer_block.get_fp8_context = _loaded_again(fp8_utils.__name__).get_fp8_context
        yield
    finally:
        utils._te_version = known
        for (module, name), value in bound.items():
            setattr(module, name, value)
        for name, module in before.items():
            sys.modules[name] = module
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        for name in modules:
            del sys.modules[name]


@contextlib.contextmanager
def usable():
    """Within it our models may be built of these classes, as on a GPU."""
    from megatron_embed.models import layer_backend

    original, layer_backend._why_not = layer_backend._why_not, lambda config: None
    try:
        with installed():
            yield
    finally:
        layer_backend._why_not = original


@contextlib.contextmanager
def fused_adam():
    """Within it Megatron has the FusedAdam above, as where Transformer Engine was there when it was imported, and there
    is a GPU."""
    from megatron_embed.platform import compat
    from megatron_embed.platform.compat import distrib_optimizer, megatron_optimizer

    settings = ((compat, {"HAS_CUDA": True, "_OWN_ADAM": (FusedAdam, False, True, False),
                          "_ADAM_OF_DISTRIBUTED": FusedAdam}),
                (megatron_optimizer, {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False}),
                (distrib_optimizer, {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True,
                                     "USING_APEX_OPTIMIZER": False}))
    originals = [{name: vars(module)[name] for name in values} for module, values in settings]
    for module, values in settings:
        vars(module).update(values)
    try:
        with installed():
            yield
    finally:
        for (module, _), values in zip(settings, originals, strict=True):
            vars(module).update(values)
