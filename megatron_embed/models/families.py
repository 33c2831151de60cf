"""The shape of a model, read from its Hugging Face `config.json`.

Imports neither torch nor Megatron.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_object
from megatron_embed.errors import CheckpointError
from megatron_embed.models.deberta_family import deberta_v2
from megatron_embed.models.hf_config import HFConfig, activation, is_causal, rope, rotary_dim, shown
from megatron_embed.models.known_keys import CONFIG
from megatron_embed.models.local_attention_families import gemma2, gemma3_text, modernbert
from megatron_embed.models.model_shape import (
    ClassifierShape,
    DisentangledPositions,
    FamilyName,
    HiddenActivation,
    ModelShape,
    RelativePositions,
    RopeScaling,
    layers_by_stage,
)
from megatron_embed.models.t5_family import t5

__all__ = ["FAMILIES", "DisentangledPositions", "FamilyName", "HiddenActivation", "ModelShape", "RelativePositions",
           "RopeScaling", "layers_by_stage", "model_shape", "read_hf_config"]


def _encoder(config: HFConfig, family: FamilyName) -> ModelShape:
    """Shape of a BERT or RoBERTa model."""
    config.refuse_unless("position_embedding_type", (None, "absolute"), "only learned absolute positions are")
    config.refuse_unless("is_decoder", (None, False), f"a {family} decoder is not an encoder")
    heads = config["num_attention_heads"]
    return ModelShape(
        family=family, hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads, num_query_groups=heads, head_dim=config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="LayerNorm",
        norm_eps=config.get("layer_norm_eps", 1e-12), activation=activation(config, "gelu"), gated=False,
        add_bias_linear=True, add_qkv_bias=True, qk_layernorm=False, post_norm=True, bidirectional=True,
        rotary_base=None, type_vocab_size=config.get("type_vocab_size", 2),
        tie_word_embeddings=config.get("tie_word_embeddings", True), embedding_norm=True, classifier=ClassifierShape(),
        initializer_range=config.get("initializer_range", 0.02))


def _bert(config: HFConfig) -> ModelShape:
    return _encoder(config, "bert")


def _roberta_like(family: FamilyName) -> Callable[[HFConfig], ModelShape]:
    """Reader of a RoBERTa-like family, whose position ids start after the padding token's id."""

    def read(config: HFConfig) -> ModelShape:
        return dataclasses.replace(_encoder(config, family), position_offset=config.get("pad_token_id", 1) + 1)

    return read


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    """Transformers' defaults of a family, for keys that config.json lacks."""

    key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size // heads."""
    norm_eps: float = 1e-6
    rotary_base: float = 1.0e4
    partial_rotary: float | None = None
    """Share of a head's dimensions that is rotated; None: all, and config.json must not say otherwise."""


def _decoder(config: HFConfig, family: FamilyName, defaults: _Defaults, *,
             bias: Literal["none", "qkv", "all"] = "none", qk_layernorm: bool = False,
             sliding_window: int | None = None, ffn: str = "intermediate_size") -> ModelShape:
    """Shape of a decoder.

    Args:
        bias: the linear layers with a bias: none, those of query, key and value, or all.
        ffn: the key of the width of the MLP, or of an expert.
    """
    layer_types = set(config.get("layer_types", []))
    if not layer_types <= {"full_attention" if sliding_window is None else "sliding_attention"}:
        raise CheckpointError(f"{config.file}: layer_types = {shown(sorted(layer_types))} is not supported; "
                              "all layers must have the same attention, over whole sequences or one sliding_window")
    heads = config["num_attention_heads"]
    partial = defaults.partial_rotary
    base, scaling = rope(config, defaults.rotary_base, partial=partial is not None)
    own_dim = None if "head_dim" in config.values else defaults.head_dim
    head_dim = config.get("head_dim", own_dim or config["hidden_size"] // heads)
    return ModelShape(
        family=family, hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_query_groups=config.get(
            "num_key_value_heads",
            heads if "num_key_value_heads" in config.values else defaults.key_value_heads or heads),
        head_dim=head_dim, ffn_hidden_size=config[ffn], vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"], norm="RMSNorm",
        norm_eps=config.get("rms_norm_eps", defaults.norm_eps), activation=activation(config, "silu"), gated=True,
        add_bias_linear=bias == "all", add_qkv_bias=bias != "none", qk_layernorm=qk_layernorm, post_norm=False,
        bidirectional=not is_causal(config), rotary_base=base, rope_scaling=scaling,
        rotary_dim=None if partial is None else rotary_dim(config, head_dim, partial),
        sliding_window=sliding_window, type_vocab_size=0,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02))


_WHOLE_SEQUENCES = "in these models only some layers have a window; attention here is over whole sequences"


def _qwen2(config: HFConfig) -> ModelShape:
    config.refuse_unless("use_sliding_window", (None, False), _WHOLE_SEQUENCES)
    return _decoder(config, "qwen2", _Defaults(key_value_heads=32), bias="qkv")


