"""Shapes of the families in which some layers have an attention window and others attend to whole texts."""

from dataclasses import replace
from typing import Literal

from megatron_embed.errors import CheckpointError
from megatron_embed.models.hf_config import HFConfig, activation, is_causal, layer_rope, rope, shown
from megatron_embed.models.model_shape import ClassifierShape, ModelShape

LayerType = Literal["full_attention", "sliding_attention"]


def full_attention_layers(config: HFConfig, default: tuple[int, ...]) -> tuple[int, ...]:
    """Layers, counted from 0, without a window by `layer_types`, or `default` if config.json has none."""
    types = config.get("layer_types", None)
    if types is None:
        return default
    layers = config["num_hidden_layers"]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{config.file}: layer_types = {shown(types)} must name full_attention or "
                              f"sliding_attention for each of the {layers} layers; fetch the file again")
    return tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")


def modernbert(config: HFConfig) -> ModelShape:
    """ModernBERT (Warner et al. 2024, arXiv:2412.13663): a pre-norm encoder with rotary positions, most of whose layers
    have an attention window."""
    for key in ("attention_bias", "mlp_bias"):
        config.refuse_unless(key, (None, False), "no released model of the family has it")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    every = config.get("global_attn_every_n_layers", 3)
    base, scaling = layer_rope(config, "full_attention", config.get("global_rope_theta", 160_000.0))
    # Transformers before 5 took null for the global base.
    null_is_global = "local_rope_theta" in config.values
    local_base, local_scaling = layer_rope(
        config, "sliding_attention", config.get("local_rope_theta", base if null_is_global else 10_000.0))
    full = full_attention_layers(config, tuple(range(0, layers, every)))
    # config.json has the width of the whole window; half of it lies on either side.
    window = config.get("local_attention", 128) // 2
    config.refuse_unless("sliding_window", (None, window), "Transformers takes it in place of local_attention, half of "
                         f"which is {window}; write twice its value as local_attention, and remove it")
    config.refuse_unless("head_dim", (None, config["hidden_size"] // heads), "Transformers rotates so many dimensions "
                         "of a head, which has hidden_size / num_attention_heads; remove it")
    if window == 0 and len(full) < layers:
        raise CheckpointError(f"{config.file}: local_attention = 1 is not supported: a token would attend to itself "
                              "alone; fetch the file again")
    return ModelShape(
        family="modernbert", hidden_size=config["hidden_size"], num_layers=layers, num_attention_heads=heads,
        num_query_groups=heads, head_dim=config["hidden_size"] // heads, ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"], max_position_embeddings=config.get("max_position_embeddings", 8192),
        norm="LayerNorm", norm_eps=config.get("norm_eps", 1e-5), norm_bias=config.get("norm_bias", False),
        embedding_norm=True, first_attention_norm=False, activation=activation(config, "gelu", "hidden_activation"),
        gated=True, add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False, post_norm=False, bidirectional=True,
        rotary_base=base, rope_scaling=scaling, local_rotary_base=local_base, local_rope_scaling=local_scaling,
        sliding_window=None if len(full) == layers else window, full_attention_layers=full, type_vocab_size=0,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        vocabulary_bias=config.get("decoder_bias", True),
        initializer_range=config.get("initializer_range", 0.02), classifier=_modernbert_classifier(config))


def _modernbert_classifier(config: HFConfig) -> ClassifierShape:
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise CheckpointError(f"{config.file}: classifier_pooling = {shown(pooling)} is not supported; cls and mean "
                              "are")
    return ClassifierShape(pooling=pooling, activation=activation(config, "gelu", "classifier_activation"), norm=True,
                           dense_bias=config.get("classifier_bias", False))


def gemma2(config: HFConfig) -> ModelShape:
    """Gemma 2 (arXiv:2408.00118): every second layer has a window, and the scores of attention are bounded."""
    config.refuse_unless("use_bidirectional_attention", (None, False), "Transformers computes it in Gemma 3 alone")
    layers = config["num_hidden_layers"]
    base, scaling = rope(config, 1.0e4)
    shape = _gemma(config, "gemma2", full_attention_layers(config, tuple(range(1, layers, 2))))
    return replace(shape, rotary_base=base, rope_scaling=scaling,
                   attention_softcap=_cap(config, "attn_logit_softcapping", 50.0),
                   logit_softcap=_cap(config, "final_logit_softcapping", 30.0))


def gemma3_text(config: HFConfig) -> ModelShape:
    """Gemma 3 (arXiv:2503.19786) for texts, EmbeddingGemma among them: five of six layers have a window and a rotary
    base of their own; queries and keys are normalized."""
    config.refuse_unless("attn_logit_softcapping", (None,), "Transformers does not compute it in Gemma 3")
    layers, every = config["num_hidden_layers"], config.get("sliding_window_pattern", 6)
    base, scaling = layer_rope(config, "full_attention", config.get("rope_theta", 1.0e6))
    local_base, local_scaling = layer_rope(config, "sliding_attention", config.get("rope_local_base_freq", 1.0e4),
                                           scaled=False)
    shape = _gemma(config, "gemma3_text", full_attention_layers(config, tuple(range(every - 1, layers, every))))
    if config.get("use_bidirectional_attention", False):
        # The key then has the width of the whole window; half of it lies on either side. With is_causal = false too,
        # Transformers' mask counts the border in, which is one token more.
        border = 0 if is_causal(config) else 1
        window = None if shape.sliding_window is None else shape.sliding_window // 2 + border
        if window == 0:
            raise CheckpointError(f"{config.file}: sliding_window = 1 is not supported: a token would attend to itself "
                                  "alone; fetch the file again")
        shape = replace(shape, bidirectional=True, sliding_window=window)
    return replace(shape, qk_layernorm=True, rotary_base=base, rope_scaling=scaling, local_rotary_base=local_base,
                   local_rope_scaling=local_scaling, logit_softcap=_cap(config, "final_logit_softcapping", None))


def _gemma(config: HFConfig, family: Literal["gemma2", "gemma3_text"], full: tuple[int, ...]) -> ModelShape:
    """The shape that both have: scaled embeddings, norms around attention and MLP that multiply by 1 + weight."""
    config.refuse_unless("attention_bias", (None, False), "no released model of the family has it")
    heads, layers, hidden = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    window = config.get("sliding_window", None if "sliding_window" in config.values else 4096)
    if window is None and len(full) < layers:
        raise CheckpointError(f"{config.file}: sliding_window = None, but {layers - len(full)} layers have a window; "
                              "fetch the file again")
    return ModelShape(
        family=family, hidden_size=hidden, num_layers=layers, num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", 4), head_dim=config.get("head_dim", 256),
        ffn_hidden_size=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="RMSNorm",
        norm_eps=config.get("rms_norm_eps", 1e-6), zero_centered_norm=True, sublayer_norms=True,
        embedding_scale=hidden**0.5, attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        activation=activation(config, "gelu_pytorch_tanh", "hidden_activation"), gated=True, add_bias_linear=False,
        add_qkv_bias=False, qk_layernorm=False, post_norm=False,
        bidirectional=not is_causal(config), rotary_base=None,
        sliding_window=None if len(full) == layers else window, full_attention_layers=full, type_vocab_size=0,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        initializer_range=config.get("initializer_range", 0.02))


def _cap(config: HFConfig, key: str, default: float | None) -> float | None:
    """The bound of scores or logits; None: none."""
    value = config.get(key, None if key in config.values else default)
    if value == 0:
        raise CheckpointError(f"{config.file}: {key} = 0 must be above 0, or null for no bound; fetch the file again")
    return None if value is None else float(value)
