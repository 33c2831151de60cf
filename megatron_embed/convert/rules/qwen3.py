"""Weights of Qwen3 decoders: Qwen3, Qwen3-Embedding, Qwen3-Reranker (dense)."""

from megatron_embed.convert.family import Family
from megatron_embed.convert.transforms import FuseGateUp, FuseQKV, PadVocabulary, Rename

QWEN3 = Family(
    name="qwen3",
    prefix="model.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Rename("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.weight",
                "model.layers.*.self_attn.{q,k,v}_proj.weight", "hidden_size"),
        Rename("decoder.layers.*.self_attention.q_layernorm.weight",
               "model.layers.*.self_attn.q_norm.weight", "head_dim"),
        Rename("decoder.layers.*.self_attention.k_layernorm.weight",
               "model.layers.*.self_attn.k_norm.weight", "head_dim"),
        Rename("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight",
               "hidden_size query_size", shard_dim=1),
        Rename("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight",
               "hidden_size"),
        FuseGateUp("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.{gate,up}_proj.weight",
                   "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        Rename("decoder.final_layernorm.weight", "model.norm.weight", "hidden_size"),
    ),
    carried=("lm_head.*", "score.*"),
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
    fused_norms=((".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
                 (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")),
)
