"""Heads of sparse models and rerankers in the files of other programs: the numbers of the stock library, or a refusal
that names the tensor; nothing random in place of what is missing."""

import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SparseEncoder

from megatron_embed.convert.convert import hf_to_megatron
from megatron_embed.errors import CheckpointError
from tests.helpers.foreign_heads import TEXTS, changed, copied, opened, sparse_model
from tests.helpers.foreign_rerankers import decoder, edit, encoder, own_scores, saved, stock_scores
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, train
from tests.helpers.sparse_reference import VOCABULARY
from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import layout

MATRIX, BIAS = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)), torch.ones(VOCABULARY)
HONOURED = {
    "bert, untied": lambda path: sparse_model(path, tie_word_embeddings=False),
    "bert, the second bias alone": lambda path: changed(
        sparse_model(path), cls__predictions__decoder__bias="cls.predictions.bias"),
    "bert, two biases": lambda path: changed(sparse_model(path), cls__predictions__decoder__bias=3 * BIAS),
    "modernbert, no bias": lambda path: sparse_model(path, "ModernBert", decoder_bias=False)}
MORE_HONOURED = {
    "bert, a copy of the embeddings": lambda path: changed(
        sparse_model(path), cls__predictions__decoder__weight=tensors_of(path)["bert.embeddings.word_embeddings.weight"]
    ),
    "roberta, untied": lambda path: sparse_model(path, "Roberta", tie_word_embeddings=False, hidden_act="relu"),
    "xlm-roberta, two biases": lambda path: changed(
        sparse_model(path, "XLMRoberta"), lm_head__decoder__bias=-2 * BIAS),
    "modernbert, all biases, untied": lambda path: sparse_model(
        path, "ModernBert", tie_word_embeddings=False, classifier_bias=True, norm_bias=True),
    "qwen3, untied": lambda path: sparse_model(path, "Qwen3", tie_word_embeddings=False),
    "qwen3, a copy of the embeddings": lambda path: changed(
        sparse_model(path, "Qwen3", tie_word_embeddings=True),
        lm_head__weight=tensors_of(path)["model.embed_tokens.weight"])}


def stock(directory):
    encode = SparseEncoder(str(directory), device="cpu", local_files_only=True).encode_document
    return encode(TEXTS, convert_to_sparse_tensor=False, batch_size=1).numpy()


def assert_stock(ours, directory):
    assert not isinstance(ours, str), ours
    expected = stock(directory)
    assert (expected > 0).mean() > 0.02 and expected.std() > 0.05
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


def compare_all(cases, folder):
    directories = {name: save(folder / str(index)) for index, (name, save) in enumerate(cases.items())}
    (results,) = run_on_ranks(opened, 1, [str(directory) for directory in directories.values()])
    for ours, directory in zip(results, directories.values(), strict=True):
        assert_stock(ours, directory)


def test_heads_of_sparse_models_give_the_stock_vectors(tmp_path):
    compare_all(HONOURED, tmp_path)


@pytest.mark.slow
def test_more_heads_of_sparse_models_give_the_stock_vectors(tmp_path):
    compare_all(MORE_HONOURED, tmp_path)


