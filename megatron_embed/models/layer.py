"""Megatron's transformer layer with its element-wise work in `kernels`: norms with residuals, rotary positions, gated
activations. Parameters, their names and their sharding are Megatron's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.kernels.functions import (
    bias_activation,
    glu,
    partial_rotary,
    qkv_rotary,
    rms_norm,
    rms_norm_of_sum,
    weighted_glu,
)
from megatron_embed.kernels.reference import ACTIVATIONS
from megatron_embed.platform.compat import MLP, SelfAttention, TransformerConfig, TransformerLayer


@dataclass
class BackboneConfig(TransformerConfig):
    """Megatron's configuration and what only our modules read."""

    fused_kernels: bool = False
    """Element-wise work by Triton kernels, see `model.fused_kernels`."""
    norm_bias: bool = True
    """Whether a LayerNorm has a bias."""
    rotary_dim: int | None = None
    """See ModelShape."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dim, in float32.

    Its weight is marked for sequence parallelism; Megatron's own torch norm refuses that. The mark makes
    `finalize_model_grads` sum its gradient over the tensor-parallel ranks, each of which normalized its share of the
    tokens.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.eps, self.fused = eps, config.fused_kernels and not self.zero_centered
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None, *,
                with_sum: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x, times 1 + weight if it is zero-centered, or with `with_sum` (the next residual: residual + x,
        or x; its norm), see `kernels.functions.rms_norm_of_sum`."""
        weight = one_centered(self.weight) if self.zero_centered else self.weight
        if with_sum:
            return rms_norm_of_sum(x, residual, weight, self.eps, fused=self.fused)
        return rms_norm(x, weight, self.eps, fused=self.fused)


def one_centered(weight: Tensor) -> Tensor:
    """1 + weight in float32 or wider, by which a zero-centered norm multiplies before it rounds. The fused kernels
    round before they multiply, and are not used."""
    return 1.0 + (weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight)


def call_before_forward(module: torch.nn.Module, inputs: Tensor) -> None:
    """Do what a call of the module does before its forward pass: DistributedDataParallel waits for its weight there.

    For whoever uses a module's weight without calling the module.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, (inputs,))


class PreNormLayer(TransformerLayer):
    """x + sublayer(norm(x)) twice, where the norms are RMSNorm: each is one kernel with its residual's addition or the
    addition of the residual's gradient."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None,
                packed_seq_params: Any = None, padding_mask: Tensor | None = None,
                **unused: Any) -> tuple[Tensor, None]:
        """[tokens/tp, 1, hidden] -> ([tokens/tp, 1, hidden], None)."""
        residual, normed = self.input_layernorm(hidden_states, with_sum=True)
        attended, bias = self.self_attention(normed, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb,
                                             packed_seq_params=packed_seq_params)
        if bias is None and not (self.training and self.hidden_dropout):
            residual, normed = self.pre_mlp_layernorm(attended, residual, with_sum=True)
        else:
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            residual, normed = self.pre_mlp_layernorm(add((attended, bias), residual, self.hidden_dropout),
                                                      with_sum=True)
        output = self.mlp(normed, padding_mask=padding_mask)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(output, residual, self.hidden_dropout), None


