"""Multi-vector directories through conversion and back, in Sentence Transformers' layout and in PyLate's."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from transformers import AutoTokenizer

from megatron_embed.convert.convert import hf_to_megatron
from megatron_embed.errors import CheckpointError
from megatron_embed.models.saved_settings import read_saved_settings
from tests.helpers.foreign_directories_helpers import change, save_directory
from tests.helpers.multi_vector_reference import add_token_modules
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.tensor_files import assert_bit_equal, tensors_of

TEXTS = ["The quick brown fox", "jumps over; or: it does not!", "the lazy dog, and over a longer text that follows"]


def vectors_of(directories):
    """Called by all ranks."""
    import megatron_embed

    return {name: {role: megatron_embed.load(directory).encode(TEXTS, role) for role in ("query", "document")}
            for name, directory in directories.items()}


def stock(directory):
    model = MultiVectorEncoder(str(directory), device="cpu")
    return {"query": [row.numpy() for row in model.encode_query(TEXTS, batch_size=1)],
            "document": [row.numpy() for row in model.encode_document(TEXTS, batch_size=1)]}


def assert_close(ours, theirs):
    for role, rows in theirs.items():
        for own, expected in zip(ours[role], rows, strict=True):
            assert own.shape == expected.shape, role
            np.testing.assert_allclose(own, expected, atol=1e-5)


def pylate_directory(path, **settings):
    """A directory as PyLate writes it: prefix tokens in the vocabulary, expansion by mask tokens."""
    add_token_modules(save_directory(path, kind="bert"), "plain")
    for folder in ("2_MultiVectorMask", "3_Normalize"):
        shutil.rmtree(path / folder)
    (path / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"}]))
    dense = json.loads((path / "1_Dense" / "config.json").read_text())
    (path / "1_Dense" / "config.json").write_text(json.dumps(
        {key: dense[key] for key in ("in_features", "out_features", "bias", "activation_function")}
        | {"use_residual": False}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 31, "do_lower_case": False}))
    (path / "config_sentence_transformers.json").write_text(json.dumps({
        "model_type": "ColBERT", "similarity_fn_name": "MaxSim", "prompts": {"query": "", "document": ""},
        "query_prefix": "the", "document_prefix": "[SEP]", "query_length": 20, "document_length": 30,
        "attend_to_expansion_tokens": False, "do_query_expansion": True, "skiplist_words": [",", "!"], **settings}))
    return path


@pytest.mark.slow
def test_directories_there_and_back(tmp_path):
    """Both layouts hold the same model, bit for bit, and both are read here as by the stock library."""
    source = add_token_modules(save_directory(tmp_path / "source", kind="bert"), "colbert")
    change(source / "sentence_bert_config.json", query_expansion={
        "strategy": "fixed", "attend": False, "token": None, "length": 14})
    hf_to_megatron(source, tmp_path / "checkpoint")
    for kind in ("sentence-transformers", "pylate"):
        ((code, out, err, *_),) = run_on_ranks(command, 1, [
            "convert", "megatron-to-hf", str(tmp_path / "checkpoint"), str(tmp_path / kind), "--format", kind])
        assert code == 0, err
        assert out.count("gives the same vectors") == 2
        assert_bit_equal(tensors_of(tmp_path / kind), tensors_of(source))
        weights = load_file(tmp_path / kind / "1_Dense" / "model.safetensors")
        assert_bit_equal(weights, load_file(source / "1_Dense" / "model.safetensors"))
        assert read_saved_settings(tmp_path / kind).vectors == read_saved_settings(source).vectors
    foreign = pylate_directory(tmp_path / "foreign")
    expected = {name: stock(directory) for name, directory in (("source", source), ("foreign", foreign))}
    (ours,) = run_on_ranks(vectors_of, 1, {name: str(tmp_path / name) for name in (
        "source", "sentence-transformers", "pylate", "foreign")})
    for name in ("source", "sentence-transformers", "pylate"):
        assert_close(ours[name], expected["source"])
    assert_close(ours["foreign"], expected["foreign"])
    hf_to_megatron(tmp_path / "pylate", tmp_path / "again")
    assert_bit_equal(tensors_of(tmp_path / "again" / "hf"), tensors_of(tmp_path / "checkpoint" / "hf"))


ENCODE_IN_PYLATE = """
import json, sys
from pylate import models

