"""Keys of config.json: those by which Transformers computes something else are read or refused, in every family."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import FAMILIES, model_shape
from megatron_embed.models.hf_config import HFConfig
from megatron_embed.models.known_keys import CONFIG

BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 1}
ENCODER = {key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "head_dim")}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "vocab_size": 100}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
OF_FAMILY = {
    "t5": T5, "qwen3_moe": BASE | EXPERTS, "mixtral": BASE | EXPERTS, "internlm2": BASE | {"bias": False},
    "deberta-v2": ENCODER | {"relative_attention": True, "position_biased_input": False, "share_att_key": True,
                             "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm"},
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert"), ENCODER)}
FOLDERS = {"xlm-roberta": "xlm_roberta", "deberta-v2": "deberta_v2", "gemma3_text": "gemma3"}
TRANSFORMERS = Path(importlib.util.find_spec("transformers").origin).parent
HARMLESS = {
    "_attn_implementation": "which kernel computes attention",
    "add_cross_attention": "of decoders", "num_decoder_layers": "of decoders", "decoder_start_token_id": "of decoders",
    "is_encoder_decoder": "of decoders", "scale_decoder_outputs": "of decoders",
    "attention_dropout": "of training", "attention_probs_dropout_prob": "of training", "dropout_rate": "of training",
    "classifier_dropout": "of training", "cls_dropout": "of training", "embedding_dropout": "of training",
    "hidden_dropout_prob": "of training", "mlp_dropout": "of training", "pooler_dropout": "of training",
    "resid_pdrop": "of training", "output_router_logits": "of training", "router_aux_loss_coef": "of training",
    "sparse_prediction": "of training", "sparse_pred_ignore_index": "of training",
    "initializer_cutoff_factor": "of new weights", "problem_type": "of losses",
    "chunk_size_feed_forward": "how the same is computed", "deterministic_flash_attn": "how the same is computed",
    "use_cache": "of generation", "bos_token_id": "of generation", "eos_token_id": "of generation",
    "output_attentions": "a further output", "output_hidden_states": "a further output", "return_dict": "its type",
    "conv_act": "of a convolution, which conv_kernel_size refuses",
    "conv_groups": "of a convolution, which conv_kernel_size refuses",
    "legacy": "of a head for masked tokens", "decoder_bias": "of a head for masked tokens",
    "num_labels": "read with a reranker", "pad_token_id": "read with a reranker",
    "tie_word_embeddings": "of T5, which ties them always",
    "intermediate_size": "of layers without experts, which mlp_only_layers refuses",
    "rope_parameters": "read where rope_scaling is missing", "original_max_position_embeddings": "read with one",
    "sliding_window": "without use_sliding_window",
    "get_text_config": "a method", "text_config": "of models for images", "vision_config": "of models for images",
    "image_token_id": "of models for images", "mm_tokens_per_image": "of models for images"}
"""Names that Transformers' modules take from a configuration, and why no reader of ours needs them."""


class Recorded(dict):
    """The values of a config.json, with the names that were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def values_of(family):
    return OF_FAMILY.get(family, BASE) | {"model_type": family}


def asked_for(family):
    values = Recorded(values_of(family))
    FAMILIES[family](HFConfig(values, "config.json"))
    return values.asked


def used_by_transformers(family):
    """Names of settings in the source of the family's modules."""
    folder = TRANSFORMERS / "models" / FOLDERS.get(family, family)
    source = "".join(file.read_text(encoding="utf-8") for file in folder.glob("mod*_*.py"))
    patterns = (r"config\.([a-zA-Z_]\w*)", r'getattr\(\w*\.?config, "(\w+)"')
    return {name for pattern in patterns for name in re.findall(pattern, source)}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"internlm2"}))
def test_every_setting_that_transformers_uses_is_read_or_known(family):
    used = used_by_transformers(family)
    assert len(used) > 5 or family == "internlm3"  # which changes a few lines of another family
    assert used - asked_for(family) - set(HARMLESS) - set(CONFIG.keys) == set()


