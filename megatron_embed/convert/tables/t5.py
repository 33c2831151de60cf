"""Weights of T5 encoders: sentence-t5, GTR, and the encoder of T5 and T5 1.1."""

from dataclasses import replace

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import FuseGateUp, FuseQKV, PadVocabulary, Rename

_ATTENTION, _MLP = "encoder.block.*.layer.0", "encoder.block.*.layer.1"

_FIRST = "decoder.layers.*.mlp.linear_fc1.weight"
_PLAIN = Rename(_FIRST, f"{_MLP}.DenseReluDense.wi.weight", "ffn_hidden_size hidden_size", shard_dim=0)

T5_GATED = Family(
    name="t5-gated",
    prefix="",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "shared.weight"),
        Rename("relative_bias.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
               "relative_buckets num_attention_heads", shard_dim=1),
        Rename("decoder.layers.*.input_layernorm.weight", f"{_ATTENTION}.layer_norm.weight", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.weight", f"{_ATTENTION}.SelfAttention.{{q,k,v}}.weight",
                "hidden_size"),
        Rename("decoder.layers.*.self_attention.linear_proj.weight", f"{_ATTENTION}.SelfAttention.o.weight",
               "hidden_size query_size", shard_dim=1),
        Rename("decoder.layers.*.pre_mlp_layernorm.weight", f"{_MLP}.layer_norm.weight", "hidden_size"),
        FuseGateUp(_FIRST, f"{_MLP}.DenseReluDense.wi_{{0,1}}.weight", "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", f"{_MLP}.DenseReluDense.wo.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        Rename("decoder.final_layernorm.weight", "encoder.final_layer_norm.weight", "hidden_size"),
    ),
    # Of the whole model: its decoder, which an encoder does not use, and copies of the embeddings.
    passthrough=("decoder.*", "lm_head.*", "encoder.embed_tokens.weight", "classification_head.*"),
    tied=(("encoder.embed_tokens.weight", "shared.weight"),),
    fused_norms=((".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
                 (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")),
)

T5 = replace(T5_GATED, name="t5", rules=tuple(_PLAIN if rule.ours == _FIRST else rule for rule in T5_GATED.rules))
