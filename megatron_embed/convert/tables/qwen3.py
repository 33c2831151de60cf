"""Weights of Qwen3 decoders: Qwen3, Qwen3-Embedding, Qwen3-Reranker (dense)."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.transforms import Rename

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    rules=(
        *LLAMA.rules,
        Rename("decoder.layers.*.self_attention.q_layernorm.weight",
               "model.layers.*.self_attn.q_norm.weight", "head_dim"),
        Rename("decoder.layers.*.self_attention.k_layernorm.weight",
               "model.layers.*.self_attn.k_norm.weight", "head_dim"),
    ),
)
