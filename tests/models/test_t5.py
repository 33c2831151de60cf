"""The encoder of T5 beside test_families.py: buckets, conversions, and a sentence-t5 directory with its Dense."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.families import RelativePositions, model_shape
from megatron_embed.models.hf_config import ACTIVATIONS
from megatron_embed.models.relative_bias import distance_buckets
from tests.helpers.dense_directories import SHAPES, add_modules
from tests.helpers.families import T5
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.tensor_files import edit_config
from tests.helpers.toys import copy_tokenizer, layout

VARIANTS = {"plain": {"feed_forward_proj": "relu"}, "gated": {"feed_forward_proj": "gated-gelu"}}


def save_t5(path, variant, **settings):
    torch.manual_seed(3)
    model = transformers.T5EncoderModel(transformers.T5Config(**T5 | VARIANTS[variant] | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "relative" in name or len(parameter) == model.config.vocab_size else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    return {variant: save_t5(folder / variant, variant) for variant in VARIANTS}


@pytest.mark.parametrize("buckets, longest", [(32, 128), (12, 30), (4, 2), (64, 1000)])
def test_buckets_are_those_of_transformers(buckets, longest):
    distance = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(distance, True, buckets, longest)
    ours = distance_buckets(distance, RelativePositions(num_buckets=buckets, max_distance=longest))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bit_equal(models, variant, tmp_path):
    hf_to_megatron(models[variant], tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    first, second = (load_file(f"{path}/model.safetensors") for path in (models[variant], tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_decoder_of_a_whole_model_passes_through(tmp_path):
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | VARIANTS["gated"]))
    model.save_pretrained(tmp_path / "model")
    hf_to_megatron(tmp_path / "model", tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "model", tmp_path / "back"))
    assert any(name.startswith("decoder.") for name in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settings, words", [
    ({"feed_forward_proj": "gated-tanhshrink"}, "feed_forward_proj"),
    ({"relative_attention_num_buckets": 6}, "multiple of 4"),
    ({"relative_attention_max_distance": 2}, "more than a quarter"),
])
def test_what_is_not_computed_is_refused(models, tmp_path, settings, words):
    shutil.copytree(models["plain"], tmp_path / "model")
    edit_config(tmp_path / "model", **settings)
    with pytest.raises(CheckpointError, match=words):
        model_shape(tmp_path / "model")


@pytest.mark.parametrize("projection", [None, "relu", "gated-gelu", "gated-silu", "gelu"])
def test_missing_keys_mean_what_transformers_takes_them_for(tmp_path, projection):
    values = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 48, "num_heads": 4, "num_layers": 2,
              "vocab_size": 103, **({} if projection is None else {"feed_forward_proj": projection})}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, shape = transformers.AutoConfig.from_pretrained(tmp_path), model_shape(tmp_path)
    assert (shape.gated, shape.activation) == (config.is_gated_act, ACTIVATIONS[config.dense_act_fn])
    assert shape.norm_eps == config.layer_norm_epsilon
    assert shape.relative_positions == RelativePositions(num_buckets=config.relative_attention_num_buckets,
                                                         max_distance=config.relative_attention_max_distance)
    assert shape.initializer_range == config.initializer_factor


def test_flash_kernels_are_refused(models):
    from megatron_embed.models.encoder import attention_kernel
    from tests.helpers.toys import run_config

    config = run_config(models["plain"])
    assert attention_kernel(config, model_shape(models["plain"])) == "sdpa"
    import dataclasses

    flash = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="flash"))
    with pytest.raises(ConfigError, match=r"model\.attention = 'flash'.*no bias"):
        attention_kernel(flash, model_shape(models["plain"]))


def vectors_of(directories):
    """Called by all ranks."""
    import megatron_embed

    return {name: megatron_embed.load(directory).encode(SENTENCES, "document") for name, directory in
            directories.items()}


SENTENCES = ["The quick brown fox", "jumps over", "the lazy dog, and over a much longer text that follows it"]


def save_sentence_t5(path, variant):
    save_t5(path, variant, vocab_size=30522)
    copy_tokenizer(path)
    return add_modules(path, SHAPES["sentence-t5"])


@pytest.mark.slow
def test_a_sentence_t5_directory_is_trained_and_exported(tmp_path):
    """Vectors are Sentence Transformers', before a run and after it: two stages of a pipeline, then two tensor-parallel
    ranks; the losses are those of one rank."""
    model = save_sentence_t5(tmp_path / "model", "gated")
    plain = save_sentence_t5(tmp_path / "plain", "plain")
    runs = {}
    for name, parallel in (("one", {}), ("two", layout(pp=2))):
        runs[name] = configuration(str(model), tmp_path / name, parallel=parallel or None, train_steps=4)
        runs[name]["checkpoint"] |= {"save_every_steps": 2, "keep": 0}
        run_on_ranks(train, 2 if parallel else 1, runs[name])
    again = go_back(tmp_path / "two", tmp_path / "again", 2)
    runs["two"]["checkpoint"] |= {"directory": str(again), "export_at_end": str(tmp_path / "export")}
    run_on_ranks(train, 2, runs["two"] | {"parallel": layout(tp=2)})
    losses, expected = ([loss for loss, *_ in curve(path)] for path in (again, tmp_path / "one"))
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4
    directories = {"model": str(model), "plain": str(plain), "export": str(tmp_path / "export"), "run": str(again)}
    (ours,) = run_on_ranks(vectors_of, 1, directories)
    for name in ("model", "plain", "export"):
        stock = SentenceTransformer(directories[name], device="cpu").encode_document(SENTENCES, batch_size=1)
        assert np.abs(ours[name] - stock).max() < 1e-5, name
    assert np.abs(ours["run"] - ours["export"]).max() < 1e-5
    assert np.abs(ours["export"] - ours["model"]).max() > 1e-3, "nothing was trained"
