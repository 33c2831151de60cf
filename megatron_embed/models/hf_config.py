"""Values of a Hugging Face `config.json`, checked when they are read."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from megatron_embed.errors import CheckpointError
from megatron_embed.models.model_shape import HiddenActivation, RopeScaling

LARGEST: dict[str, int] = {
    "hidden_size": 2**20, "num_hidden_layers": 2**12, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "intermediate_size": 2**24, "moe_intermediate_size": 2**24, "vocab_size": 2**26,
    "max_position_embeddings": 2**31, "original_max_position_embeddings": 2**31, "sliding_window": 2**31,
    "local_attention": 2**31, "global_attn_every_n_layers": 2**12, "sliding_window_pattern": 2**12,
    "d_model": 2**20, "num_layers": 2**12, "num_heads": 2**16, "d_kv": 2**16, "d_ff": 2**24, "n_positions": 2**31,
    "relative_attention_num_buckets": 2**16, "relative_attention_max_distance": 2**31,
    "num_experts": 2**16, "num_local_experts": 2**16, "num_experts_per_tok": 2**16, "type_vocab_size": 2**16,
    "pad_token_id": 2**26}
"""Upper bounds of integers in config.json: far above every model, and low enough that no check takes long."""
_MAY_BE_ZERO = ("type_vocab_size", "pad_token_id")
_FINITE = ("layer_norm_eps", "rms_norm_eps", "norm_eps", "initializer_range", "rope_theta", "global_rope_theta",
           "local_rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
           "final_logit_softcapping", "layer_norm_epsilon", "initializer_factor", "factor", "low_freq_factor",
           "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "norm_bias", "classifier_bias",
             "decoder_bias", "use_bidirectional_attention", "bias", "qkv_bias", "is_causal", "is_gated_act")


def _check_value(key: str, value: object, file: str) -> None:
    """Raises CheckpointError if a value of config.json has the wrong type for its key, or is out of bounds."""
    if key in LARGEST:
        least = 0 if key in _MAY_BE_ZERO else 1
        if type(value) is not int or not least <= value <= LARGEST[key]:
            raise CheckpointError(f"{file}: {key} = {shown(value)} must be a whole number from {least} to "
                                  f"{LARGEST[key]:,}; fetch the file again")
    elif key in _FINITE:
        if type(value) not in (int, float) or not 0 <= value < 1e30:  # type: ignore[operator]  # nan is neither
            raise CheckpointError(f"{file}: {key} = {shown(value)} must be a finite number, not below 0; fetch the "
                                  "file again")
    elif key in _BOOLEANS and type(value) is not bool:
        raise CheckpointError(f"{file}: {key} = {shown(value)} must be true or false; fetch the file again")


def shown(value: object) -> str:
    """The value for a message, of bounded length."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class HFConfig:
    """A `config.json` that raises CheckpointError for missing keys and for values of a wrong type."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise CheckpointError(f"{self.file}: key {key!r} is missing; a {self.values.get('model_type')} model needs "
                                  "it")
        _check_value(key, self.values[key], self.file)
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        _check_value(key, value, self.file)
        return value

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.values.get(key)
        if value not in allowed:
            raise CheckpointError(f"{self.file}: {key} = {shown(value)} is not supported: {why}")


def is_causal(config: HFConfig) -> bool:
    """Whether a decoder's tokens see only those before them. Raises CheckpointError for null, false in Transformers."""
    if "is_causal" in config.values and config.values["is_causal"] is None:
        raise CheckpointError(f"{config.file}: is_causal = None is false in Transformers 5, and true before; "
                              "write true or false")
    return bool(config.get("is_causal", True))


