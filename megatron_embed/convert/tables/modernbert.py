"""Weights of ModernBERT encoders: ModernBERT, gte-modernbert, modernbert-embed."""

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import PadVocabulary, Rename, UnstackGateUp, UnstackQKV, weight_and_bias

MODERNBERT = Family(
    name="modernbert",
    prefix="model.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "model.embeddings.tok_embeddings.weight"),
        *weight_and_bias("embedding.layer_norm", "model.embeddings.norm"),
        *weight_and_bias("decoder.layers.*.input_layernorm", "model.layers.*.attn_norm"),
        UnstackQKV("decoder.layers.*.self_attention.linear_qkv.weight", "model.layers.*.attn.Wqkv.weight",
                   "hidden_size"),
        Rename("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.attn.Wo.weight",
               "hidden_size query_size", shard_dim=1),
        *weight_and_bias("decoder.layers.*.pre_mlp_layernorm", "model.layers.*.mlp_norm"),
        # The first half goes through the activation, the second is the gate.
        UnstackGateUp("decoder.layers.*.mlp.linear_fc1.weight", "model.layers.*.mlp.Wi.weight",
                      "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.Wo.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        *weight_and_bias("decoder.final_layernorm", "model.final_norm"),
    ),
    passthrough=("head.*", "decoder.*", "classifier.*", "qa_outputs.*"),
    tied=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
    fused_norms=((".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
                 (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")),
)