texts, names = json.loads(sys.stdin.read())
found = {}
for name, directory in names.items():
    model = models.ColBERT(directory, device="cpu")
    found[name] = {role: [row.tolist() for row in model.encode(texts, is_query=role == "query", batch_size=1,
                                                               show_progress_bar=False)]
                   for role in ("query", "document")}
    model.save(directory + "-saved")
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif("PYLATE_PYTHON" not in os.environ, reason="PyLate has an environment of its own: "
                    "docs/multi_vector.md")
def test_pylate_itself_reads_an_export_and_its_directories_are_read(tmp_path):
    """The second directory's query prefix is a word, which PyLate makes a token of its own before it saves."""
    source = add_token_modules(save_directory(tmp_path / "source", kind="bert"), "colbert")
    change(source / "sentence_bert_config.json", query_expansion={
        "strategy": "fixed", "attend": False, "token": None, "length": 14})
    hf_to_megatron(source, tmp_path / "checkpoint")
    ((code, _, err, *_),) = run_on_ranks(command, 1, [
        "convert", "megatron-to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "pylate"), "--format", "pylate"])
    assert code == 0, err
    directories = {"pylate": str(tmp_path / "pylate"), "foreign": str(pylate_directory(tmp_path / "foreign"))}
    finished = subprocess.run([os.environ["PYLATE_PYTHON"], "-c", ENCODE_IN_PYLATE], text=True, capture_output=True,
                              input=json.dumps([TEXTS, directories]), check=False, timeout=600,
                              env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert finished.returncode == 0, finished.stderr
    theirs = json.loads(finished.stdout.splitlines()[-1])
    read = {"pylate": directories["pylate"], **{f"{name}-saved": f"{at}-saved" for name, at in directories.items()}}
    (ours,) = run_on_ranks(vectors_of, 1, read)
    for name in read:
        expected = theirs[name.removesuffix("-saved")]
        assert_close(ours[name], {role: [np.array(row) for row in rows] for role, rows in expected.items()})


REFUSED = {
    "without a mask": (lambda path: (path / "config_sentence_transformers.json").write_text(
        '{"model_type": "SentenceTransformer"}'), ["MultiVectorEncoder"]),
    "tasks": (lambda path: change(path / "2_MultiVectorMask" / "config.json", skiplist_tasks=["page"]),
              ["2_MultiVectorMask/config.json", "skiplist_tasks = ['page']"]),
    "words": (lambda path: change(path / "2_MultiVectorMask" / "config.json", skiplist_words="abc"),
              ["skiplist_words = 'abc'", "list"]),
    "only": (lambda path: change(path / "2_MultiVectorMask" / "config.json", keep_only_token_ids=[3]),
             ["keep_only_token_ids = [3]", "not supported"]),
    "text": (lambda path: change(path / "1_Dense" / "config.json", module_input_name="sentence_embedding"),
             ["1_Dense/config.json", "module_input_name"]),
    "length": (lambda path: change(path / "sentence_bert_config.json", query_expansion={
        "strategy": "fixed", "length": 0}), ["query_expansion.length = 0"]),
    "similarity": (lambda path: change(path / "config_sentence_transformers.json", similarity_fn_name="meanmaxsim"),
                   ["similarity_fn_name = 'meanmaxsim'", "maxsim"]),
}


def test_stanford_s_layout_names_its_remedy(tmp_path):
    path = save_directory(tmp_path / "model", kind="bert")
    change(path / "config.json", architectures=["HF_ColBERT"])
    (path / "modules.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"Stanford's ColBERT.*MultiVectorEncoder\(.*save_pretrained"):
        read_saved_settings(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(tmp_path, name):
    path = add_token_modules(save_directory(tmp_path / "model", kind="bert"), "colbert")
    damage, words = REFUSED[name]
    damage(path)
    with pytest.raises(CheckpointError) as error:
        read_saved_settings(path)
    for word in words:
        assert word in str(error.value)


def test_a_prefix_token_stays_whole(tmp_path):
    """As ColBERT's [unused0]: a token of the vocabulary that the tokenizer would split."""
    from megatron_embed.data.token_vectors import keep_prompts_whole

    path = save_directory(tmp_path / "model", kind="bert")
    tokenizer = AutoTokenizer.from_pretrained(path)
    token = next((name for name in tokenizer.get_vocab() if name.startswith("[unused")), None)
    if token is None:
        pytest.skip("this vocabulary has no unused tokens")
    assert tokenizer.tokenize(token) != [token]
    assert keep_prompts_whole(tokenizer, [f"{token} ", "query: "])
    assert tokenizer.tokenize(f"{token} a") == [token, "a"]
    assert not keep_prompts_whole(tokenizer, [f"{token} ", "query: "])
