"""The shape of a model, read from its Hugging Face `config.json`.

Imports neither torch nor Megatron.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_object
from megatron_embed.errors import CheckpointError

FamilyName = Literal["bert", "roberta", "xlm-roberta", "qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral"]
HiddenActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies, under Transformers' names."""

    kind: Literal["linear", "llama3"]
    factor: float
    """Divides all frequencies (linear) or the low ones (llama3)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """llama3: wavelengths above this / low_freq_factor are scaled, those below this / high_freq_factor are not."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that determines the modules and tensor shapes of a backbone.

    Names follow Megatron's TransformerConfig.
    """

    family: FamilyName
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Width of one attention head; need not be hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    """Rows of learned positions, `position_offset` included; else the longest text in tokens."""
    norm: Literal["LayerNorm", "RMSNorm"]
    norm_eps: float
    activation: HiddenActivation
    gated: bool
    """The MLP multiplies a gate into the activation (SwiGLU); fc1 holds [gate; up]."""
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    post_norm: bool
    """Original Transformer order: the norm comes after the residual sum, without a final norm."""
    bidirectional: bool
    rotary_base: float | None
    """None: learned absolute positions."""
    rope_scaling: RopeScaling | None = None
    position_offset: int = 0
    """Position id of a text's first token: RoBERTa's padding_idx + 1."""
    sliding_window: int | None = None
    """Tokens that a causal token sees, itself included (bidirectional: on each side, besides itself); None: all."""
    type_vocab_size: int
    """Token types; 0: none."""
    tie_word_embeddings: bool
    initializer_range: float
    num_experts: int = 0
    """Experts of every layer's MLP; 0: dense."""
    experts_per_token: int = 0
    normalize_expert_weights: bool = True
    """Whether the chosen experts' weights sum to 1."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "head_dim",
                    "ffn_hidden_size", "vocab_size", "max_position_embeddings"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{key} = {value!r} must be a positive integer")
        if self.num_layers * max(1, self.num_experts) > MOST_MLPS:
            raise CheckpointError(f"{self.num_layers} layers of {self.num_experts} experts are more than {MOST_MLPS:,} "
                                  "MLPs, which no model has")
        if self.num_experts and not self.experts_per_token <= self.num_experts:
            raise CheckpointError(f"num_experts_per_tok = {self.experts_per_token} is more than the {self.num_experts} "
                                  "experts")
        if self.position_offset >= self.max_position_embeddings:
            raise CheckpointError(f"max_position_embeddings = {self.max_position_embeddings} leaves no position after "
                                  f"pad_token_id = {self.position_offset - 1}")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                                  f"num_key_value_heads = {self.num_query_groups}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(f"sliding_window = {self.sliding_window!r} must be a positive integer or null")

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that has positions."""
        return self.max_position_embeddings - self.position_offset


MOST_MLPS = 2**17
"""Layers times experts; the largest open models have 23 thousand."""

LARGEST: dict[str, int] = {
    "hidden_size": 2**20, "num_hidden_layers": 2**12, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "intermediate_size": 2**24, "moe_intermediate_size": 2**24, "vocab_size": 2**26,
    "max_position_embeddings": 2**31, "original_max_position_embeddings": 2**31, "sliding_window": 2**31,
    "num_experts": 2**16, "num_local_experts": 2**16, "num_experts_per_tok": 2**16, "type_vocab_size": 2**16,
    "pad_token_id": 2**26}
"""Upper bounds of integers in config.json: far above every model, and low enough that no check takes long."""
_MAY_BE_ZERO = ("type_vocab_size", "pad_token_id")
_FINITE = ("layer_norm_eps", "rms_norm_eps", "initializer_range", "rope_theta", "factor", "low_freq_factor",
           "high_freq_factor")
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob")


def _check_value(key: str, value: object, file: str) -> None:
    """Raises CheckpointError if a value of config.json has the wrong type for its key, or is out of bounds."""
    if key in LARGEST:
        least = 0 if key in _MAY_BE_ZERO else 1
        if type(value) is not int or not least <= value <= LARGEST[key]:
            raise CheckpointError(f"{file}: {key} = {_shown(value)} must be a whole number from {least} to "
                                  f"{LARGEST[key]:,}; fetch the file again")
    elif key in _FINITE:
        if type(value) not in (int, float) or not 0 <= value < 1e30:  # type: ignore[operator]  # nan is neither
            raise CheckpointError(f"{file}: {key} = {_shown(value)} must be a finite number, not below 0; fetch the "
                                  "file again")
    elif key in _BOOLEANS and type(value) is not bool:
        raise CheckpointError(f"{file}: {key} = {_shown(value)} must be true or false; fetch the file again")


