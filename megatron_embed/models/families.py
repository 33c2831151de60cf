"""What a Hugging Face `config.json` says about a model, in one closed value per family.

Imports neither torch nor Megatron.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_embed.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that decides the modules and tensor shapes of a backbone.

    Names follow Megatron's TransformerConfig.
    """

    family: Literal["bert", "qwen3", "qwen3_moe"]
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Of one attention head; need not be hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm: Literal["LayerNorm", "RMSNorm"]
    norm_eps: float
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    gated: bool
    """The MLP multiplies a gate into the activation (SwiGLU); fc1 holds [gate; up]."""
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    post_norm: bool
    """Original Transformer order: the norm comes after the residual sum, and there is no final norm."""
    bidirectional: bool
    rotary_base: float | None
    """null: learned absolute positions."""
    type_vocab_size: int
    """Token types; 0: none."""
    tie_word_embeddings: bool
    initializer_range: float
    num_experts: int = 0
    """Experts of every layer's MLP; 0: dense."""
    experts_per_token: int = 0
    normalize_expert_weights: bool = True
    """The chosen experts' weights sum to 1."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "head_dim",
                    "ffn_hidden_size", "vocab_size", "max_position_embeddings"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{key} = {value!r} must be a positive integer")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                                  f"num_key_value_heads = {self.num_query_groups}")


class _HFConfig:
    """A `config.json` whose missing keys are refused with the file's name."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise CheckpointError(f"{self.file}: key {key!r} is missing; a {self.values.get('model_type')} model needs "
                                  "it")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        value = self.values.get(key)
        if value not in allowed:
            raise CheckpointError(f"{self.file}: {key} = {value!r} is not supported: {why}")


_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu", "silu"]] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}


def _activation(config: _HFConfig, key: str = "hidden_act") -> Literal["gelu", "gelu_tanh", "relu", "silu"]:
    name = config[key]
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{config.file}: {key} = {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _bert(config: _HFConfig) -> ModelShape:
    config.refuse_unless("position_embedding_type", (None, "absolute"), "only learned absolute positions are")
    config.refuse_unless("is_decoder", (None, False), "a BERT decoder is not an encoder")
    heads = config["num_attention_heads"]
    return ModelShape(
        family="bert", hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads, num_query_groups=heads, head_dim=config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="LayerNorm",
        norm_eps=config.get("layer_norm_eps", 1e-12), activation=_activation(config), gated=False, add_bias_linear=True,
        add_qkv_bias=True, qk_layernorm=False, post_norm=True, bidirectional=True, rotary_base=None,
        type_vocab_size=config.get("type_vocab_size", 2), tie_word_embeddings=True,
        initializer_range=config.get("initializer_range", 0.02))


def _rope_base(config: _HFConfig, default: float) -> float:
    """Rotary base from either spelling: `rope_theta` or Transformers 5's `rope_parameters`."""
    parameters = {**config.get("rope_scaling", {}), **config.get("rope_parameters", {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", None):
        raise CheckpointError(f"{config.file}: rope type {kind!r} is not supported for {config['model_type']}; "
                              "remove it if your sequences fit the original length")
    return float(parameters.get("rope_theta", config.get("rope_theta", default)))


def _qwen3(config: _HFConfig) -> ModelShape:
    # Transformers' own defaults differ: 128 here, hidden_size // heads with experts.
    return _qwen3_shape(config, head_dim=128, ffn_hidden_size=config["intermediate_size"])


def _qwen3_shape(config: _HFConfig, *, head_dim: int, ffn_hidden_size: int) -> ModelShape:
    """What dense and sparse Qwen3 share; `head_dim` where config.json gives none."""
    config.refuse_unless("use_sliding_window", (None, False), "attention here is over whole sequences")
    config.refuse_unless("attention_bias", (None, False), "no released model of the family has it")
    layer_types = set(config.get("layer_types", ["full_attention"]))
    if layer_types != {"full_attention"}:
        raise CheckpointError(f"{config.file}: layer_types = {sorted(layer_types)} is not supported; "
                              "attention here is over whole sequences")
    heads = config["num_attention_heads"]
    return ModelShape(
        family="qwen3", hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads, num_query_groups=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim", head_dim), ffn_hidden_size=ffn_hidden_size,
        vocab_size=config["vocab_size"], max_position_embeddings=config["max_position_embeddings"], norm="RMSNorm",
        norm_eps=config.get("rms_norm_eps", 1e-6), activation=_activation(config), gated=True, add_bias_linear=False,
        add_qkv_bias=False, qk_layernorm=True, post_norm=False,
        bidirectional=config.get("is_causal", True) is False, rotary_base=_rope_base(config, 1.0e4),
        type_vocab_size=0, tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02))


def _qwen3_moe(config: _HFConfig) -> ModelShape:
    config.refuse_unless("decoder_sparse_step", (None, 1), "every layer must have experts")
    config.refuse_unless("mlp_only_layers", (None, []), "every layer must have experts")
    shape = _qwen3_shape(config, head_dim=config["hidden_size"] // config["num_attention_heads"],
                         ffn_hidden_size=config["moe_intermediate_size"])
    # Transformers 5 may write `num_local_experts`, released models say `num_experts`.
    experts = config.get("num_experts", None) or config["num_local_experts"]
    return dataclasses.replace(
        shape, family="qwen3_moe", num_experts=experts, experts_per_token=config["num_experts_per_tok"],
        normalize_expert_weights=config.get("norm_topk_prob", False))


FAMILIES: dict[str, Callable[[_HFConfig], ModelShape]] = {"bert": _bert, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe}
"""By `model_type` of config.json."""


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Contents of `DIRECTORY/config.json`. Raises CheckpointError if it is missing or no JSON object."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no config.json, so this is no model directory; "
                              "give a Hugging Face directory or a checkpoint made by `megatron-embed`")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); download the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, not {type(values).__name__}; download the file again")
    return values


def model_shape(directory: str | Path) -> ModelShape:
    """Shape of the model in a Hugging Face directory.

    Raises:
        CheckpointError: unknown family, model with code of its own (`auto_map`), or a setting we do not compute.
    """
    values = read_hf_config(directory)
    file = str(Path(directory) / "config.json")
    kind = values.get("model_type")
    if values.get("auto_map"):
        raise CheckpointError(f"{file}: auto_map asks for code that comes with the model (trust_remote_code), which is "
                              f"never run; use a release of one of these families: {', '.join(FAMILIES)}")
    if kind not in FAMILIES:
        raise CheckpointError(f"{file}: model_type = {kind!r} is not supported; give a model of one of these families: "
                              f"{', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind](_HFConfig(values, file))
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(file) else f"{file}: {text}; download the file again") from error
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"{file}: a value is not of the kind that a {kind} model has there ({error}); download "
                              "the file again") from error
