"""Model directories whose JSON files are absurd: deep, huge, or with numbers that no model has. A sentence, at once."""

import json
import math
import os
import time
from pathlib import Path

import pytest

from megatron_embed.config.json_file import DEEPEST, LARGEST_FILE, read_json_file
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.peft import PeftAdapter
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.data.load_tokenizer import load_tokenizer
from megatron_embed.errors import CheckpointError
from megatron_embed.models import families
from megatron_embed.models.families import FAMILIES, model_shape
from megatron_embed.models.hf_config import LARGEST
from megatron_embed.models.reranker_settings import read_reranker_settings
from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.toys import save_model

BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 64,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "type_vocab_size": 2, "pad_token_id": 1,
    "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "n_positions": 64,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0, "feed_forward_proj": "relu",
    "layer_norm_eps": 1e-6, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "norm_topk_prob": False,
    "bias": False, "relative_attention": True, "position_biased_input": False, "share_att_key": True,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_buckets": 8, "max_relative_positions": -1,
    "sliding_window": 32, "rope_scaling": {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 32}}
OF_FAMILY = {"modernbert": {"local_attention": 64}, "phi3": {"rope_scaling": {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "factor": 2.0,
    "original_max_position_embeddings": 32}}}
STRANGE = [10**9 * 10**9, 10**400, -1, 0, 1.5, 1e300, math.nan, math.inf, True, "7", [], [7], {}, {"a": 7}]


def write_config(folder, values):
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_strange_values_are_refused_by_name_or_are_of_no_consequence(monkeypatch, family):
    """Each key alone, at the top and in rope_scaling; whatever is taken has every whole number within its bound."""
    base = BASE | {"model_type": family} | OF_FAMILY.get(family, {})
    usual = shape_of(base, monkeypatch)
    assert usual is not None
    for value in STRANGE:
        for key in BASE:
            assert_refused_or_same(shape_of(base | {key: value}, monkeypatch), key, usual)
        for key in base["rope_scaling"]:
            scaling = base["rope_scaling"] | {key: value}
            assert_refused_or_same(shape_of(base | {"rope_scaling": scaling}, monkeypatch), key, usual)


def shape_of(values, monkeypatch):
    """The shape that these values mean; null where they are refused, in few words."""
    monkeypatch.setattr(families, "read_hf_config", lambda directory: values)
    try:
        return model_shape("model")
    except CheckpointError as error:
        assert str(error).startswith("model/config.json: ") and len(str(error)) < 400
        return None


def assert_refused_or_same(shape, key, usual):
    if shape is None:
        return
    for name in ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size",
                 "vocab_size", "max_position_embeddings", "num_experts", "experts_per_token", "type_vocab_size"):
        value = getattr(shape, name)
        assert type(value) is int and (value == getattr(usual, name) or value in (0, 1, 8)), (key, name, value)
    assert all(math.isfinite(value) for value in (shape.norm_eps, shape.initializer_range, shape.rotary_base or 0.0))
    assert type(shape.tie_word_embeddings) is bool and type(shape.add_bias_linear) is bool


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
def test_number_just_above_its_bound_is_refused_with_it(tmp_path, key):
    folder = write_config(tmp_path, BASE | {"model_type": "llama", key: LARGEST[key] + 1})
    with pytest.raises(CheckpointError, match=rf"config.json: {key} = {LARGEST[key] + 1} must be a whole number from 1 "
                                              rf"to {LARGEST[key]:,}"):
        model_shape(folder)


def test_layers_times_experts_have_a_bound(tmp_path):
    values = BASE | {"model_type": "mixtral", "num_hidden_layers": 4096, "num_local_experts": 65536}
    del values["num_experts"]
    with pytest.raises(CheckpointError, match="4096 layers of 65536 experts are more than 131,072 MLPs"):
        model_shape(write_config(tmp_path, values))
    values |= {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 5}
    with pytest.raises(CheckpointError, match="num_experts_per_tok = 5 is more than the 4 experts"):
        model_shape(write_config(tmp_path, values))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Path(save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True))


def changed(model, folder, name, text):
    """A copy of the model's directory, by links, with one file of its own."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != name and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).unlink(missing_ok=True)
    if isinstance(text, int):
        with (folder / name).open("wb") as file:
            file.truncate(text)
    else:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_layers_that_the_weights_lack_are_found_before_anything_is_allocated(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    for values in ({"num_hidden_layers": 4096, "layer_types": None}, {"hidden_size": 2**20},
                   {"intermediate_size": 2**24}, {"vocab_size": 2**26}):
        start = time.monotonic()
        with pytest.raises(CheckpointError):
            HFDirectory(changed(model, tmp_path / "model", "config.json", json.dumps(config | values)))
        assert time.monotonic() - start < 5


DEEP = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
JUST_READABLE = '{"a": ' + "[" * 900 + "]" * 900 + "}"


@pytest.mark.parametrize("text, words", [
    (DEEP, f"nested more than {DEEPEST} levels deep"), (JUST_READABLE, f"nested more than {DEEPEST} levels deep"),
    ("[" + "[]," * 1_000_000 + "[]]", "more than 1,000,000 brackets"),
    ('{"a": ' + "9" * 5000 + "}", "4300"), (LARGEST_FILE + 1, "longer than 16 MiB")],
    ids=["deep", "as deep as Python reads", "brackets", "digits", "long"])
@pytest.mark.parametrize("name", ["config.json", "modules.json", "config_sentence_transformers.json",
                                  "sentence_bert_config.json", "tokenizer_config.json", "reranker.json"])
def test_absurd_json_files_are_refused_by_name(model, tmp_path, name, text, words):
    folder = changed(model, tmp_path / "model", "modules.json", json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]))
    folder = changed(model, folder, name, text)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        model_shape(folder)
        read_saved_settings(folder)
        read_reranker_settings(folder)
    assert str(folder / name) in str(caught.value) and words in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", DEEP), ("tokenizer.json", (1 << 28) + 1), ("tokenizer_config.json", DEEP),
    ("special_tokens_map.json", DEEP), ("special_tokens_map.json", LARGEST_FILE + 1), ("added_tokens.json", DEEP),
    ("chat_template.jinja", LARGEST_FILE + 1), ("vocab.txt", (1 << 28) + 1)])
def test_absurd_tokenizer_files_are_refused_by_name(model, tmp_path, name, text):
    folder, start = changed(model, tmp_path / "model", name, text), time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(str(folder), None)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - start < 10


def test_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_json_file(tmp_path / "config.json")


@pytest.mark.parametrize("key, value", [
    ("r", 10**9), ("r", 2.5), ("r", True), ("r", math.nan), ("r", -1), ("lora_alpha", math.inf),
    ("lora_alpha", math.nan), ("lora_alpha", 10**400), ("lora_alpha", "8"), ("lora_alpha", True)])
def test_numbers_of_adapters_are_checked_before_their_tensors(tmp_path, key, value):
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16} | {key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {key} = .* above 0, at most") as caught:
        PeftAdapter(tmp_path, rules_for("qwen3"), None)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [10**30, 1e30, True, -1, "512", [], None])
def test_length_of_a_reranker_is_a_length(tmp_path, value):
    (tmp_path / "reranker.json").write_text(json.dumps({
        "head": "score", "template": None, "instruction": "", "true_token": "yes", "false_token": "no",
        "max_length": value, "activation": "sigmoid"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="reranker.json: not readable .*max_length = "):
        read_reranker_settings(tmp_path)
