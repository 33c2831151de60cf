"""Broken model directories and impossible lengths are named by the option or setting that the user wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, line_of, settings
from tests.helpers.toys import MINI_EN, MINILM, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "' + "word " * 60 + '"}\n')
    return str(tmp_path / "texts.jsonl")


def encode(model, texts, *options):
    output = str(Path(texts).with_name("v.npy"))
    return ["encode", "--model", str(model), "--input", texts, "--output", output, *options]


def config_file(folder, model, **sections):
    values = settings(model, folder / "run")
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def test_options_of_encode_are_called_as_they_are_written(model, texts):
    assert_refused(run_on_ranks(command, 2, encode("nope", texts)), "error: --model = 'nope': no such directory")
    assert_refused(run_on_ranks(command, 1, encode(MINILM, texts, "--max-length", "2")),
                   "error: --max-length = 2 tokens", "raise it")
    assert_refused(run_on_ranks(command, 1, encode(texts, texts)), f"error: --model = {texts!r}: a file")
    assert_refused(run_on_ranks(command, 1, encode("", texts)), "--model", "empty")


def test_a_relative_path_that_is_no_directory_is_said_to_be_neither(model, texts, tmp_path):
    path = config_file(tmp_path, "models/absent")
    assert_refused(run_on_ranks(command, 1, ["train", path]),
                   f"error: {path}:{line_of(path, 'models/absent')}: model.path = 'models/absent': no such directory, "
                   "and as a hub name it could not be fetched", "correct the path")


BROKEN = {
    "cut": ("config.json", '{"model_type": "qwen', ["config.json", "not readable as JSON", "again"]),
    "list": ("config.json", "[]", ["config.json", "JSON object"]),
    "family": ("config.json", {"model_type": "gpt2"}, ["config.json", "model_type = 'gpt2'", "bert, roberta"]),
    "no_family": ("config.json", {"model_type": None}, ["config.json", "model_type"]),
    "text": ("config.json", {"num_attention_heads": "four"}, ["config.json", "num_attention_heads", "again"]),
    "zero": ("config.json", {"hidden_size": 0}, ["config.json", "hidden_size = 0", "again"]),
    "rope": ("config.json", {"rope_parameters": [1]}, ["config.json", "again"]),
    "modules": ("modules.json", '{"a": 1}', ["modules.json", "list of modules"]),
    "tokenizer": ("tokenizer.json", "{", ["tokenizer cannot be loaded", "copy tokenizer.json"]),
    "tokenizer_value": ("tokenizer_config.json", '{"model_max_length": []}', ["tokenizer cannot be loaded"]),
    "weights": ("model.safetensors", "x", ["model.safetensors"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_of_a_model(model, texts, tmp_path, kind):
    name, content, words = BROKEN[kind]
    broken = shutil.copytree(model, tmp_path / "broken")
    if isinstance(content, dict):
        content = json.dumps(json.loads((broken / name).read_text()) | content)
    (broken / name).write_text(content)
    path = config_file(tmp_path, str(broken))
    assert_refused(run_on_ranks(command, 1, ["train", path]),
                   f"error: {path}:{line_of(path, str(broken))}: model.path = {str(broken)!r}: ", *words)
    assert_refused(run_on_ranks(command, 1, encode(broken, texts)), f"error: --model = {str(broken)!r}: ", *words)


def test_a_checkpoint_keeps_the_length_of_each_role(model, texts, tmp_path):
    """Encoding with a role cuts as training did; the settings of the old single number would differ."""
    path = config_file(tmp_path, model, data={"query_max_length": 8, "document_max_length": 32},
                       training={"train_steps": 1})
    assert run_on_ranks(command, 1, ["train", path])[0][0] == 0
    vectors = {}
    for name, options in (("query", ["--role", "query"]), ("document", ["--role", "document"]), ("plain", []),
                          ("8", ["--max-length", "8"]), ("32", ["--max-length", "32"])):
        ((code, _, err, _),) = run_on_ranks(command, 1, encode(tmp_path / "run", texts, *options))
        assert code == 0, err
        vectors[name] = np.load(tmp_path / "v.npy")[1]
    assert np.abs(vectors["8"] - vectors["32"]).max() > 1e-3
    for name, length in (("query", "8"), ("document", "32"), ("plain", "32")):
        assert np.array_equal(vectors[name], vectors[length]), name
    arguments = ["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "st"), "--format",
                 "sentence-transformers"]
    ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
    assert code == 0, err
    assert json.loads((tmp_path / "st" / "sentence_bert_config.json").read_text())["max_seq_length"] == 32


def train_at_home(arguments, home):
    import os

    os.environ["HOME"] = home
    return command(arguments)


def test_the_home_directory_is_written_out_in_paths(model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(model, home / "model")
    shutil.copy(MINI_EN, home / "rows.jsonl")
    path = config_file(tmp_path, "~/model", data={"train": ["~/rows.jsonl"]}, training={"train_steps": 1},
                       checkpoint={"directory": "~/run", "export_at_end": "~/export"}, logging={"directory": "~/log"})
    ((code, _, err, _),) = run_on_ranks(train_at_home, 1, ["train", path], str(home))
    assert code == 0, err
    assert (home / "export" / "modules.json").is_file()
    assert (home / "log" / "metrics.jsonl").is_file()
    assert (home / "run" / "latest").is_file()
    arguments = ["convert", "megatron-to-hf", "~/run", "~/hf"]
    assert run_on_ranks(train_at_home, 1, arguments, str(home))[0][0] == 0
    assert (home / "hf" / "config.json").is_file()