TRANSFORM = "cls__predictions__transform__"
DAMAGED_BERT = {
    "no head": (dict.fromkeys((f"{TRANSFORM}dense__weight", f"{TRANSFORM}dense__bias", f"{TRANSFORM}LayerNorm__weight",
                               f"{TRANSFORM}LayerNorm__bias", "cls__predictions__bias")),
                ("no cls.predictions.transform.dense.weight, cls.predictions.transform.dense.bias", "cls.predictions.b",
                 "random numbers")),
    "no norm": ({f"{TRANSFORM}LayerNorm__weight": None}, ("no cls.predictions.transform.LayerNorm.weight,",)),
    "another matrix": ({"cls__predictions__decoder__weight": MATRIX},
                       ("decoder.weight is another matrix than bert.embeddings", "tie_word_embeddings to false")),
    "long bias": ({"cls__predictions__bias": torch.ones(VOCABULARY + 5)}, ("has shape [514]", "head's has [509]")),
    "bias of one": ({"cls__predictions__bias": torch.ones(1)}, ("cls.predictions.bias has shape [1]",)),
    "second bias of one": ({"cls__predictions__decoder__bias": torch.ones(1)}, ("decoder.bias has shape [1]",)),
    "dense of another width": ({f"{TRANSFORM}dense__weight": torch.ones(32, 16)}, ("[32, 16], but", "[32, 32]")),
    "dense bias of one": ({f"{TRANSFORM}dense__bias": torch.ones(1)}, ("transform.dense.bias has shape [1]",)),
    "a layer more": ({f"{TRANSFORM}second__weight": torch.ones(1)}, ("holds cls.predictions.transform.second.weight",)),
}
DAMAGED_OTHERS = {
    "bert, untied, the first bias alone": (
        lambda path: changed(sparse_model(path, tie_word_embeddings=False), cls__predictions__decoder__bias=None),
        ("holds cls.predictions.bias and no cls.predictions.decoder.bias",)),
    "bert, untied, no matrix": (
        lambda path: changed(sparse_model(path, tie_word_embeddings=False), cls__predictions__decoder__weight=None),
        ("has no cls.predictions.decoder.weight",)),
    "modernbert, another matrix": (lambda path: changed(sparse_model(path, "ModernBert"), decoder__weight=MATRIX),
                                   ("decoder.weight is another matrix than model.embeddings.tok_embeddings.weight",)),
    "xlm-roberta, another matrix": (
        lambda path: changed(sparse_model(path, "XLMRoberta"), lm_head__decoder__weight=MATRIX),
        ("lm_head.decoder.weight is another matrix than roberta.embeddings.word_embeddings.weight",)),
    "modernbert, a bias that config.json denies": (
        lambda path: changed(sparse_model(path, "ModernBert", decoder_bias=False), decoder__bias=BIAS),
        ("holds decoder.bias",)),
    "modernbert, a bias of the dense layer": (
        lambda path: changed(sparse_model(path, "ModernBert"), head__dense__bias=torch.ones(32)),
        ("holds head.dense.bias",)),
    "qwen3, another matrix": (
        lambda path: changed(sparse_model(path, "Qwen3", tie_word_embeddings=True), lm_head__weight=MATRIX),
        ("lm_head.weight is another matrix than model.embed_tokens.weight",)),
    "qwen3, more rows": (
        lambda path: changed(sparse_model(path, "Qwen3", tie_word_embeddings=False),
                             lm_head__weight=torch.ones(VOCABULARY + 11, 32)), ("lm_head.weight has shape [520, 32]",)),
    "qwen3, one column": (
        lambda path: changed(sparse_model(path, "Qwen3", tie_word_embeddings=False),
                             lm_head__weight=torch.ones(VOCABULARY, 1)), ("has shape [509, 1]",)),
    "qwen3, a bias": (
        lambda path: changed(sparse_model(path, "Qwen3", tie_word_embeddings=False), lm_head__bias=BIAS),
        ("holds lm_head.bias",)),
}


def assert_all_refused(results, words):
    for (name, expected), result in zip(words.items(), results, strict=True):
        assert isinstance(result, str), f"{name}: used all the same"
        for word in expected:
            assert word in result, f"{name}: {result}"


def test_damaged_heads_of_sparse_models_are_refused(tmp_path):
    plain = sparse_model(tmp_path / "plain")
    for index, (tensors, _) in enumerate(DAMAGED_BERT.values()):
        copied(plain, tmp_path / str(index), **tensors)
    (results,) = run_on_ranks(opened, 1, [str(tmp_path / str(index)) for index in range(len(DAMAGED_BERT))])
    assert_all_refused(results, {name: words for name, (_, words) in DAMAGED_BERT.items()})


def assert_damage_refused(cases, folder, open_all):
    directories = [folder / str(index) for index in range(len(cases))]
    for directory, (build, _) in zip(directories, cases.values(), strict=True):
        build(directory)
    (results,) = run_on_ranks(open_all, 1, list(map(str, directories)))
    assert_all_refused(results, {name: words for name, (_, words) in cases.items()})


def quick_first(cases, quick):
    """Two parameters: the quick cases, and the slow rest."""
    rest = {name: case for name, case in cases.items() if name not in quick}
    return [pytest.param({name: cases[name] for name in quick}, id="quick"),
            pytest.param(rest, id="rest", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", quick_first(
    DAMAGED_OTHERS, ["bert, untied, the first bias alone", "qwen3, another matrix"]))
