"""Families from their Hugging Face directory to the stock libraries: exported, with adapters, as rerankers."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from megatron_embed.convert.convert import hf_to_megatron
from tests.helpers.embedding_reference import save_model
from tests.helpers.exactness_cases import SLOW_KINDS
from tests.helpers.internlm import InternLM2, stock_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.reranker_runs import run_settings
from tests.helpers.tensor_files import assert_bit_equal, edit_config, tensors_of


def call(*arguments, ranks=1):
    """Lines on standard output of a command that must succeed."""
    results = run_on_ranks(command, ranks, [str(argument) for argument in arguments])
    assert all(code == 0 for code, *_ in results), results[0][2]
    return results[0][1].splitlines()


def assert_same_vectors(library, lines):
    """The report of a comparison of texts: one line, or one for each role."""
    compared = [line for line in lines if "gives the same vectors" in line]
    assert compared and all(library in line for line in compared), lines
    assert all("cosine" not in line or "cosine >= 1.000000" in line for line in compared), lines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, saved = tmp_path_factory.mktemp("models"), {}

    def model(kind):
        if kind not in saved:
            saved[kind] = save_model(folder / kind, kind)
        return saved[kind]

    return model


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind == "modernbert" else pytest.mark.slow) for kind in SLOW_KINDS])
def test_an_export_gives_the_same_vectors_in_sentence_transformers(models, kind, tmp_path):
    hf_to_megatron(models(kind), tmp_path / "megatron")
    *comparisons, _ = call("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "export", "--format",
                           "sentence-transformers")
    assert_same_vectors("Sentence Transformers", comparisons)


OWN_CODE = {
    "qwen2": {"is_causal": False, "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}},  # gte-Qwen2
    "phi3": {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoTokenizer": "Xenova/gpt-4o",
                          "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_CODE)
def test_an_export_of_a_known_release_gives_the_same_vectors_without_its_code(models, kind, tmp_path):
    """Sentence Transformers loads Transformers' own class."""
    shutil.copytree(models(kind), tmp_path / "model")
    edit_config(tmp_path / "model", **OWN_CODE[kind])
    hf_to_megatron(tmp_path / "model", tmp_path / "megatron")
    *comparisons, _ = call("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "export", "--format",
                           "sentence-transformers")
    assert_same_vectors("Sentence Transformers", comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SLOW_KINDS if kind != "nomic_bert"])
def test_adapters_are_trained_exported_and_read_again(models, kind, tmp_path):
    """Tensor-parallel training; PEFT loads the adapter and gives the same vectors; a run begins with it."""
    values = settings(str(models(kind)), tmp_path / "run")
    values["lora"] = {"rank": 4, "alpha": 16, "target_modules": ["all-linear"]}
    values["training"] |= {"train_steps": 2, "learning_rate": 2e-2, "micro_batch_size": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    call("train", tmp_path / "run.yaml", "parallel.tensor_model_parallel_size=2", ranks=2)
    lines = call("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "peft", "--format", "peft")
    if kind == "internlm2":
        assert "Transformers has no class for" in lines[0]
    else:
        assert_same_vectors("PEFT", lines[:-1])
    lines = call("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "merged", "--format",
                 "sentence-transformers", "--merge-lora")
    assert_same_vectors("Sentence Transformers", lines[:-1])
    if kind == "gte-qwen2":
        return  # the toy's tokenizer is BERT's, which AutoTokenizer makes another one of beside a config.json of Qwen2
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a text with some words in it"}) + "\n")
    for name in ("peft", "merged"):
        call("encode", "--model", tmp_path / name, "--input", tmp_path / "text.jsonl", "--output",
             tmp_path / f"{name}.npy", "--pooling", "mean")
    import numpy as np

    ours, theirs = (np.load(tmp_path / f"{name}.npy") for name in ("peft", "merged"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if kind == "internlm2":  # the command cannot compare it with PEFT for want of Transformers' class
        adapted = vector_with_peft(models(kind), tmp_path / "peft", "a text with some words in it")
        np.testing.assert_allclose(ours[0] / np.linalg.norm(ours[0]), adapted, atol=1e-6)
        base = vector_with_peft(models(kind), None, "a text with some words in it")
        assert np.abs(base - adapted).max() > 1e-2, "the adapter changes nothing"


def vector_with_peft(model, adapter, text):
    """Mean of an InternLM2's token states, of length 1, with the adapter that PEFT reads from a directory."""
    import peft

    stock = InternLM2(model)
    if adapter is not None:
        peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(adapter)), stock)
        loaded = peft.set_peft_model_state_dict(stock, peft.load_peft_weights(str(adapter), device="cpu"))
        assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "lora" in name]
    tokens = transformers.AutoTokenizer.from_pretrained(stock_of(model))(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return torch.nn.functional.normalize(stock.eval()(tokens)[0].mean(0), dim=0).numpy()


def trained_cross_encoder(model, tmp_path, sizes):
    """A backbone without a head becomes a reranker, whose head is new and trained: the directory and its tensors. The
    export is compared with CrossEncoder and Transformers."""
    config = run_settings(str(model), tmp_path, head="score", objective={"loss": "listwise"},
                          training={"global_batch_size": 8, "micro_batch_size": 4, "train_steps": 1,
                                    "learning_rate": 1e-3, "micro_batch_tokens": None},
                          parallel=sizes,
                          checkpoint={"directory": str(tmp_path / "run"), "export_at_end": str(tmp_path / "export")})
    call("train", config, ranks=2)
    return tmp_path / "export", load_file(tmp_path / "export" / "model.safetensors")


@pytest.mark.slow
def test_deberta_becomes_a_stock_cross_encoder(models, tmp_path):
    """The context pooler and the classifier are new; the export is read again and scores the same."""
    export, weights = trained_cross_encoder(models("deberta-v2"), tmp_path, {"tensor_model_parallel_size": 2})
    assert weights["classifier.weight"].shape == (1, 32) and weights["pooler.dense.weight"].shape == (32, 32)
    values = json.loads((export / "config.json").read_text())
    assert (values["architectures"], values["model_type"]) == (["DebertaV2ForSequenceClassification"], "deberta-v2")
    hf_to_megatron(export, tmp_path / "again")
    lines = call("convert", "megatron-to-hf", tmp_path / "again", tmp_path / "back", "--format", "hf")
    assert_bit_equal(tensors_of(tmp_path / "back"), weights)
    assert any("Sentence Transformers gives the same scores" in line for line in lines) or "tensors" in lines[-1]


@pytest.mark.slow
def test_modernbert_becomes_a_stock_cross_encoder(models, tmp_path):
    """Dense layer, norm and classifier are new."""
    _, weights = trained_cross_encoder(models("modernbert"), tmp_path, {"pipeline_model_parallel_size": 2})
    assert weights["classifier.weight"].shape == (1, 32) and weights["head.dense.weight"].shape == (32, 32)
    assert not torch.equal(weights["head.norm.weight"], torch.ones(32)) and "head.dense.bias" not in weights
    names = json.loads((tmp_path / "export" / "config.json").read_text())["architectures"]
    assert names == ["ModernBertForSequenceClassification"]
