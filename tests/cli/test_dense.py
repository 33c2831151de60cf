"""Dense modules in directories, runs, checkpoints, exports, adapters and merges, held against Sentence Transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.convert.merge import merge_models
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.dense_directories import IDENTITY, SHAPES, TANH, add_modules
from tests.helpers.foreign_directories_helpers import change, model_of, save_directory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import layout

TEXTS = ["The quick brown fox", "jumps over", "the lazy dog, and over a much longer text that follows it"]
CASES = {
    **{name: (steps, "mean") for name, steps in SHAPES.items()},
    "not-normalized": ((("Dense", 32, 12, True, TANH),), "cls"),
    "two-poolings": ((("Dense", 64, 16, True, torch.nn.GELU()), ("Normalize",)), "cls+mean"),
    "two-poolings-alone": ((("Normalize",),), "cls+mean"),
}


def save_case(path, name, kind="bert"):
    steps, pooling = CASES[name]
    return add_modules(save_directory(path, kind=kind), steps, pooling)


def vectors_of(directories):
    """Called by all ranks."""
    import megatron_embed

    return {name: megatron_embed.load(directory).encode(TEXTS, "document") for name, directory in directories.items()}


def stock(directory):
    return SentenceTransformer(str(directory), device="cpu").encode_document(TEXTS, batch_size=1)


def test_vectors_are_the_stock_library_s(tmp_path):
    directories = {name: str(save_case(tmp_path / name, name, kind="qwen3" if name == "embeddinggemma" else "bert"))
                   for name in CASES}
    (ours,) = run_on_ranks(vectors_of, 1, directories)
    for name, directory in directories.items():
        np.testing.assert_allclose(ours[name], stock(directory), atol=5e-6, err_msg=name)
    assert ours["embeddinggemma"].shape == (3, 24)
    assert ours["two-poolings-alone"].shape == (3, 64)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [layout(tp=2), layout(pp=2), layout(cp=2)], ids=["TP2", "PP2", "CP2"])
def test_vectors_on_two_ranks(tmp_path, sizes):
    directories = {name: str(save_case(tmp_path / name, name)) for name in CASES}
    for ours in run_on_ranks(vectors_under, 2, directories, sizes):
        for name, directory in directories.items():
            np.testing.assert_allclose(ours[name], stock(directory), atol=1e-5, err_msg=name)


def vectors_under(directories, sizes):
    """Called by all ranks."""
    import argparse

    from megatron_embed.loading.model_directory import open_encoder

    vectors = {}
    for name, directory in directories.items():
        overrides = [f"parallel.{key}={json.dumps(value)}" for key, value in sizes.items()]
        arguments = argparse.Namespace(model=directory, pooling=None, max_length=None, dtype=None, no_normalize=False,
                                       overrides=overrides)
        vectors[name] = open_encoder(arguments, prompts=True)[0].encode(TEXTS, "document").numpy()
    return vectors


def edit(path, key, value):
    change(path / "2_Dense" / "config.json", **{key: value})


def without_weights(path, pickle=False):
    (path / "2_Dense" / "model.safetensors").rename(path / "2_Dense" / ("pytorch_model.bin" if pickle else "other"))


REFUSED = {
    "residual": (lambda path: edit(path, "use_residual", True), ["2_Dense/config.json", "use_residual = True"]),
    "activation": (lambda path: edit(path, "activation_function", "torch.nn.modules.activation.ELU"),
                   ["activation_function = 'torch.nn.modules.activation.ELU'"]),
    "tokens": (lambda path: edit(path, "module_input_name", "token_embeddings"), ["module_input_name"]),
    "size": (lambda path: edit(path, "out_features", "24"), ["out_features = '24'", "whole number"]),
    "chain": (lambda path: edit(path, "out_features", 40), ["in_features = 1056", "out_features = 40"]),
    "pooled": (lambda path: edit(path, "in_features", 48), ["embedding.pooling = 'mean'", "in_features = 48"]),
    "shape": (lambda path: edit(path, "bias", True), ["2_Dense/model.safetensors", "linear.bias [1056]"]),
    "missing": (without_weights, ["2_Dense/model.safetensors", "no such file"]),
    "pickle": (lambda path: without_weights(path, pickle=True), ["pytorch_model.bin", "never opened", "safetensors"]),
    "settings": (lambda path: (path / "2_Dense" / "config.json").unlink(), ["2_Dense/config.json", "no such file"]),
}


def errors_of(directories):
    """Called by all ranks."""
    import megatron_embed

    errors = {}
    for name, directory in directories.items():
        with pytest.raises((CheckpointError, ConfigError)) as error:
            megatron_embed.load(directory)
        errors[name] = str(error.value)
    return errors


def test_what_is_not_computed_is_refused(tmp_path):
    directories = {}
    for name, (damage, _) in REFUSED.items():
        directories[name] = str(save_case(tmp_path / name, "embeddinggemma"))
        damage(Path(directories[name]))
    (errors,) = run_on_ranks(errors_of, 1, directories)
    for name, (_, words) in REFUSED.items():
        for word in words:
            assert word in errors[name], (name, errors[name])


def test_conversion_keeps_them_bit_for_bit(tmp_path):
    source = save_case(tmp_path / "model", "embeddinggemma")
    hf_to_megatron(source, tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(source))
    for file in ("modules.json", "2_Dense/model.safetensors", "3_Dense/model.safetensors", "3_Dense/config.json"):
        assert (source / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file
    (ours,) = run_on_ranks(vectors_of, 1, {"": str(tmp_path / "checkpoint")})
    np.testing.assert_allclose(ours[""], stock(source), atol=5e-6)


def test_merge_takes_their_weights_too(tmp_path):
    models = [save_case(tmp_path / str(index), "embeddinggemma") for index in range(2)]
    file = models[1] / "2_Dense" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    merge_models(models, tmp_path / "merged", method="linear")
    first, second, merged = (load_file(path / "2_Dense" / "model.safetensors")["linear.weight"].double()
                             for path in (*models, tmp_path / "merged"))
    assert torch.equal(merged.float(), ((first + second) / 2).float())
    change(models[1] / "3_Dense" / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    with pytest.raises(CheckpointError, match="dense"):
        merge_models(models, tmp_path / "other", method="linear")


def run_values(model, directory, **changes):
    values = configuration(str(model), directory, train_steps=4, **changes.pop("training", {}))
    values["checkpoint"] |= {"save_every_steps": 2, "keep": 0}
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return values


def test_a_run_trains_resumes_and_exports_a_new_projection(tmp_path):
    values = run_values(model_of("bert"), tmp_path / "run", embedding={"embedding_dim": 20},
                        checkpoint={"export_at_end": str(tmp_path / "export")})
    run_on_ranks(train, 1, values)
    export = tmp_path / "export"
    assert (export / "2_Dense" / "config.json").is_file()
    assert json.loads((export / "modules.json").read_text())[2]["type"] == "sentence_transformers.models.Dense"
    (ours,) = run_on_ranks(vectors_of, 1, {"export": str(export), "run": str(tmp_path / "run")})
    expected = stock(export)
    assert expected.shape == (3, 20)
    for name, vectors in ours.items():
        np.testing.assert_allclose(vectors, expected, atol=5e-6, err_msg=name)
    again = go_back(tmp_path / "run", tmp_path / "again", 2)
    values["checkpoint"] |= {"directory": str(again), "export_at_end": str(tmp_path / "export2")}
    run_on_ranks(train, 1, values)
    assert curve(again) == curve(tmp_path / "run")
    first, second = (load_file(path / "2_Dense" / "model.safetensors") for path in (export, tmp_path / "export2"))
    assert torch.equal(first["linear.weight"], second["linear.weight"])
    assert read_saved_settings(export).dense[0].out_features == 20


def message_of(values):
    """Called by all ranks: the error of a run."""
    with pytest.raises((CheckpointError, ConfigError)) as error:
        train(values)
    return str(error.value)


def test_settings_that_do_not_go_with_the_model_are_refused(tmp_path):
    model = save_case(tmp_path / "model", "embeddinggemma")
    for changes, words in (
            ({"embedding": {"embedding_dim": 20}}, ["embedding.embedding_dim = 20", "give 24"]),
            ({"embedding": {"pooling": "cls+mean"}}, ["embedding.pooling = 'cls+mean'", "64"]),
            ({"embedding": {"matryoshka_dims": [32]}}, ["embedding.matryoshka_dims", "have 24"])):
        (message,) = run_on_ranks(message_of, 1, run_values(model, tmp_path / "run", **changes))
        for word in words:
            assert word in message, message


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_trained_model_moves_between_layouts_and_is_exported(tmp_path, name):
    """Two steps on two tensor-parallel ranks, two in a pipeline with context parallelism; the same on one rank."""
    model = save_case(tmp_path / "model", name)
    embedding = {"pooling": CASES[name][1]}
    one = run_values(model, tmp_path / "one", embedding=embedding)
    run_on_ranks(train, 1, one)
    moved = run_values(model, tmp_path / "moved", embedding=embedding, parallel=layout(tp=2))
    run_on_ranks(train, 2, moved)
    moved = go_back(tmp_path / "moved", tmp_path / "again", 2)
    values = run_values(model, moved, embedding=embedding, parallel=layout(pp=2),
                        checkpoint={"export_at_end": str(tmp_path / "export")})
    run_on_ranks(train, 2, values)
    losses, expected = ([loss for loss, *_ in curve(path)] for path in (moved, tmp_path / "one"))
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4
    (ours,) = run_on_ranks(vectors_of, 1, {"": str(moved)})
    theirs = stock(tmp_path / "export")
    np.testing.assert_allclose(ours[""], theirs, atol=1e-5)
    assert abs(theirs - stock(model)).max() > 1e-3 or name == "two-poolings-alone", "nothing was trained"
    trained = [load_file(path / "2_Dense" / "model.safetensors") for path in (tmp_path / "export", model)
               if (path / "2_Dense" / "model.safetensors").is_file()]
    assert len(trained) != 2 or not torch.equal(trained[0]["linear.weight"], trained[1]["linear.weight"])


@pytest.mark.slow
def test_adapters_leave_them_trained_whole(tmp_path):
    """As with Sentence Transformers' add_adapter; PEFT's directory holds them, and reads back the same."""
    from megatron_embed.convert.peft import write_peft

    model = save_case(tmp_path / "model", "embeddinggemma")
    run_on_ranks(train, 2, run_values(model, tmp_path / "run", lora={"rank": 4}, parallel=layout(tp=2)))
    write_peft(tmp_path / "run", tmp_path / "adapter")
    megatron_to_hf(tmp_path / "run", tmp_path / "merged", merge_lora=True)
    directories = {name: str(tmp_path / name) for name in ("run", "adapter", "merged")}
    (ours,) = run_on_ranks(vectors_of, 1, directories)
    for name in ("adapter", "merged"):
        np.testing.assert_allclose(stock(tmp_path / name), ours["run"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours[name], ours["run"], atol=1e-5, err_msg=name)
    before, after = (load_file(path / "2_Dense" / "model.safetensors") for path in (model, tmp_path / "adapter"))
    assert not torch.equal(before["linear.weight"], after["linear.weight"])
    assert torch.equal(load_file(model / "model.safetensors")["embeddings.word_embeddings.weight"],
                       load_file(tmp_path / "merged" / "model.safetensors")["embeddings.word_embeddings.weight"])


@pytest.mark.slow
def test_a_sentence_t5_is_trained_exported_and_loaded_by_the_stock_library(tmp_path):
    """T5's encoder, mean pooling, a Dense and Normalize, as in sentence-t5 and GTR; trained on two tensor-parallel
    ranks, compared in Sentence Transformers and in ONNX Runtime."""
    from megatron_embed.export.formats import EXPORTERS
    from megatron_embed.export.verified_write import ExportOptions
    from tests.helpers.embedding_reference import save_model

    model = add_modules(save_model(tmp_path / "model", "t5"), SHAPES["sentence-t5"])
    run_on_ranks(train, 2, run_values(model, tmp_path / "run", parallel=layout(tp=2), embedding={"pooling": "mean"},
                                      checkpoint={"export_at_end": str(tmp_path / "export")}))
    (ours,) = run_on_ranks(vectors_of, 1, {"": str(tmp_path / "export")})
    theirs = stock(tmp_path / "export")
    np.testing.assert_allclose(ours[""], theirs, atol=1e-5)
    assert abs(theirs - stock(model)).max() > 1e-3, "nothing was trained"
    trained = load_file(tmp_path / "export" / "2_Dense" / "model.safetensors")["linear.weight"]
    assert not torch.equal(trained, load_file(model / "2_Dense" / "model.safetensors")["linear.weight"])
    (lines,) = run_on_ranks(EXPORTERS["onnx"], 1, str(tmp_path / "run"), str(tmp_path / "onnx"), ExportOptions())
    assert any("ONNX Runtime gives the same vectors" in line for line in lines), lines


@pytest.mark.slow
def test_an_onnx_graph_holds_them(tmp_path):
    from megatron_embed.export.formats import EXPORTERS
    from megatron_embed.export.verified_write import ExportOptions

    for name in ("embeddinggemma", "two-poolings"):
        source = save_case(tmp_path / name, name)
        (lines,) = run_on_ranks(EXPORTERS["onnx"], 1, str(source), str(tmp_path / f"{name}-onnx"), ExportOptions())
        assert any("ONNX Runtime gives the same vectors" in line for line in lines), lines


def test_engines_that_leave_them_out_are_refused(tmp_path):
    from megatron_embed.export.engines.limits import check_limits

    for name, engine, words in (("embeddinggemma", "llama.cpp", "leaves Dense modules out"),
                                ("not-normalized", "sglang", "leaves Dense modules out"),
                                ("two-poolings-alone", "llama.cpp", r"no cls\+mean pooling"),
                                ("two-poolings-alone", "tei", "reads one pooling")):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=words):
            check_limits([engine], path if path.exists() else save_case(path, name))


def test_plan_counts_them(tmp_path):
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.models.families import model_shape
    from megatron_embed.planning.parameters import held_parameters

    model = save_case(tmp_path / "model", "embeddinggemma")
    plain = tmp_path / "plain"
    shutil.copytree(model_of("bert"), plain)

    def held(path, *settings, stage=0):
        config = config_of_overrides([f"model.path={json.dumps(str(path))}", *settings])
        return held_parameters(config, model_shape(path), stage).total

    assert held(model) - held(plain) == 32 * 1056 + 1056 * 24
    assert held(plain, "embedding.embedding_dim=20") - held(plain) == 32 * 20
    tp = "parallel.tensor_model_parallel_size=2"
    assert held(model, tp) - held(plain, tp) == 32 * 1056 // 2 + 1056 * 24
    pp = "parallel.pipeline_model_parallel_size=2"
    assert held(model, pp) == held(plain, pp)
    assert held(model, pp, stage=1) - held(plain, pp, stage=1) == 32 * 1056 + 1056 * 24


def test_identity_is_named_as_the_stock_library_does():
    from megatron_embed.export.sentence_transformers import dense_config
    from megatron_embed.models.dense_settings import DenseSettings

    settings = DenseSettings(in_features=4, out_features=3, bias=False, activation="identity")
    from sentence_transformers.base.modules import Dense

    expected = Dense(4, 3, bias=False, activation_function=IDENTITY).get_config_dict()
    assert dense_config(settings).items() <= expected.items()