def test_other_damaged_heads_of_sparse_models_are_refused(cases, tmp_path):
    assert_damage_refused(cases, tmp_path, opened)


def test_the_tables_name_every_tied_output_matrix():
    from megatron_embed.convert.head_tensors import CLASSES, SCORE_NAMES, lm_head_name
    from megatron_embed.convert.tables.lookup import rules_for
    from megatron_embed.convert.vocabulary_tensors import MASKED_LM_NAMES

    names = {family: lm_head_name(family) for family in CLASSES if family not in SCORE_NAMES}
    names |= {family: of_family["weight"] for family, of_family in MASKED_LM_NAMES.items()}
    assert len(names) > 15
    for family, name in names.items():
        assert name in dict(rules_for(family).tied), family


def begun(directory, overrides=()):
    """(the lines of the log, the head's parameters) of a run that begins with the directory. Called by all ranks."""
    from megatron_embed.config.load import config_of_overrides
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.parallel.topology import initialize

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_embed.loading")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        config = config_of_overrides([f"model.path={directory}", "model.dtype=float32", *overrides])
        chunks = load_model_chunks(find_model(directory), config, initialize(config.parallel), new_weights=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines, {name: parameter.detach().clone() for name, parameter in chunks[-1].head.named_parameters()}


def test_a_run_begins_with_what_there_is_and_names_what_is_new(tmp_path):
    path = changed(sparse_model(tmp_path / "model"), **{f"{TRANSFORM}LayerNorm__weight": None,
                                                        f"{TRANSFORM}dense__weight": None})
    (lines, head), = run_on_ranks(begun, 1, str(path))
    assert lines == [f"{path} has no cls.predictions.transform.dense.weight, cls.predictions.transform.LayerNorm."
                     "weight: new weights take their place in its masked-language-model head"]
    stored = tensors_of(path)
    assert head["bias"].equal(stored["cls.predictions.bias"]) and head["bias"].std() > 0.1
    assert head["dense.bias"].equal(stored["cls.predictions.transform.dense.bias"])
    assert head["norm.weight"].equal(torch.ones(32)) and head["dense.weight"].equal(torch.eye(32))


def test_a_new_head_begins_with_weights_for_few_tokens(tmp_path):
    """Its transform passes states on, and its logits begin 4 lengths of an embedding below 0, in each layout."""
    path = tmp_path / "model"
    shutil.copytree(sparse_model(tmp_path / "source"), path)
    tensors = {name: tensor for name, tensor in tensors_of(path).items() if not name.startswith("cls.")}
    save_file(tensors, path / "model.safetensors")
    hf_to_megatron(path, tmp_path / "checkpoint")
    embeddings = tensors["bert.embeddings.word_embeddings.weight"]
    for ranks, directory in ((1, path), (2, path), (1, tmp_path / "checkpoint")):
        overrides = [f"parallel.tensor_model_parallel_size={ranks}"]
        shares = [head for _, head in run_on_ranks(begun, ranks, str(directory), overrides)]
        assert all(head["dense.weight"].equal(torch.eye(32)) and not head["dense.bias"].any() for head in shares)
        bias = torch.cat([head["bias"] for head in shares])
        assert torch.allclose(bias[: len(embeddings)], -4 * embeddings.norm(dim=1).mean())
        assert len(bias) > len(embeddings) or ranks == 1
        assert not bias[len(embeddings) :].any()


DAMAGED_RERANKERS = {
    "no classifier": (lambda path: changed(encoder(path), classifier__weight=None), ("no classifier.weight,",)),
    "no bias": (lambda path: changed(encoder(path), classifier__bias=None), ("no classifier.bias,",)),
    "no pooler": (lambda path: changed(encoder(path), bert__pooler__dense__weight=None, bert__pooler__dense__bias=None),
                  ("no bert.pooler.dense.weight, bert.pooler.dense.bias,", "random numbers")),
    "saved, nothing": (
        lambda path: changed(saved(encoder(path)), classifier__weight=None, classifier__bias=None,
                             bert__pooler__dense__weight=None, bert__pooler__dense__bias=None),
        ("no classifier.weight, classifier.bias,",)),
    "bias of two axes": (lambda path: changed(encoder(path), classifier__bias=torch.ones(1, 1)), ("shape [1, 1]",)),
    "pooler bias of one": (lambda path: changed(encoder(path), bert__pooler__dense__bias=torch.ones(1)),
                           ("bert.pooler.dense.bias has shape [1]",)),
    "scalar": (lambda path: changed(encoder(path), classifier__weight=torch.tensor(1.0)), ("weight has shape []",)),
    "another width": (lambda path: changed(encoder(path), classifier__weight=torch.ones(1, 8)), ("shape [1, 8]",)),
    "no score": (lambda path: changed(decoder(path), score__weight=None), ("no score.weight,",)),
    "a bias of the score": (lambda path: changed(decoder(path), score__bias=torch.ones(1)), ("holds score.bias",)),
    "no rows": (lambda path: changed(yes_no_reranker(path), lm_head__weight=None), ("no lm_head.weight",)),
    "another matrix": (lambda path: edit(yes_no_reranker(path) / "config.json", tie_word_embeddings=True) or path,
                       ("lm_head.weight is another matrix than model.embed_tokens.weight",)),
    "rows of another width": (lambda path: changed(yes_no_reranker(path), lm_head__weight=torch.ones(600, 1)),
                              ("lm_head.weight has shape [600, 1]",)),
}


def yes_no_reranker(path):
    """A causal language model with a LogitScore."""
    return saved(decoder(path, "Qwen3ForCausalLM"), answers=(300, 301))


def scored(directories):
    """Called by all ranks."""
    return own_scores([(directory, "what is a fox") for directory in directories])


@pytest.mark.parametrize("cases", quick_first(
    DAMAGED_RERANKERS, ["no pooler", "pooler bias of one", "no score", "another matrix"]))
def test_damaged_heads_of_rerankers_are_refused(cases, tmp_path):
    assert_damage_refused(cases, tmp_path, scored)


@pytest.mark.slow
def test_rows_that_equal_the_tied_embeddings_give_the_stock_scores(tmp_path):
    """Other rows of the output matrix do not count."""
    path = yes_no_reranker(tmp_path / "model")
    edit(path / "config.json", tie_word_embeddings=True)
    stored = tensors_of(path)
    stored["lm_head.weight"][[300, 301]] = stored["model.embed_tokens.weight"][[300, 301]]
    changed(path, lm_head__weight=stored["lm_head.weight"])
    ((ours,),) = run_on_ranks(own_scores, 1, [(str(path), "what is a fox")])
    assert ours == pytest.approx(stock_scores(path, "what is a fox").tolist(), abs=1e-5)


def train_and_open(values):
    """Called by all ranks."""
    train(values)
    return opened([values["checkpoint"]["directory"]])


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes", [("bert, untied", {"tp": 2}), ("bert, untied", {"pp": 2}),
                                         ("roberta, untied", {"tp": 2}), ("modernbert, no bias", {"tp": 2}),
                                         ("bert, two biases", {})])
