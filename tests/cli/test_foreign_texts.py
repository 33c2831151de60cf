"""Lengths, prompts and expanded queries of foreign directories: the stock library's token ids, or a refusal."""

import argparse
import json
import shutil

import pytest
from sentence_transformers import MultiVectorEncoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_embed.data.load_tokenizer import load_tokenizer
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.loading.model_directory import find_model, open_role_tokenizer
from megatron_embed.mining.mine import query_prompts
from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.foreign_directories_helpers import change, save_directory, write
from tests.helpers.multi_vector_reference import add_token_modules

TEXTS = ["The quick brown fox", "a b !", "x", "a longer text, which goes on and on until it is cut! a b c d e f g h i"]
PYLATE = {"model_type": "ColBERT", "similarity_fn_name": "MaxSim", "prompts": {"query": "", "document": ""}}
OF_ALL = {"query_prefix": "the", "document_prefix": "a", "query_length": 12, "document_length": 20,
          "do_query_expansion": True, "attend_to_expansion_tokens": False, "skiplist_words": ["!", "a"]}


def of_tokens(path, **settings):
    """A MultiVectorEncoder that skips words and expands queries, with other settings of its Transformer."""
    add_token_modules(save_directory(path), "colbert")
    write(path / "2_MultiVectorMask" / "config.json", {"skiplist_words": ["a", "!", "."]})
    change(path / "sentence_bert_config.json", **settings)
    return path


def masked(path, **settings):
    change(of_tokens(path) / "2_MultiVectorMask" / "config.json", **settings)
    return path


def pylate(path, settings, **of_transformer):
    """The same in PyLate's files."""
    add_token_modules(save_directory(path), "plain")
    for folder in ("2_MultiVectorMask", "3_Normalize"):
        shutil.rmtree(path / folder)
    modules = json.loads((path / "modules.json").read_text())[:2]
    write(path / "modules.json", [modules[0], modules[1] | {"type": "pylate.models.Dense.Dense"}])
    dense = json.loads((path / "1_Dense" / "config.json").read_text())
    write(path / "1_Dense" / "config.json", {key: value for key, value in dense.items() if "module" not in key})
    write(path / "config_sentence_transformers.json", PYLATE | settings)
    write(path / "sentence_bert_config.json", {"max_seq_length": 24, **of_transformer})
    return path


def expansion(strategy, length, *, attend=False):
    return {"strategy": strategy, "attend": attend, "token": None, "length": length}


HONOURED = {
    "no-task-skips": lambda path: masked(path, skiplist_tasks=[]),
    "one-task": lambda path: masked(path, skiplist_tasks="query"),
    "null-task": lambda path: masked(path, skiplist_tasks=None),
    "cut-by-the-model": lambda path: of_tokens(path, max_seq_length=16, query_expansion=expansion("min", 20)),
    "cut-by-the-call": lambda path: of_tokens(path, query_expansion=expansion("min", 8, attend=True),
                                              processing_kwargs={"text": {"max_length": 5}}),
    "cut-by-the-role": lambda path: of_tokens(path, query_expansion=expansion("min", 8), query_length=12),
    "fixed": lambda path: of_tokens(path, query_expansion=expansion("fixed", 8),
                                    processing_kwargs={"text": {"max_length": 5}}),
    "pylate": lambda path: pylate(path, OF_ALL),
    "pylate-none-of-its-keys": lambda path: pylate(path, {}),
    "pylate-one-null": lambda path: pylate(path, {"query_prefix": None}),
    "pylate-not-expanded": lambda path: pylate(path, OF_ALL | {"do_query_expansion": False}),
    "pylate-transformer-first": lambda path: pylate(path, OF_ALL, query_expansion=expansion("min", 6, attend=True),
                                                    document_length=7),
    "pylate-transformer-null": lambda path: pylate(path, OF_ALL, query_expansion=None, document_length=None),
}


def stock_tokens(model, role):
    """(ids without padding, which of them give a vector, how many attention sees) of each text."""
    rows = []
    for text in TEXTS:
        features = model.preprocess([text], prompt=model.prompts.get(role), task=role)
        seen = int(features["attention_mask"].sum())
        mask = next(module for module in model if "MultiVectorMask" in type(module).__name__)
        kept = mask.forward(dict(features), task=role)["attention_mask"][0]
        used = int((features["attention_mask"] | features.get("query_expansion_positions", kept).int()).sum())
        rows.append((features["input_ids"][0, :used].tolist(), kept[:used].tolist(), seen))
    return rows