ACTIVATIONS: dict[str, HiddenActivation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""Transformers' names -> ours."""


def activation(config: HFConfig, default: str, key: str = "hidden_act") -> HiddenActivation:
    """The activation that `key` names."""
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{config.file}: {key} = {shown(name)} is not supported; known: "
                              f"{', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope(config: HFConfig, default: float, *, partial: bool = False) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from either spelling: `rope_theta` and `rope_scaling`, or Transformers 5's
    `rope_parameters`. `partial`: only some dimensions of a head may be rotated, see `rotary_dim`."""
    parameters = config.get("rope_scaling", {}) or config.get("rope_parameters", {})
    return _rotary(config, parameters, config.get("rope_theta", default), partial=partial)


def rotary_dim(config: HFConfig, head_dim: int, default: float) -> int | None:
    """Rotated dimensions of a head, by `partial_rotary_factor` or its default; None: all."""
    parameters = config.get("rope_scaling", {}) or config.get("rope_parameters", {})
    _check_object(config, parameters)
    factor = parameters.get("partial_rotary_factor")
    if factor is None:  # null is all in Transformers
        factor = config.get("partial_rotary_factor", 1.0 if "partial_rotary_factor" in config.values else default)
    rotated = int(head_dim * factor) if type(factor) in (int, float) and 0 < factor <= 1 else 0
    if rotated < 2 or rotated % 2:
        raise CheckpointError(f"{config.file}: partial_rotary_factor = {shown(factor)} must rotate an even number of "
                              f"the {head_dim} dimensions of a head; fetch the file again")
    return None if rotated == head_dim else rotated


def layer_rope(config: HFConfig, layer_type: Literal["full_attention", "sliding_attention"], base: float, *,
               scaled: bool = True) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling of one type of layers, where the types differ: Transformers 5's `rope_parameters` have an
    object for each.

    Args:
        base: the base, if that object has none.
        scaled: whether `rope_scaling` applies to these layers.
    """
    by_type = config.get("rope_parameters", {})
    parameters = by_type.get(layer_type) or {} if isinstance(by_type, dict) else by_type
    scaling = config.get("rope_scaling", {}) if scaled else {}
    for value in (parameters, scaling):
        _check_object(config, value)
    if scaling.get("rope_type") is None and scaling.get("type") not in (None, "default"):
        raise CheckpointError(f"{config.file}: rope_scaling.type = {shown(scaling['type'])} is not supported: in a "
                              f"{config.values.get('model_type')} model Transformers 5 reads rope_type alone, and "
                              "would scale nothing; write it as rope_type")
    outer = by_type if isinstance(by_type, dict) else {}
    for value in (outer, parameters, scaling):
        if value.get("truncate", True) is not True:
            raise CheckpointError(f"{config.file}: rope_scaling: truncate = {shown(value['truncate'])} is not "
                                  "supported: where types of layers have a rope of their own, Transformers reads it "
                                  "in another place than the other keys; remove it")
    return _rotary(config, parameters | scaling, base, by_layer_type=True)


def _check_object(config: HFConfig, parameters: object) -> None:
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{config.file}: rope_scaling = {shown(parameters)} must be an object; fetch the file "
                              "again")


def _rotary(config: HFConfig, parameters: Any, default: float, *, partial: bool = False,
            by_layer_type: bool = False) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from one object of parameters.

    Args:
        default: the base, if it has none.
        by_layer_type: the object is that of one type of layers.
    """
    _check_object(config, parameters)
    nested = next((key for key, value in parameters.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise CheckpointError(f"{config.file}: rope_parameters.{shown(nested)} is an object, and a "
                              f"{config.values.get('model_type')} model has the same rope in all layers; write its "
                              "keys in its place")
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
                "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        if parameters.get(key) is not None:
            _check_value(key, parameters[key], config.file)
    base = float(parameters.get("rope_theta", default))
    for factor in (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor", None)):
        if not partial and factor not in (None, 1):
            raise CheckpointError(f"{config.file}: partial_rotary_factor = {shown(factor)} is not supported; "
                                  f"a {config['model_type']} model rotates all dimensions of a head")
    if kind == "default":
        return base, None
    if kind not in _ROPE_KEYS:
        raise CheckpointError(f"{config.file}: rope type {shown(kind)} is not supported (default, "
                              f"{', '.join(_ROPE_KEYS)} are); remove it if your sequences fit the original length")
    missing = [key for key in _ROPE_KEYS[kind] if key not in parameters]
    if missing:
        raise CheckpointError(f"{config.file}: rope type {kind!r} without {missing[0]!r}; fetch the file again")
    if kind in ("linear", "dynamic"):
        return base, RopeScaling(kind=kind, factor=float(parameters["factor"]))
    original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if not by_layer_type:  # in Transformers, a key beside rope_scaling then takes precedence over one inside it
        original = config.get("original_max_position_embeddings", original)
    if kind == "yarn":
        return base, _yarn(config, parameters, original)
    if kind == "longrope":
        return base, _longrope(config, parameters, original)
    values = {key: float(parameters[key]) for key in _ROPE_KEYS[kind]}
    return base, RopeScaling(kind="llama3", original_max_position_embeddings=original, **values)


_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",), "longrope": ("short_factor",)}
"""Rope types -> keys that they cannot do without."""


def _yarn(config: HFConfig, parameters: dict[str, Any], original: int) -> RopeScaling:
    factor = parameters["factor"] or config["max_position_embeddings"] / original
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = (_mscale(factor, mscale) / _mscale(factor, all_dim)) if mscale and all_dim else _mscale(factor, 1)
    truncate = parameters.get("truncate", True)
    if type(truncate) is not bool:
        raise CheckpointError(f"{config.file}: truncate = {shown(truncate)} must be true or false; fetch the file "
                              "again")
    return RopeScaling(kind="yarn", factor=float(factor), original_max_position_embeddings=original,
                       beta_fast=float(parameters.get("beta_fast") or 32), truncate=truncate,
                       beta_slow=float(parameters.get("beta_slow") or 1), attention_factor=float(attention))


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(config: HFConfig, parameters: dict[str, Any], original: int) -> RopeScaling:
    """The scaling of texts of the original length; a longer one would change the frequencies of all texts of a batch
    in Transformers."""
    short = parameters["short_factor"]
    if not isinstance(short, list) or not all(type(value) in (int, float) and 0 < value < 1e30 for value in short):
        raise CheckpointError(f"{config.file}: short_factor = {shown(short)} must be a list of numbers above 0; fetch "
                              "the file again")
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(kind="longrope", factor=float(factor), original_max_position_embeddings=original,
                       attention_factor=float(attention), short_factors=tuple(map(float, short)))
