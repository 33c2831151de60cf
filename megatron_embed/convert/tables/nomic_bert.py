"""Weights of NomicBERT encoders (nomic-embed-text), under the released names, which Transformers 5 writes too."""

from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import FuseGateUp, PadVocabulary, Rename, UnstackQKV, weight_and_bias

NOMIC_BERT = Family(
    name="nomic_bert",
    prefix="nomic_bert.",
    rules=(
        PadVocabulary("embedding.word_embeddings.weight", "nomic_bert.embeddings.word_embeddings.weight"),
        Rename("embedding.tokentype_embeddings.weight", "nomic_bert.embeddings.token_type_embeddings.weight",
               "type_vocab_size hidden_size"),
        *weight_and_bias("embedding.layer_norm", "nomic_bert.emb_ln"),
        UnstackQKV("decoder.layers.*.self_attention.linear_qkv.weight",
                   "nomic_bert.encoder.layers.*.attn.Wqkv.weight", "hidden_size"),
        Rename("decoder.layers.*.self_attention.linear_proj.weight",
               "nomic_bert.encoder.layers.*.attn.out_proj.weight", "hidden_size query_size", shard_dim=1),
        *weight_and_bias("decoder.layers.*.post_attention_layernorm", "nomic_bert.encoder.layers.*.norm1"),
        # fc12 goes through the activation, fc11 is the way up.
        FuseGateUp("decoder.layers.*.mlp.linear_fc1.weight", "nomic_bert.encoder.layers.*.mlp.{fc12,fc11}.weight",
                   "ffn_hidden_size hidden_size"),
        Rename("decoder.layers.*.mlp.linear_fc2.weight", "nomic_bert.encoder.layers.*.mlp.fc2.weight",
               "hidden_size ffn_hidden_size", shard_dim=1),
        *weight_and_bias("decoder.layers.*.post_mlp_layernorm", "nomic_bert.encoder.layers.*.norm2"),
    ),
    passthrough=("nomic_bert.pooler.*", "cls.*", "classifier.*"),
    tied=(("cls.predictions.decoder.weight", "nomic_bert.embeddings.word_embeddings.weight"),),
    no_adapters="Transformers' class names its linear layers otherwise than the files do, so PEFT could not load them",
)
