"""The tables of foreign settings files: what passes, what is refused and how; they know the libraries' keys."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from megatron_embed.errors import CheckpointError
from megatron_embed.models.key_table import FileTable, harmless, honoured, nested, refused, shown_value
from megatron_embed.models.known_keys import (
    ADAPTER_CONFIG,
    CONFIG,
    CONFIG_SENTENCE_TRANSFORMERS,
    MODULES,
    NORMALIZE,
    POOLING,
    RERANKER_CONFIG,
    SENTENCE_BERT_CONFIG,
    TABLES,
    TOKENIZER_CONFIG,
    flat_keys,
)

TABLE = FileTable(file="some.json", about="A file.", keys={
    "side": honoured("which side", "left", "right"), "size": honoured("a size"), "note": harmless("a note"),
    "flag": refused("a flag", False, remedy="set it to false"),
    "inner": nested("an object", {"deep": refused("deep", 0)})})
FILE = Path("/models/some.json")


@pytest.mark.parametrize("values", [
    {}, {"side": "left", "size": [1], "note": {"a": 1}, "flag": False}, {"flag": None}, {"inner": None},
    {"inner": {"deep": 0}}, {"new": None}, {"new": []}, {"new": {}}])
def test_passes(values):
    TABLE.check(FILE, values)


@pytest.mark.parametrize(("values", "message"), [
    ({"side": "up"}, "/models/some.json: side = 'up' is not supported: which side; remove the key"),
    ({"side": None}, "side = None is not supported"),
    ({"flag": True}, "flag = True is not supported: a flag; set it to false"),
    ({"flag": 0}, "flag = 0 is not supported"),
    ({"inner": {"deep": False}}, "inner.deep = False is not supported"),
    ({"inner": {"other": 1}}, "inner.other = 1: a key that this version does not know"),
    ({"inner": "text"}, "inner = 'text': must be a JSON object"),
    ({"new": False}, "new = False: a key that this version does not know"),
    ({"new\x1b[31m": "\x1b[31m"}, r"= '\x1b[31m': a key")])
def test_refuses(values, message):
    with pytest.raises(CheckpointError) as error:
        TABLE.check(FILE, values)
    assert message in str(error.value)


def test_an_open_table_passes_other_keys():
    dataclasses.replace(TABLE, closed=False).check(FILE, {"new": 1, "side": "left"})
    assert [table for table in TABLES if not table.closed] == [TOKENIZER_CONFIG, CONFIG, RERANKER_CONFIG]


def test_a_long_value_is_cut():
    assert len(shown_value("a" * 500)) < 100


def parameters(function):
    signature = inspect.signature(function).parameters.values()
    return {value.name for value in signature if value.kind is not value.VAR_KEYWORD} - {"self"}


def test_tables_know_every_key_of_the_installed_libraries():
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    assert {field.name for field in dataclasses.fields(LoraConfig)} <= ADAPTER_CONFIG.keys.keys()
    taken = parameters(inspect.unwrap(Transformer.__init__)) - {"model_name_or_path"}
    assert {*taken, *Transformer.config_keys} <= SENTENCE_BERT_CONFIG.keys.keys()
    assert {*Pooling.config_keys, *Pooling.config_key_renames} <= POOLING.keys.keys()
    assert set(Normalize.config_keys) <= NORMALIZE.keys.keys()
    for method in (SentenceTransformer._parse_model_config, SentenceTransformer._get_model_config):
        for base in SentenceTransformer.__mro__:
            source = inspect.getsource(vars(base)[method.__name__]) if method.__name__ in vars(base) else ""
            for key in ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "__version__"):
                assert f'"{key}"' not in source or key in CONFIG_SENTENCE_TRANSFORMERS.keys
    assert {"idx", "name", "path", "type", "kwargs"} == MODULES.keys.keys()


def test_every_key_says_what_it_does():
    for table in TABLES:
        for name, key in flat_keys(dict(table.keys)).items():
            assert key.about, f"{table.file}: {name}"