def _qwen3(config: HFConfig) -> ModelShape:
    # Transformers' own defaults of head_dim differ: 128 here, hidden_size // heads with experts.
    return _qwen3_like(config, "qwen3", _Defaults(key_value_heads=32, head_dim=128))


def _qwen3_like(config: HFConfig, family: FamilyName, defaults: _Defaults, *,
                ffn: str = "intermediate_size") -> ModelShape:
    """Shape of a dense or sparse Qwen3 model."""
    config.refuse_unless("use_sliding_window", (None, False), _WHOLE_SEQUENCES)
    config.refuse_unless("attention_bias", (None, False), "no released model of the family has it")
    return _decoder(config, family, defaults, qk_layernorm=True, ffn=ffn)


def _qwen3_moe(config: HFConfig) -> ModelShape:
    config.refuse_unless("decoder_sparse_step", (None, 1), "every layer must have experts")
    config.refuse_unless("mlp_only_layers", (None, []), "every layer must have experts")
    shape = _qwen3_like(config, "qwen3_moe", _Defaults(key_value_heads=4), ffn="moe_intermediate_size")
    return _with_experts(config, shape, normalize=config.get("norm_topk_prob", False))


def _with_experts(config: HFConfig, shape: ModelShape, *, normalize: bool) -> ModelShape:
    """The shape with the experts that config.json names."""
    # Transformers 5 may write `num_local_experts`; released Qwen3 models have `num_experts`.
    experts = config.get("num_experts", None) or config["num_local_experts"]
    config.refuse_unless("num_local_experts", (None, experts), f"num_experts = {experts} is the same setting's other "
                         "name; remove one")
    if normalize and config["num_experts_per_tok"] == 1:
        raise CheckpointError(f"{config.file}: num_experts_per_tok = 1 is not supported where the chosen experts' "
                              "weights are made to sum to 1: the router would have no gradient; choose 2 or more")
    return dataclasses.replace(shape, num_experts=experts, experts_per_token=config["num_experts_per_tok"],
                               normalize_expert_weights=normalize)


def _llama(config: HFConfig) -> ModelShape:
    """Llama 1 to 3.x."""
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    if attention_bias != mlp_bias:
        raise CheckpointError(f"{config.file}: attention_bias = {attention_bias} with mlp_bias = {mlp_bias} is not "
                              "supported; all linear layers must have a bias, or none")
    return _decoder(config, "llama", _Defaults(), bias="all" if attention_bias else "none")


def _mistral(config: HFConfig) -> ModelShape:
    # A config.json without the key has a window (Mistral 7B v0.1's), one with null has none.
    return _decoder(config, "mistral", _Defaults(key_value_heads=8), sliding_window=config.get(
        "sliding_window", None if "sliding_window" in config.values else 4096))


def _mixtral(config: HFConfig) -> ModelShape:
    config.refuse_unless("router_jitter_noise", (None, 0), "the router's noise in training is not computed")
    shape = _decoder(config, "mixtral", _Defaults(key_value_heads=8, norm_eps=1e-5, rotary_base=1.0e6),
                     sliding_window=config.get("sliding_window", None))
    return _with_experts(config, shape, normalize=True)


def _phi3(config: HFConfig) -> ModelShape:
    """Phi-3 and Phi-4."""
    shape = _decoder(config, "phi3", _Defaults(norm_eps=1e-5, partial_rotary=1.0),
                     sliding_window=config.get("sliding_window", None))
    if shape.rope_scaling is not None and shape.rope_scaling.kind != "longrope":
        raise CheckpointError(f"{config.file}: rope type {shape.rope_scaling.kind!r} is not supported: in Phi-3 "
                              "Transformers computes default and longrope alone, and takes yarn for longrope; write "
                              "longrope, if that is what the weights were trained with")
    return shape


def _glm(family: Literal["glm", "glm4"]) -> Callable[[HFConfig], ModelShape]:
    """Reader of GLM-4 (glm) and GLM-4-0414 (glm4), which also has norms after attention and MLP."""

    def read(config: HFConfig) -> ModelShape:
        shape = _decoder(config, family, _Defaults(key_value_heads=2, head_dim=128, norm_eps=1.5625e-7,
                                                   partial_rotary=0.5),
                         bias="qkv" if config.get("attention_bias", True) else "none")
        return dataclasses.replace(shape, interleaved_rotary=True, sublayer_norms=family == "glm4")

    return read


def _internlm2(config: HFConfig) -> ModelShape:
    """InternLM2 (Cai et al. 2024, arXiv:2403.17297): a Llama. Its released code defaults `bias` to true."""
    if config.get("bias", True):
        raise CheckpointError(f"{config.file}: bias = {shown(config.values.get('bias'))} is not supported (without the "
                              "key it is true): no released model of the family has biases")
    return _decoder(config, "internlm2", _Defaults())


