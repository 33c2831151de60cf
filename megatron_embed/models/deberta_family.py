"""Shape of DeBERTa encoders."""

from typing import Literal

from megatron_embed.errors import CheckpointError
from megatron_embed.models.hf_config import HFConfig, activation, shown
from megatron_embed.models.model_shape import (
    ClassifierShape,
    DisentangledPositions,
    HiddenActivation,
    ModelShape,
)


def deberta_v2(config: HFConfig) -> ModelShape:
    """DeBERTa v2 and v3 (He et al. 2020 and 2021, arXiv:2006.03654, 2111.09543): BERT's layers, whose attention scores
    have the products of contents with embeddings of relative positions added, in both directions."""
    config.refuse_unless("relative_attention", (True,), "no released model is without relative positions")
    config.refuse_unless("position_biased_input", (False,), "learned positions besides the relative ones")
    config.refuse_unless("share_att_key", (True,), "layers with projections of positions of their own")
    config.refuse_unless("conv_kernel_size", (None, 0), "a convolution over neighbouring tokens, which packed "
                         "sequences and context parallelism would have to cut; take DeBERTa-v3")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    for key, size in (("embedding_size", hidden), ("pooler_hidden_size", hidden),
                      ("attention_head_size", hidden // heads)):
        config.refuse_unless(key, (None, size), f"it must be {size}, as in the released models")
    kinds, norms = _words(config, "pos_att_type"), _words(config, "norm_rel_ebd")
    if kinds != {"c2p", "p2c"} or "layer_norm" not in norms:
        raise CheckpointError(f"{config.file}: pos_att_type = {shown(config.values.get('pos_att_type'))} with "
                              f"norm_rel_ebd = {shown(config.values.get('norm_rel_ebd'))} is not supported; the "
                              "released models have c2p and p2c, and layer_norm")
    return ModelShape(
        family="deberta-v2", hidden_size=hidden, num_layers=config["num_hidden_layers"], num_attention_heads=heads,
        num_query_groups=heads, head_dim=hidden // heads, ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"], max_position_embeddings=config.get("max_position_embeddings", 512),
        norm="LayerNorm", norm_eps=config.get("layer_norm_eps", 1e-7), activation=activation(config, "gelu"),
        gated=False, add_bias_linear=True, add_qkv_bias=True, qk_layernorm=False, post_norm=True, bidirectional=True,
        rotary_base=None, disentangled_positions=_positions(config), attention_scale=(3 * (hidden // heads)) ** -0.5,
        type_vocab_size=config.get("type_vocab_size", 0), tie_word_embeddings=True, embedding_norm=True,
        classifier=ClassifierShape(activation=_pooler_activation(config)),
        initializer_range=config.get("initializer_range", 0.02))


def _positions(config: HFConfig) -> DisentangledPositions:
    """The embeddings of relative positions; numbers below 1 are for none."""
    distance, buckets = config.values.get("max_relative_positions"), config.values.get("position_buckets")
    for key, value in (("max_relative_positions", distance), ("position_buckets", buckets)):
        if value is not None and (type(value) is not int or value > 2**20):
            raise CheckpointError(f"{config.file}: {key} = {shown(value)} must be a whole number up to {2**20:,}; "
                                  "fetch the file again")
    if distance is None or distance < 1:
        distance = config.get("max_position_embeddings", 512)
    if buckets is None or buckets < 1:
        return DisentangledPositions(span=distance, max_distance=distance, has_buckets=False)
    if buckets < 4 or distance <= buckets // 2 + 1:
        raise CheckpointError(f"{config.file}: position_buckets = {buckets} with max_relative_positions = {distance} "
                              "is not supported: at least 4 buckets, and more positions than half of them")
    return DisentangledPositions(span=buckets, max_distance=distance, has_buckets=True)


def _words(config: HFConfig, key: str) -> set[str]:
    """Words of a string with bars between them, or of a list, whose words Transformers takes as they are."""
    value = config.get(key, [])
    words = [word.strip() for word in value.lower().split("|")] if isinstance(value, str) else value
    return {str(word) for word in words} if isinstance(words, list) else set()


def _pooler_activation(config: HFConfig) -> Literal["tanh"] | HiddenActivation:
    name = config.get("pooler_hidden_act", "gelu")
    return "tanh" if name == "tanh" else activation(config, "gelu", "pooler_hidden_act")