def _shown(value: object) -> str:
    """The value for a message, of bounded length."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


class _HFConfig:
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
            raise CheckpointError(f"{self.file}: {key} = {_shown(value)} is not supported: {why}")


_ACTIVATIONS: dict[str, HiddenActivation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}


def _activation(config: _HFConfig, default: str) -> HiddenActivation:
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{config.file}: hidden_act = {_shown(name)} is not supported; known: "
                              f"{', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _encoder(config: _HFConfig, family: FamilyName) -> ModelShape:
    """Shape of a BERT or RoBERTa model."""
    config.refuse_unless("position_embedding_type", (None, "absolute"), "only learned absolute positions are")
    config.refuse_unless("is_decoder", (None, False), f"a {family} decoder is not an encoder")
    heads = config["num_attention_heads"]
    return ModelShape(
        family=family, hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads, num_query_groups=heads, head_dim=config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="LayerNorm",
        norm_eps=config.get("layer_norm_eps", 1e-12), activation=_activation(config, "gelu"), gated=False,
        add_bias_linear=True, add_qkv_bias=True, qk_layernorm=False, post_norm=True, bidirectional=True,
        rotary_base=None, type_vocab_size=config.get("type_vocab_size", 2), tie_word_embeddings=True,
        initializer_range=config.get("initializer_range", 0.02))


def _bert(config: _HFConfig) -> ModelShape:
    return _encoder(config, "bert")


def _roberta_like(family: FamilyName) -> Callable[[_HFConfig], ModelShape]:
    """Reader of a RoBERTa-like family, whose position ids start after the padding token's id."""

    def read(config: _HFConfig) -> ModelShape:
        return dataclasses.replace(_encoder(config, family), position_offset=config.get("pad_token_id", 1) + 1)

    return read


def _rope(config: _HFConfig, default: float) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling from either spelling: `rope_theta` and `rope_scaling`, or Transformers 5's
    `rope_parameters`."""
    parameters = config.get("rope_scaling", {}) or config.get("rope_parameters", {})
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{config.file}: rope_scaling = {_shown(parameters)} must be an object; fetch the file "
                              "again")
    for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if parameters.get(key) is not None:
            _check_value(key, parameters[key], config.file)
    base = float(parameters.get("rope_theta", config.get("rope_theta", default)))
    for partial in (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor", None)):
        if partial not in (None, 1):
            raise CheckpointError(f"{config.file}: partial_rotary_factor = {_shown(partial)} is not supported; "
                                  f"a {config['model_type']} model rotates all dimensions of a head")
    if kind == "default":
        return base, None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{config.file}: rope type {_shown(kind)} is not supported (default, linear and llama3 "
                              "are); remove it if your sequences fit the original length")
    keys = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    missing = [key for key in keys if key not in parameters]
    if missing:
        raise CheckpointError(f"{config.file}: rope type {kind!r} without {missing[0]!r}; fetch the file again")
    values = {key: float(parameters[key]) for key in keys}
    if kind == "linear":
        return base, RopeScaling(kind="linear", **values)
    # In Transformers, a key beside rope_scaling takes precedence over one inside it.
    original = config.get("original_max_position_embeddings", parameters.get(
        "original_max_position_embeddings", config["max_position_embeddings"]))
    return base, RopeScaling(kind="llama3", original_max_position_embeddings=original, **values)


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """Transformers' defaults of a family, for keys that config.json lacks."""

    key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size // heads."""
    norm_eps: float = 1e-6
    rotary_base: float = 1.0e4


def _decoder(config: _HFConfig, family: FamilyName, defaults: _Defaults, *,
             bias: Literal["none", "qkv", "all"] = "none", qk_layernorm: bool = False,
             sliding_window: int | None = None, ffn: str = "intermediate_size") -> ModelShape:
    """Shape of a decoder.

    Args:
        bias: the linear layers with a bias: none, those of query, key and value, or all.
        ffn: the key of the width of the MLP, or of an expert.
    """
    layer_types = set(config.get("layer_types", []))
    if not layer_types <= {"full_attention" if sliding_window is None else "sliding_attention"}:
        raise CheckpointError(f"{config.file}: layer_types = {_shown(sorted(layer_types))} is not supported; "
                              "all layers must have the same attention, over whole sequences or one sliding_window")
    heads = config["num_attention_heads"]
    base, scaling = _rope(config, defaults.rotary_base)
    return ModelShape(
        family=family, hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_query_groups=config.get(
            "num_key_value_heads",
            heads if "num_key_value_heads" in config.values else defaults.key_value_heads or heads),
        head_dim=config.get("head_dim", defaults.head_dim or config["hidden_size"] // heads),
        ffn_hidden_size=config[ffn], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="RMSNorm",
        norm_eps=config.get("rms_norm_eps", defaults.norm_eps), activation=_activation(config, "silu"), gated=True,
        add_bias_linear=bias == "all", add_qkv_bias=bias != "none", qk_layernorm=qk_layernorm, post_norm=False,
        bidirectional=config.get("is_causal", True) is False, rotary_base=base, rope_scaling=scaling,
        sliding_window=sliding_window, type_vocab_size=0,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02))


_WHOLE_SEQUENCES = "in these models only some layers have a window; attention here is over whole sequences"


