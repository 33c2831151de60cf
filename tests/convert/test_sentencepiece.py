"""From a directory whose only tokenizer file is a sentencepiece `tokenizer.model` to an export."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_embed.data.tokenizer import RoleTokenizer
from tests.helpers.families import save_family
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.tensor_files import edit_config
from tests.helpers.toys import MINI_EN

VOCABULARY = 400
TEXTS = ("What is the capital of France?", "  two  spaces", "深度学习")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama model whose config.json has pad_token_id = -1, as Llama 1 had."""
    directory = tmp_path_factory.mktemp("sentencepiece") / "llama"
    save_family(directory, "Llama 2", vocab_size=VOCABULARY)
    edit_config(directory, pad_token_id=-1)
    lines = [json.loads(line)["query"] for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=VOCABULARY, model_type="bpe",
        byte_fallback=True, minloglevel=2)
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    return directory


def test_tokens_are_those_of_transformers(model):
    expected = AutoTokenizer.from_pretrained(model)
    tokenizer = RoleTokenizer(str(model), add_eos=True, query_max_length=64, document_max_length=64)
    token_ids = tokenizer.tokenize(TEXTS, "query").token_ids
    assert min(map(len, token_ids)) > 2
    assert token_ids == [[*expected(text).input_ids, 2] for text in TEXTS]
    assert 0 <= tokenizer.pad_token_id < VOCABULARY


@pytest.mark.parametrize("asked", [True, False])
def test_it_is_exported_with_the_end_that_the_directory_asks_for(model, tmp_path, asked):
    source, megatron, export = shutil.copytree(model, tmp_path / "hf"), tmp_path / "megatron", tmp_path / "export"
    file = source / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**values, "add_eos_token": asked}), encoding="utf-8")
    for arguments in (["hf-to-megatron", str(source), str(megatron)],
                      ["megatron-to-hf", str(megatron), str(export), "--format", "sentence-transformers"]):
        ((code, _, err, _),) = run_on_ranks(command, 1, ["convert", *arguments])
        assert code == 0, err
    plain, exported = (AutoTokenizer.from_pretrained(directory) for directory in (model, export))
    for text in TEXTS:
        assert exported(text).input_ids == [*plain(text).input_ids, *([2] if asked else [])]
    assert exported.pad_token_id == 2
    assert (Path(export) / "tokenizer.model").is_file()
