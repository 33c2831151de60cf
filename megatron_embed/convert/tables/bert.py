"""Weights of BERT encoders: all-MiniLM, BAAI/bge, multilingual BERT."""

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import FuseQKV, PadVocabulary, Rename

BERT = Family(
    name="bert",
    prefix="bert.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
        Rename("embedding.position_embeddings.weight", "bert.embeddings.position_embeddings.weight",
               "max_position_embeddings hidden_size"),
        Rename("embedding.tokentype_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
               "type_vocab_size hidden_size"),
        Rename("embedding.layer_norm.weight", "bert.embeddings.LayerNorm.weight", "hidden_size"),
        Rename("embedding.layer_norm.bias", "bert.embeddings.LayerNorm.bias", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.weight",
                "bert.encoder.layer.*.attention.self.{query,key,value}.weight", "hidden_size"),
        FuseQKV("decoder.layers.*.self_attention.linear_qkv.bias",
                "bert.encoder.layer.*.attention.self.{query,key,value}.bias", ""),
        Rename("decoder.layers.*.self_attention.linear_proj.weight",
               "bert.encoder.layer.*.attention.output.dense.weight", "hidden_size query_size", shard_dim=1),
        Rename("decoder.layers.*.self_attention.linear_proj.bias",
               "bert.encoder.layer.*.attention.output.dense.bias", "hidden_size"),
        Rename("decoder.layers.*.post_attention_layernorm.weight",
               "bert.encoder.layer.*.attention.output.LayerNorm.weight", "hidden_size"),
        Rename("decoder.layers.*.post_attention_layernorm.bias",
               "bert.encoder.layer.*.attention.output.LayerNorm.bias", "hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc1.weight",
               "bert.encoder.layer.*.intermediate.dense.weight", "ffn_hidden_size hidden_size", shard_dim=0),
        Rename("decoder.layers.*.mlp.linear_fc1.bias",
               "bert.encoder.layer.*.intermediate.dense.bias", "ffn_hidden_size", shard_dim=0),
        Rename("decoder.layers.*.mlp.linear_fc2.weight",
               "bert.encoder.layer.*.output.dense.weight", "hidden_size ffn_hidden_size", shard_dim=1),
        Rename("decoder.layers.*.mlp.linear_fc2.bias", "bert.encoder.layer.*.output.dense.bias", "hidden_size"),
        Rename("decoder.layers.*.post_mlp_layernorm.weight",
               "bert.encoder.layer.*.output.LayerNorm.weight", "hidden_size"),
        Rename("decoder.layers.*.post_mlp_layernorm.bias",
               "bert.encoder.layer.*.output.LayerNorm.bias", "hidden_size"),
    ),
    passthrough=("bert.pooler.*", "bert.embeddings.position_ids", "cls.*", "classifier.*", "qa_outputs.*"),
    tied=(("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),),
    old_endings=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
)