def _qwen2(config: _HFConfig) -> ModelShape:
    config.refuse_unless("use_sliding_window", (None, False), _WHOLE_SEQUENCES)
    return _decoder(config, "qwen2", _Defaults(key_value_heads=32), bias="qkv")


def _qwen3(config: _HFConfig) -> ModelShape:
    # Transformers' own defaults of head_dim differ: 128 here, hidden_size // heads with experts.
    return _qwen3_like(config, "qwen3", _Defaults(key_value_heads=32, head_dim=128))


def _qwen3_like(config: _HFConfig, family: FamilyName, defaults: _Defaults, *,
                ffn: str = "intermediate_size") -> ModelShape:
    """Shape of a dense or sparse Qwen3 model."""
    config.refuse_unless("use_sliding_window", (None, False), _WHOLE_SEQUENCES)
    config.refuse_unless("attention_bias", (None, False), "no released model of the family has it")
    return _decoder(config, family, defaults, qk_layernorm=True, ffn=ffn)


def _qwen3_moe(config: _HFConfig) -> ModelShape:
    config.refuse_unless("decoder_sparse_step", (None, 1), "every layer must have experts")
    config.refuse_unless("mlp_only_layers", (None, []), "every layer must have experts")
    shape = _qwen3_like(config, "qwen3_moe", _Defaults(key_value_heads=4), ffn="moe_intermediate_size")
    return _with_experts(config, shape, normalize=config.get("norm_topk_prob", False))


def _with_experts(config: _HFConfig, shape: ModelShape, *, normalize: bool) -> ModelShape:
    """The shape with the experts that config.json names."""
    # Transformers 5 may write `num_local_experts`; released Qwen3 models have `num_experts`.
    experts = config.get("num_experts", None) or config["num_local_experts"]
    if normalize and config["num_experts_per_tok"] == 1:
        raise CheckpointError(f"{config.file}: num_experts_per_tok = 1 is not supported where the chosen experts' "
                              "weights are made to sum to 1: the router would have no gradient; choose 2 or more")
    return dataclasses.replace(shape, num_experts=experts, experts_per_token=config["num_experts_per_tok"],
                               normalize_expert_weights=normalize)


def _llama(config: _HFConfig) -> ModelShape:
    """Llama 1 to 3.x."""
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise CheckpointError(f"{config.file}: attention_bias = {attention_bias} with mlp_bias = {mlp_bias} is not "
                              "supported; all linear layers must have a bias, or none")
    return _decoder(config, "llama", _Defaults(), bias="all" if attention_bias else "none")


def _mistral(config: _HFConfig) -> ModelShape:
    # A config.json without the key has a window (Mistral 7B v0.1's), one with null has none.
    return _decoder(config, "mistral", _Defaults(key_value_heads=8), sliding_window=config.get(
        "sliding_window", None if "sliding_window" in config.values else 4096))


def _mixtral(config: _HFConfig) -> ModelShape:
    config.refuse_unless("router_jitter_noise", (None, 0), "the router's noise in training is not computed")
    shape = _decoder(config, "mixtral", _Defaults(key_value_heads=8, norm_eps=1e-5, rotary_base=1.0e6),
                     sliding_window=config.get("sliding_window", None))
    return _with_experts(config, shape, normalize=True)


FAMILIES: dict[str, Callable[[_HFConfig], ModelShape]] = {
    "bert": _bert, "roberta": _roberta_like("roberta"), "xlm-roberta": _roberta_like("xlm-roberta"), "qwen2": _qwen2,
    "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "llama": _llama, "mistral": _mistral, "mixtral": _mixtral}
"""Reader of each `model_type` of config.json."""


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Contents of `DIRECTORY/config.json`. Raises CheckpointError if it is missing or no JSON object."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no config.json, so this is not a model directory; "
                              "give a Hugging Face directory or a checkpoint made by `megatron-embed`")
    return read_json_object(file)


def model_shape(directory: str | Path) -> ModelShape:
    """Shape of the model in a Hugging Face directory.

    Raises:
        CheckpointError: unknown family, a model with its own code (`auto_map`), or an unsupported setting.
    """
    values = read_hf_config(directory)
    file = str(Path(directory) / "config.json")
    kind = values.get("model_type")
    if values.get("auto_map"):
        raise CheckpointError(f"{file}: auto_map asks for code that comes with the model (trust_remote_code), which is "
                              f"never run; use a release of one of these families: {', '.join(FAMILIES)}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{file}: model_type = {_shown(kind)} is not supported; give a model of one of these "
                              f"families: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind](_HFConfig(values, file))
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(file) else f"{file}: {text}; download the file again") from error
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"{file}: a value has the wrong type for a {kind} model ({error}); download "
                              "the file again") from error


def layers_by_stage(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, virtual stages included. If they do not divide evenly, the last stages take one
    more: the first stage holds the embeddings and, under 1F1B, the most micro-batches."""
    least, rest = divmod(num_layers, stages)
    return [least + (stage >= stages - rest) for stage in range(stages)]
