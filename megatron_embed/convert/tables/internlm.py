"""Weights of InternLM2 and InternLM3 decoders.

InternLM2's files have one tensor for queries, keys and values, whose rows lie group by group as ours do: the query
heads of a group, its key head, its value head. InternLM3 has Llama's names.
"""

from dataclasses import replace

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.llama import LLAMA
from megatron_embed.convert.tables.transforms import FuseGateUp, PadVocabulary, Rename

_LAYER = "model.layers.*"

INTERNLM2 = Family(
    name="internlm2",
    prefix="model.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "model.tok_embeddings.weight"),
        Rename("decoder.layers.*.input_layernorm.weight", f"{_LAYER}.attention_norm.weight", "hidden_size"),
        Rename("decoder.layers.*.self_attention.linear_qkv.weight", f"{_LAYER}.attention.wqkv.weight",
               "qkv_size hidden_size", shard_dim=0),
        Rename("decoder.layers.*.self_attention.linear_proj.weight", f"{_LAYER}.attention.wo.weight",
               "hidden_size query_size", shard_dim=1),
        Rename("decoder.layers.*.pre_mlp_layernorm.weight", f"{_LAYER}.ffn_norm.weight", "hidden_size"),
        FuseGateUp("decoder.layers.*.mlp.linear_fc1.weight", f"{_LAYER}.feed_forward.{{w1,w3}}.weight",
                   "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", f"{_LAYER}.feed_forward.w2.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        Rename("decoder.final_layernorm.weight", "model.norm.weight", "hidden_size"),
    ),
    passthrough=("output.*", "score.*", "v_head.*", "qa_outputs.*",
                 "model.layers.*.attention.rotary_emb.inv_freq"),
    tied=(("output.weight", "model.tok_embeddings.weight"),),
    fused_norms=LLAMA.fused_norms,
)

INTERNLM3 = replace(LLAMA, name="internlm3")