def our_tokens(path, role):
    tokenizer = open_role_tokenizer(find_model(str(path)), pooling="tokens", max_length=None, prompts=True)
    rows = tokenizer.tokenize(TEXTS, role)
    seen = rows.key_lengths or [len(ids) for ids in rows.token_ids]
    return [(ids, kept, length) for ids, kept, length in zip(rows.token_ids, rows.kept, seen, strict=True)]


QUICK = ("no-task-skips", "cut-by-the-model", "pylate-none-of-its-keys", "pylate-transformer-first")


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HONOURED])
def test_tokens_of_a_multi_vector_model_are_the_stock_library_s(tmp_path, name):
    path = HONOURED[name](tmp_path / "model")
    model = MultiVectorEncoder(str(path), device="cpu")
    for role in ("query", "document"):
        assert our_tokens(path, role) == stock_tokens(model, role), role


REFUSED = {
    "normalizes-nothing": (lambda path: write(of_tokens(path) / "3_Normalize" / "config.json", {}) or path,
                           "3_Normalize/config.json: without module_input_name"),
    "shorter": (lambda path: of_tokens(path, query_length=6, query_expansion=expansion("min", 8)),
                "query_length = 6 is shorter than query_expansion.length = 8"),
    "pylate-shorter": (lambda path: pylate(path, OF_ALL, query_length=5), "query_length = 5 is shorter"),
    "no-strategy": (lambda path: of_tokens(path, query_expansion={"length": 8}), "has no strategy"),
    "null-of-pylate": (lambda path: change(of_tokens(path) / "config_sentence_transformers.json", query_length=None)
                       or path, "query_length = None: a key of PyLate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_another_effect_or_none_in_the_stock_library_is_refused(tmp_path, name):
    save, words = REFUSED[name]
    save(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        read_saved_settings(tmp_path / "model")
    assert words in str(error.value)


@pytest.mark.parametrize("include", [False, None])
def test_a_prompt_from_anywhere_is_refused_where_the_pooling_leaves_it_out(tmp_path, include):

    path = save_directory(tmp_path / "model", pooling={
        "word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "include_prompt": include})
    model = find_model(str(path))
    message = r"include_prompt = false in its pooling is not supported together with a query prompt, 'look: '"
    arguments = {"pooling": "mean", "max_length": None, "prompts": True}
    with pytest.raises(ConfigError, match=message):
        open_role_tokenizer(model, **arguments, given_prompts={"query": "look: "})
    tokenizer = open_role_tokenizer(model, **arguments)
    tokenizer.tokenize(TEXTS, "query")
    with pytest.raises(ConfigError, match=message):
        tokenizer.tokenize(TEXTS, "query", prompts=[None, None, "look: ", None])
    with pytest.raises(ConfigError, match=r"^--query-prompt 'look: ': include_prompt = false"):
        query_prompts(argparse.Namespace(model=str(path), query_prompt="look: "), [])


def test_a_length_and_a_value_of_config_json_are_named_by_their_files(tmp_path):

    model = find_model(str(save_directory(tmp_path / "model", sbert={"max_seq_length": 2})))
    arguments = {"pooling": "mean", "prompts": True}
    with pytest.raises(ConfigError, match=r"sentence_bert_config\.json: max_seq_length = 2 tokens: .* raise it"):
        open_role_tokenizer(model, **arguments, max_length=None)
    with pytest.raises(ConfigError, match=r"^--max-length = 2 tokens"):
        open_role_tokenizer(model, **arguments, max_length=2)
    change(tmp_path / "model" / "config.json", hidden_dropout_prob="some")
    with pytest.raises(CheckpointError, match=r"config\.json: Transformers cannot read it: .*dropout_prob.*'some'"):
        load_tokenizer(str(tmp_path / "model"), None)


@pytest.mark.parametrize("model", [models.WordPiece({"a": 0, "b": 1}, unk_token="[UNK]"),
                                   models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"),
                                   models.Unigram([("a", -1.0), ("b", -1.0), ("▁", -1.0)]),
                                   models.BPE({"a": 0, "b": 1}, [], unk_token="[UNK]")],
                         ids=lambda model: type(model).__name__)
def test_a_tokenizer_without_its_unknown_token_is_refused_before_a_text_has_one(tmp_path, model):
    """It raises a bare Exception at the first word that it lacks; "a b", which is tried first, has none."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"characters that its vocabulary lacks \(.*\): its unknown token"):
        load_tokenizer(str(tmp_path), None)