def test_trained_heads_are_exported_as_the_stock_library_reads_them(name, sizes, tmp_path):
    path = (HONOURED | MORE_HONOURED)[name](tmp_path / "model")
    values = configuration(str(path), tmp_path / "run", parallel=layout(**sizes), train_steps=2,
                           objective={"temperature": 2.0, "query_regularizer_weight": 0.01},
                           checkpoint={"export_at_end": str(tmp_path / "export")})
    values["embedding"] = {"head": "sparse"}
    values["data"] |= {"query_max_length": 32, "document_max_length": 32}
    results = run_on_ranks(train_and_open, 2, values)
    assert_stock(results[0][0], tmp_path / "export")
    before, after = tensors_of(path), tensors_of(tmp_path / "export")
    parts = ("decoder.weight", "decoder.bias", "cls.predictions.bias", "head.dense.weight")
    heads = [key for key in before.keys() & after if key.endswith(parts)]
    assert heads and not all(after[key].equal(before[key]) for key in heads), "the head was not trained"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert, untied", "bert, two biases", "modernbert, no bias", "roberta, untied"])
def test_conversions_keep_heads_bit_equal_and_are_used_as_the_stock_library_uses_them(name, tmp_path):
    from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf

    path = (HONOURED | MORE_HONOURED)[name](tmp_path / "model")
    hf_to_megatron(path, tmp_path / "checkpoint")
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(path))
    ((ours,),) = run_on_ranks(opened, 1, [str(tmp_path / "checkpoint")])
    assert_stock(ours, path)