def _internlm3(config: HFConfig) -> ModelShape:
    """InternLM3: a Llama, with biases of query, key and value (`qkv_bias`), of all other linear layers (`bias`), or
    both."""
    qkv_bias, others = config.get("qkv_bias", False), config.get("bias", False)
    if others and not qkv_bias:
        raise CheckpointError(f"{config.file}: bias = True with qkv_bias = {qkv_bias} is not supported; query, key and "
                              "value must have a bias too, or no linear layer")
    return _decoder(config, "internlm3", _Defaults(key_value_heads=32),
                    bias="all" if others else "qkv" if qkv_bias else "none")


def _nomic_bert(config: HFConfig) -> ModelShape:
    """NomicBERT (Nussbaum et al. 2024, arXiv:2402.01613): BERT's order of norms, with rotary positions, SwiGLU and no
    biases of linear layers."""
    base, scaling = rope(config, 1000.0)
    shape = _encoder(config, "nomic_bert")
    return dataclasses.replace(
        shape, head_dim=config.get("head_dim", shape.head_dim), rotary_base=base, rope_scaling=scaling, gated=True,
        activation=activation(config, "silu"), add_bias_linear=False, add_qkv_bias=False)


FAMILIES: dict[str, Callable[[HFConfig], ModelShape]] = {
    "bert": _bert, "roberta": _roberta_like("roberta"), "xlm-roberta": _roberta_like("xlm-roberta"),
    "modernbert": modernbert, "qwen2": _qwen2,
    "qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "llama": _llama, "mistral": _mistral, "mixtral": _mixtral,
    "t5": t5,
    "gemma2": gemma2, "gemma3_text": gemma3_text,
    "phi3": _phi3, "glm": _glm("glm"), "glm4": _glm("glm4"), "nomic_bert": _nomic_bert,
    "internlm2": _internlm2, "internlm3": _internlm3, "deberta-v2": deberta_v2}
"""Reader of each `model_type` of config.json."""


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Contents of `DIRECTORY/config.json`. Raises CheckpointError if it is missing or no JSON object."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no config.json, so this is not a model directory; "
                              "give a Hugging Face directory or a checkpoint made by `megatron-embed`")
    return read_json_object(file)


_KNOWN_CODE = {
    "qwen2": r"(Alibaba-NLP/gte-[\w.-]+--)?modeling_qwen\.Qwen2(Model|ForCausalLM|ForSequenceClassification)",
    "phi3": r"(microsoft/Phi-[\w.-]+--)?(configuration|modeling)_phi3\.Phi3\w+|Xenova/gpt-4o",
    **{kind: rf"(internlm/[\w.-]+--)?(configuration|modeling|tokenization)_{kind}(_fast)?\.InternLM\d\w+"
       for kind in ("internlm2", "internlm3")}}
"""Families -> names in the auto_map of their releases, and of what Transformers saves of these. Phi-4-mini's tokenizer
is a repository."""


def _is_known_code(values: dict[str, Any]) -> bool:
    """Whether the code that auto_map names is that of a family whose computation is known: gte-Qwen2 (Qwen2 with
    attention to the whole text, as `is_causal` must say), Phi-3 (of which Transformers has a class of its own, and
    takes that) or InternLM. It is not run."""
    kind, code = values.get("model_type"), values["auto_map"]
    if not isinstance(code, dict) or not isinstance(kind, str) or kind not in _KNOWN_CODE:
        return False
    if kind == "qwen2" and values.get("is_causal") is not False:
        return False
    return all(isinstance(name, str) and re.fullmatch(_KNOWN_CODE[kind], name) for name in code.values())


def model_shape(directory: str | Path) -> ModelShape:
    """Shape of the model in a Hugging Face directory.

    Raises:
        CheckpointError: unknown family, a model with its own code (`auto_map`), or an unsupported setting.
    """
    values = read_hf_config(directory)
    file = str(Path(directory) / "config.json")
    kind = values.get("model_type")
    if values.get("auto_map") and not _is_known_code(values):
        raise CheckpointError(f"{file}: auto_map asks for code that comes with the model (trust_remote_code), which is "
                              f"never run; use a release of one of these families: {', '.join(FAMILIES)}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{file}: model_type = {shown(kind)} is not supported; give a model of one of these "
                              f"families: {', '.join(FAMILIES)}")
    CONFIG.check(Path(file), values)
    try:
        config = HFConfig(values, file)
        shape = FAMILIES[kind](config)
        if shape.bidirectional:
            config.refuse_unless("is_causal", (None, False), "tokens see the whole text here, and in Transformers only "
                                 "those before them, by some kernels; remove the key")
        return shape
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(file) else f"{file}: {text}; download the file again") from error
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"{file}: a value has the wrong type for a {kind} model ({error}); download "
                              "the file again") from error
