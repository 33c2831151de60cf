"""Weights of Llama decoders, 1 to 3.x; the names that most decoders share."""

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import FuseGateUp, FuseQKV, PadVocabulary, Rename

LLAMA = Family(
    name="llama",
    prefix="model.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Rename("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.weight",
                "model.layers.*.self_attn.{q,k,v}_proj.weight", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.bias",
                "model.layers.*.self_attn.{q,k,v}_proj.bias", ""),
        Rename("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight",
               "hidden_size query_size", shard_dim=1),
        Rename("decoder.layers.*.self_attention.linear_proj.bias", "model.layers.*.self_attn.o_proj.bias",
               "hidden_size"),
        Rename("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight",
               "hidden_size"),
        FuseGateUp("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.{gate,up}_proj.weight",
                   "ffn_hidden_size hidden_size"),
        FuseGateUp("decoder.layers.*.mlp.linear_fc1.bias", "model.layers.*.mlp.{gate,up}_proj.bias", "ffn_hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        Rename("decoder.layers.*.mlp.linear_fc2.bias", "model.layers.*.mlp.down_proj.bias", "hidden_size"),
        Rename("decoder.final_layernorm.weight", "model.norm.weight", "hidden_size"),
    ),
    # Files of Llama 1 and 2 hold the rotary frequencies, which config.json gives.
    passthrough=("lm_head.*", "score.*", "classifier.*", "qa_outputs.*",
                 "model.layers.*.self_attn.rotary_emb.inv_freq"),
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
    fused_norms=((".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
                 (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")),
)
