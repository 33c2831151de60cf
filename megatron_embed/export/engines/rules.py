"""Engines that cannot run here: whether their source reads a directory as it is meant, rule by rule.

Text Embeddings Inference has no package, SGLang needs a GPU, and Infinity needs versions of ten packages that exclude
ours. Beside the rules here, on files, the limits of limits.py hold.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_json_object, read_optional_json_object
from megatron_embed.errors import CheckpointError
from megatron_embed.export.engines.limits import LIMITS, NAMES, check_limits
from megatron_embed.names import EngineName

_DECODER_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps")
_ENCODER_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "hidden_act", "hidden_dropout_prob", "max_position_embeddings", "type_vocab_size",
                 "initializer_range", "layer_norm_eps", "pad_token_id")
_TEI_KEYS: Mapping[str, Sequence[str]] = {
    "bert": _ENCODER_KEYS, "roberta": _ENCODER_KEYS, "xlm-roberta": _ENCODER_KEYS,
    "qwen2": (*_DECODER_KEYS, "use_sliding_window"),
    "qwen3": (*_DECODER_KEYS, "use_sliding_window", "attention_bias", "eos_token_id"),
    "llama": (*_DECODER_KEYS, "initializer_range"), "mistral": (*_DECODER_KEYS, "initializer_range"),
    "modernbert": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                   "hidden_activation", "max_position_embeddings", "initializer_range", "initializer_cutoff_factor",
                   "norm_eps", "norm_bias", "pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id",
                   "sep_token_id", "global_rope_theta", "attention_bias", "attention_dropout",
                   "global_attn_every_n_layers", "local_attention", "local_rope_theta", "classifier_activation"),
    "gemma3_text": ("attention_bias", "pad_token_id", "hidden_activation", "hidden_size", "intermediate_size",
                    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
                    "query_pre_attn_scalar", "rms_norm_eps", "rope_local_base_freq", "_sliding_window_pattern",
                    "use_bidirectional_attention", "vocab_size")}
"""Keys of config.json without a default, by model_type."""
_TRANSFORMERS_4_ROPE: Mapping[str, Mapping[str, str]] = {
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}}
"""Key of Transformers 4 for the rotary base of each kind of layer, by model_type; the others: rope_theta."""
_BIDIRECTIONAL = {"qwen2": ("is_causal", False)}
"""What tells TEI that a decoder is bidirectional, by model_type; the others: use_bidirectional_attention."""
_ST3_TRANSFORMER = {"max_seq_length", "model_args", "tokenizer_args", "config_args", "cache_dir", "do_lower_case",
                    "tokenizer_name_or_path", "backend"}
_ST3_POOLING = {"word_embedding_dimension", "pooling_mode", "pooling_mode_cls_token", "pooling_mode_max_tokens",
                "pooling_mode_mean_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
                "pooling_mode_lasttoken", "include_prompt"}
"""Arguments of the modules of Sentence Transformers 3, to which it hands every key of their files."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition on the files of a directory."""

    broken: Callable[[Path], str]
    """What is wrong with a directory, and what to do; empty: nothing."""
    source: str


def _values(directory: Path) -> dict[str, Any]:
    return read_json_object(directory / "config.json")


def _is_classifier(directory: Path) -> bool:
    return any(str(name).endswith("Classification") for name in _values(directory).get("architectures") or ())


def _fast_tokenizer(directory: Path) -> str:
    return "" if (directory / "tokenizer.json").is_file() else (
        "there is no tokenizer.json; save the tokenizer once with Transformers")


def _required_keys(directory: Path) -> str:
    config = _values(directory)
    missing = [key for key in _TEI_KEYS.get(str(config.get("model_type")), ()) if config.get(key) is None]
    return f"config.json has no {missing[0]}; write it there" if missing else ""


def _pooling_flags(directory: Path) -> str:
    file = directory / "1_Pooling" / "config.json"
    if _is_classifier(directory):
        return ""
    if not file.is_file():
        return "there is no 1_Pooling/config.json; export it with --format sentence-transformers, or give --pooling"
    values = read_json_object(file)
    missing = [key for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens")
               if not isinstance(values.get(key), bool)]
    return (f"1_Pooling/config.json has no {missing[0]} (the layout of Sentence Transformers 6); export it with "
            "--format sentence-transformers") if missing else ""


def _length_file(directory: Path) -> str:
    file = directory / "sentence_bert_config.json"
    return "" if not file.is_file() or isinstance(read_json_object(file).get("max_seq_length"), int) else (
        "sentence_bert_config.json has no max_seq_length; write it there")


def _prompt_texts(directory: Path) -> str:
    prompts = read_optional_json_object(directory / "config_sentence_transformers.json").get("prompts") or {}
    odd = [name for name, text in prompts.items() if not isinstance(text, str)]
    return f"the prompt {odd[0]!r} of config_sentence_transformers.json is not a text; write one" if odd else ""