@pytest.mark.slow
def test_a_checkpoint_of_a_damaged_head_is_refused(tmp_path):
    from megatron_embed.convert.convert import hf_to_megatron

    directories = []
    for name in ("qwen3, another matrix", "bert, untied, no matrix"):
        hf_to_megatron(DAMAGED_OTHERS[name][0](tmp_path / name), tmp_path / f"{name} checkpoint")
        directories.append(str(tmp_path / f"{name} checkpoint"))
    (results,) = run_on_ranks(opened, 1, directories)
    assert_all_refused(results, {"matrix": ("lm_head.weight is another matrix",), "none": ("decoder.weight",)})


def with_head(checkpoint, path, tensors):
    """A copy of a checkpoint with a trained head of these tensors."""
    from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter

    shutil.copytree(checkpoint, path, ignore=shutil.ignore_patterns("model"))
    (path / "model").mkdir()
    with DcpReader(checkpoint / "model") as reader, DcpWriter(path / "model") as writer:
        for key in reader.keys():  # noqa: SIM118  a reader is not a mapping
            writer.add(key, reader.read(key))
        for name, tensor in tensors.items():
            writer.add(f"model.head.{name}", tensor)
    return path


@pytest.mark.slow
def test_a_trained_head_that_is_not_the_models_is_refused(tmp_path):
    """Padded rows of the vocabulary are left out; rows that are missing, and other tensors, are not made up."""
    from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf

    model = sparse_model(tmp_path / "model")
    hf_to_megatron(model, tmp_path / "checkpoint")
    stored, prefix = tensors_of(model), "cls.predictions.transform."
    head = {"dense.weight": stored[f"{prefix}dense.weight"], "dense.bias": stored[f"{prefix}dense.bias"],
            "norm.weight": stored[f"{prefix}LayerNorm.weight"], "norm.bias": stored[f"{prefix}LayerNorm.bias"],
            "bias": torch.cat([stored["cls.predictions.bias"], torch.zeros(1)])}
    damaged = {"rows": head | {"bias": torch.ones(300)}, "axes": head | {"dense.bias": torch.ones(1)},
               "one": {"weight": torch.ones(1, 32)}, "norm": {key: head[key] for key in head if key != "norm.bias"}}
    paths = {name: str(with_head(tmp_path / "checkpoint", tmp_path / name, tensors))
             for name, tensors in {"padded": head, **damaged}.items()}
    ((ours, *errors),) = run_on_ranks(opened, 1, list(paths.values()))
    assert_stock(ours, model)
    assert_all_refused(errors, {
        "rows": ("model.head.bias is [300]", "[509]"), "axes": ("model.head.dense.bias is [1]", "[32]"),
        "one": ("no such tensor",), "norm": ("model.head.norm.bias is none",)})
    for name in damaged:
        with pytest.raises(CheckpointError, match=r"model\.head\."):
            megatron_to_hf(paths[name], tmp_path / "export")
        assert not (tmp_path / "export").exists()
    megatron_to_hf(paths["padded"], tmp_path / "export")
    assert_bit_equal(tensors_of(tmp_path / "export"), stored)


@pytest.mark.slow
def test_a_checkpoint_without_the_whole_head_is_not_exported(tmp_path):
    from megatron_embed.convert.convert import hf_to_megatron
    from megatron_embed.export.formats import export_cross_encoder_model
    from megatron_embed.export.verified_write import ExportOptions

    hf_to_megatron(changed(encoder(tmp_path / "model"), bert__pooler__dense__bias=None), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"no classifier \(bert\.pooler\.dense\.bias\)"):
        export_cross_encoder_model(str(tmp_path / "checkpoint"), str(tmp_path / "export"), ExportOptions(compare=False))
    assert not (tmp_path / "export").exists()
