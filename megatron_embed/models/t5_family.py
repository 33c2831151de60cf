"""Shape of T5 encoders."""

from megatron_embed.errors import CheckpointError
from megatron_embed.models.hf_config import ACTIVATIONS, HFConfig, shown
from megatron_embed.models.model_shape import ModelShape, RelativePositions

_OTHER_NAMES = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
                "head_dim": "d_kv"}
"""Transformers' general name of a setting -> T5's own."""


def t5(config: HFConfig) -> ModelShape:
    """The encoder of T5 and T5 1.1 (Raffel et al. 2020, arXiv:1910.10683)."""
    projection = config.get("feed_forward_proj", "relu")
    gate, _, activation = projection.rpartition("-")
    if gate not in ("", "gated") or activation not in ACTIVATIONS:
        raise CheckpointError(f"{config.file}: feed_forward_proj = {shown(projection)} is not supported; known: "
                              f"{', '.join(ACTIVATIONS)}, and the same after gated-")
    # In Transformers gated-gelu stands for the approximation by tanh.
    name = "gelu_new" if gate and activation == "gelu" else activation
    # Transformers takes these in place of the keys that they follow from.
    for key, followed, value in (("dense_act_fn", "feed_forward_proj", name),
                                 ("is_gated_act", "feed_forward_proj", bool(gate)),
                                 *((key, own, config[own]) for key, own in _OTHER_NAMES.items())):
        config.refuse_unless(key, (None, value), f"by {followed} it is {shown(value)}; correct one of them")
    config.refuse_unless("is_decoder", (None, False), "tokens of a decoder do not see those behind them")
    buckets = config.get("relative_attention_num_buckets", 32)
    distance = config.get("relative_attention_max_distance", 128)
    if buckets < 4 or buckets % 4 or distance <= buckets // 4:
        raise CheckpointError(f"{config.file}: relative_attention_num_buckets = {buckets} with "
                              f"relative_attention_max_distance = {distance} is not supported: the buckets must be a "
                              "multiple of 4, and the distance more than a quarter of them")
    heads = config["num_heads"]
    return ModelShape(
        family="t5-gated" if gate else "t5", hidden_size=config["d_model"], num_layers=config["num_layers"],
        num_attention_heads=heads, num_query_groups=heads, head_dim=config["d_kv"], ffn_hidden_size=config["d_ff"],
        vocab_size=config["vocab_size"], max_position_embeddings=config.get("n_positions", 512), norm="RMSNorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-6), activation=ACTIVATIONS[name], gated=bool(gate),
        add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False, post_norm=False, bidirectional=True,
        rotary_base=None, attention_scale=1.0, type_vocab_size=0, tie_word_embeddings=True,
        relative_positions=RelativePositions(num_buckets=buckets, max_distance=distance),
        initializer_range=config.get("initializer_factor", 1.0))
