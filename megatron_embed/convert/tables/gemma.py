"""Weights of Gemma 2 and Gemma 3 decoders, EmbeddingGemma among them: Llama's names, with norms after attention and
MLP."""

from dataclasses import replace

from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.qwen3 import QWEN3
from megatron_embed.convert.tables.transforms import Rename

_NORMS = tuple(Rename(f"decoder.layers.*.{ours}.weight", f"model.layers.*.{hf}.weight", "hidden_size") for ours, hf in (
    ("post_attention_layernorm", "post_attention_layernorm"), ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
    ("post_mlp_layernorm", "post_feedforward_layernorm")))

GEMMA2 = replace(LLAMA, name="gemma2", rules=(
    *(rule for rule in LLAMA.rules if ".pre_mlp_layernorm." not in rule.ours), *_NORMS))

GEMMA3_TEXT = replace(QWEN3, name="gemma3_text", rules=(
    *(rule for rule in QWEN3.rules if ".pre_mlp_layernorm." not in rule.ours), *_NORMS))