class SandwichLayer(TransformerLayer):
    """x + norm(sublayer(norm(x))) twice. Gemma 2 and 3, GLM-4."""

    def __init__(self, config: BackboneConfig, submodules: Any, *arguments: Any, norm: type[torch.nn.Module],
                 **others: Any) -> None:
        super().__init__(config, submodules, *arguments, **others)
        self.post_attention_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None,
                packed_seq_params: Any = None, **unused: Any) -> tuple[Tensor, None]:
        """[tokens/tp, 1, hidden] -> ([tokens/tp, 1, hidden], None)."""
        attended, bias = self.self_attention(self.input_layernorm(hidden_states), attention_mask=attention_mask,
                                             rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params)
        assert bias is None, "no family has biases there"
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden = add((self.post_attention_layernorm(attended), None), hidden_states, self.hidden_dropout)
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden))
        assert bias is None, "no family has biases there"
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add((self.post_mlp_layernorm(output), None), hidden, self.hidden_dropout), None


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention over packed sequences, with query and key norms and rotary positions in one kernel."""

    def __init__(self, *arguments: Any, rotary: int = 0, **others: Any) -> None:
        """`rotary`: which of the model's rotary angles this layer takes; the other arguments are Megatron's."""
        super().__init__(*arguments, **others)
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,  # type: ignore[override]
                rotary_pos_emb: Tensor | None = None, packed_seq_params: Any = None,
                **others: Any) -> tuple[Tensor, Tensor | None]:
        """[tokens/tp, 1, hidden] -> (the same shape, bias that is not added yet).

        Args:
            rotary_pos_emb: [1 or 2, 2, tokens, rotary_dim / 2], see `rope.rotary_cos_sin`; None: learned positions.
        """
        if rotary_pos_emb is None:
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **others)
        mixed, _ = self.linear_qkv(hidden_states)
        groups, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query, key, value = (tensor[:, None] for tensor in self._rotated(
            mixed.view(mixed.shape[0], groups, -1, head_dim), rotary_pos_emb[self.rotary]))
        attend = (self._checkpointed_attention_forward if self.checkpoint_core_attention and self.training
                  else self.core_attention)
        return self.linear_proj(attend(  # type: ignore[no-any-return]
            query, key, value, attention_mask, attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params))

    def _rotated(self, mixed: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a projection, see `kernels.functions.qkv_rotary`."""
        heads, config = self.num_attention_heads_per_partition, self.config
        if config.rotary_dim is not None or config.rotary_interleaved:
            return partial_rotary(mixed, cos_sin, heads, interleaved=config.rotary_interleaved)
        weights, fused = [], config.fused_kernels
        for norm in (self.q_layernorm, self.k_layernorm):
            if norm is not None:
                call_before_forward(norm, mixed)
                fused = fused and not config.layernorm_zero_centered_gamma
            weights.append(None if norm is None else one_centered(norm.weight) if config.layernorm_zero_centered_gamma
                           else norm.weight)
        return qkv_rotary(mixed, cos_sin, *weights, heads, config.layernorm_epsilon, fused=fused)


class FeedForward(MLP):
    """Megatron's MLP, or one of its experts, with a fused activation."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None,
                **unused: Any) -> tuple[Tensor, Tensor | None]:
        """[tokens/tp, 1, hidden] -> (the same shape, bias that is not added yet).

        Args:
            per_token_scale: [tokens] weights of an expert's tokens.
        """
        inner, bias = self.linear_fc1(hidden_states)
        if self.config.gated_linear_unit:
            inner = gated(inner if bias is None else inner + bias, self.config)
        elif bias is not None:
            inner = bias_activation(inner, bias, _activation(self.config), fused=self.config.fused_kernels)
        else:
            inner = self.config.activation_func(inner)
        if per_token_scale is None:
            return self.linear_fc2(inner)  # type: ignore[no-any-return]
        output, bias = self.linear_fc2((inner * per_token_scale.unsqueeze(-1)).to(inner.dtype))
        assert bias is None, "no family has experts with biases"
        return output, None


def gated(inner: Tensor, config: Any, weights: Tensor | None = None) -> Tensor:
    """[..., 2 * width] -> [..., width]: the gated linear unit of a BackboneConfig; times `weights`, [rows], if any."""
    if weights is None:
        return glu(inner, _activation(config), fused=config.fused_kernels)
    return weighted_glu(inner, weights, _activation(config), fused=config.fused_kernels)


def _activation(config: Any) -> str:
    (name,) = (name for name, function in ACTIVATIONS.items() if function is config.activation_func)
    return name


def fuse_activations(model: torch.nn.Module) -> None:
    """Make every MLP a FeedForward. The class changes, parameters and names stay: Megatron's layer knows its own MLP
    only, by its exact class.

    The first linear adds its bias in the matrix product, at no cost, unless the fused activation adds it. Megatron
    would add it separately: a pass over [tokens, ffn] forward and backward.
    """
    for module in model.modules():
        if isinstance(module, MLP) and not module.config.use_te_activation_func:
            module.__class__ = FeedForward
            if module.config.gated_linear_unit or not module.config.fused_kernels:
                module.linear_fc1.skip_bias_add = False