def _labels(directory: Path) -> str:
    config = _values(directory)
    if not _is_classifier(directory):
        return ""
    missing = [key for key in ("id2label", "label2id") if not isinstance(config.get(key), dict)]
    if missing:
        return f"config.json has no {missing[0]}; export it with --format cross-encoder"
    return "" if len(config["id2label"]) == 1 else (
        f"config.json has {len(config['id2label'])} labels, and a reranker has one; export it with --format "
        "cross-encoder")


def _known_as_bidirectional(directory: Path) -> str:
    config = _values(directory)
    key, value = _BIDIRECTIONAL.get(str(config.get("model_type")), ("use_bidirectional_attention", True))
    return "" if config.get("is_causal") is not False or config.get(key) is value else (
        f"it reads {key}, not is_causal, and would run the model causally; add \"{key}\": {str(value).lower()} to "
        "config.json")


def _cuts_on_the_right(directory: Path) -> str:
    side = read_optional_json_object(directory / "tokenizer_config.json").get("truncation_side", "right")
    return "" if side == "right" else (
        "the tokenizer cuts texts on the left; send \"truncation_direction\": \"Left\" with every request, or train "
        "with right truncation")


def _rotary_settings(directory: Path) -> str:
    config = _values(directory)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return ""
    kinds = _TRANSFORMERS_4_ROPE.get(str(config.get("model_type")), {})
    wanted = {key: rope[kind].get("rope_theta") for kind, key in kinds.items() if isinstance(rope.get(kind), dict)}
    wanted = {key: base for key, base in (wanted or {"rope_theta": rope.get("rope_theta")}).items()
              if key not in config}
    return "" if not wanted else (
        f"Transformers 4 reads {', '.join(wanted)} and rope_scaling, not rope_parameters; copy "
        f"{json.dumps(wanted)[1:-1]} (and rope_scaling) to the top of config.json")


def _module_keys(directory: Path) -> str:
    for name, known in (("sentence_bert_config.json", _ST3_TRANSFORMER), ("1_Pooling/config.json", _ST3_POOLING)):
        for key in sorted(read_optional_json_object(directory / name).keys() - known):
            if not _is_classifier(directory):  # a cross-encoder's files are not read
                return f"{name} has {key}, which Sentence Transformers 3 does not take; remove it"
    return ""


_TEI_SOURCE, _INFINITY_SOURCE = "TEI 1.9.3, ", "infinity-emb 0.0.78, "
RULES: Mapping[EngineName, Sequence[Rule]] = {
    "tei": (
        Rule(broken=_fast_tokenizer, source=_TEI_SOURCE + "router/src/lib.rs, Tokenizer::from_file"),
        Rule(broken=_required_keys, source=_TEI_SOURCE + "backends/candle/src/models, *Config"),
        Rule(broken=_pooling_flags, source=_TEI_SOURCE + "router/src/lib.rs, PoolConfig"),
        Rule(broken=_length_file, source=_TEI_SOURCE + "router/src/lib.rs, STConfig"),
        Rule(broken=_prompt_texts, source=_TEI_SOURCE + "router/src/lib.rs, NewSTConfig"),
        Rule(broken=_labels, source=_TEI_SOURCE + "router/src/lib.rs, ModelType"),
        Rule(broken=_known_as_bidirectional,
             source=_TEI_SOURCE + "backends/candle/src/models/{qwen2,qwen3,mistral}.rs"),
        Rule(broken=_cuts_on_the_right, source=_TEI_SOURCE + "router/src/http/types.rs, truncation_direction")),
    "sglang": (
        Rule(broken=_labels, source="SGLang, python/sglang/srt/layers/pooler.py, CrossEncodingPooler"),),
    "infinity": (
        Rule(broken=_module_keys, source=_INFINITY_SOURCE + "sentence-transformers >=3.0.1,<4, models/Transformer.py"),
        Rule(broken=_labels, source=_INFINITY_SOURCE + "inference/select_model.py, get_engine_type_from_config"),
        Rule(broken=_rotary_settings, source=_INFINITY_SOURCE + "transformers < 5 by sentence-transformers < 4"))}


def check_rules(engine: EngineName, directory: Path) -> str:
    """The line of the report on an engine whose rules the directory keeps.

    Raises:
        CheckpointError: naming the engine, the first rule that is broken, where it is in the source, and a remedy.
    """
    check_limits([engine], directory)
    for rule in RULES[engine]:
        if wrong := rule.broken(directory):
            raise CheckpointError(f"{directory}: {NAMES[engine]}: {wrong} ({rule.source})")
    return (f"{NAMES[engine]} reads it as it is meant, by {len(RULES[engine]) + len(LIMITS[engine])} rules of its "
            "source; it was not run")