OTHER_NAMES = {
    "modernbert": ("modernbert", {"sliding_window": 6}, ("local_attention", 12)),
    "t5-width": ("t5", {"hidden_size": 64}, ("d_model", 64)),
    "t5-heads": ("t5", {"num_attention_heads": 2}, ("num_heads", 2)),
    "t5-layers": ("t5", {"num_hidden_layers": 1}, ("num_layers", 1)),
    "t5-head": ("t5", {"head_dim": 4}, ("d_kv", 4)),
    "t5-activation": ("t5", {"dense_act_fn": "gelu_new"}, ("dense_act_fn", "gelu_new")),
    "t5-gate": ("t5", {"is_gated_act": True}, ("is_gated_act", True)),
    "t5-decoder": ("t5", {"is_decoder": True}, ("is_decoder", True)),
    "experts": ("qwen3_moe", {"num_local_experts": 2}, ("num_local_experts", 2)),
    "causal-encoder": ("bert", {"is_causal": True}, ("is_causal", True)),
    "causal": ("qwen3", {"is_causal": None}, ("is_causal", None)),
    "weights": ("bert", {"transformers_weights": "other.safetensors"}, ("transformers_weights", "other.safetensors")),
}
"""Family, the keys that are added, and what Transformers then has."""


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_key_that_transformers_takes_in_place_of_another_is_refused(tmp_path, name):
    family, added, (attribute, value) = OTHER_NAMES[name]
    (tmp_path / "config.json").write_text(json.dumps(values_of(family)), encoding="utf-8")
    model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values_of(family) | added), encoding="utf-8")
    assert getattr(AutoConfig.from_pretrained(tmp_path), attribute) == value
    ((key, given),) = added.items()
    with pytest.raises(CheckpointError) as error:
        model_shape(tmp_path)
    assert f"config.json: {key} = {given!r}" in str(error.value)


def test_a_rope_for_each_type_of_layers_is_refused_where_all_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values_of("qwen3") | {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 50.0}}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"rope_parameters\.'full_attention' is an object"):
        model_shape(tmp_path)


def test_the_same_value_under_both_names_passes(tmp_path):
    for family, added in (("modernbert", {"sliding_window": 64, "head_dim": 8}),
                          ("t5", {"hidden_size": 32, "dense_act_fn": "relu", "is_gated_act": False}),
                          ("mixtral", {"num_local_experts": 4})):
        (tmp_path / "config.json").write_text(json.dumps(values_of(family)), encoding="utf-8")
        expected = model_shape(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values_of(family) | added), encoding="utf-8")
        assert model_shape(tmp_path) == expected


def test_null_means_what_it_means_in_transformers(tmp_path):
    """GLM rotates half of a head's dimensions, and by null all of them."""
    for values, expected in (({}, 4), ({"partial_rotary_factor": None}, None)):
        (tmp_path / "config.json").write_text(json.dumps(values_of("glm") | values), encoding="utf-8")
        assert model_shape(tmp_path).rotary_dim == expected
        factor = AutoConfig.from_pretrained(tmp_path).rope_parameters.get("partial_rotary_factor", 1.0)
        assert factor == (0.5 if expected else 1.0)


def test_words_of_a_list_are_taken_as_they_are(tmp_path):
    """Transformers strips those of a string alone, and computes nothing for one that it does not know."""
    for words, expected in (("P2C | c2p", ["p2c", "c2p"]), (["p2c ", "c2p"], ["p2c ", "c2p"])):
        (tmp_path / "config.json").write_text(json.dumps(values_of("deberta-v2") | {"pos_att_type": words}))
        assert AutoConfig.from_pretrained(tmp_path).pos_att_type == expected
        if isinstance(words, str):
            model_shape(tmp_path)
            continue
        with pytest.raises(CheckpointError, match=r"pos_att_type = \['p2c ', 'c2p'\] .* is not supported"):
            model_shape(tmp_path)
