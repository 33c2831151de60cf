"""What a configuration does not set is the model directory's: a second stage changes nothing that is not asked for."""

import dataclasses
import json

import pytest
import yaml

from tests.helpers.foreign_directories_helpers import (
    FLAT,
    change,
    chat,
    left,
    save_directory,
    with_template,
    without_sep,
    write,
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINI_EN, run_config

FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def dot_products(path):
    """Without Normalize, compared by dot product, with prompts, lowercased, cut on the left."""
    return left(save_directory(
        path, normalize=False, pooling="cls", sbert={"max_seq_length": 40, "do_lower_case": True}, settings={
            "prompts": {"query": "query: ", "document": "text: ", "task": "Task: "}, "default_prompt_name": "task",
            "similarity_fn_name": "dot"}))


def chats(path):
    """Last token behind a chat template, with a prompt for queries."""
    return with_template(without_sep(save_directory(
        path, kind="qwen3", pooling="lasttoken", settings={"prompts": {"query": "query: "}},
        sbert=chat("flat", processing_kwargs={"chat_template": {"add_generation_prompt": True}}))), FLAT)


def train(folder, name, model, **data):
    """One step and its export; the export and standard error."""
    values = {"model": {"path": str(model), "dtype": "float32"}, "data": {"train": [str(MINI_EN)], **data},
              "training": {"global_batch_size": 4, "micro_batch_size": 4, "train_steps": 1},
              "checkpoint": {"directory": str(folder / f"{name}-run"), "export_at_end": str(folder / name)},
              "logging": {"tensorboard": False}}
    write(folder / f"{name}.yaml", yaml.safe_dump(values))
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", str(folder / f"{name}.yaml")])
    assert code == 0, err
    return folder / name


def read(directory):
    return {name: json.loads((directory / name).read_text(encoding="utf-8")) for name in FILES}


@pytest.mark.parametrize("save", [dot_products, chats])
def test_two_stages_without_settings_say_what_the_directory_says(tmp_path, save):
    first = train(tmp_path, "first", save(tmp_path / "model"))
    second = train(tmp_path, "second", first)
    assert read(second) == read(first)
    settings, transformer = read(first)["config_sentence_transformers.json"], read(first)["sentence_bert_config.json"]
    tokenizer = json.loads((first / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer.get("truncation_side", "right") == "right"
    if save is dot_products:
        assert settings["prompts"] == {"query": "query: ", "document": "text: ", "task": "Task: "}
        assert (settings["similarity_fn_name"], settings["default_prompt_name"]) == ("dot", "task")
        assert transformer == {"max_seq_length": 40, "do_lower_case": True}
        assert len(read(first)["modules.json"]) == 2
    else:
        assert transformer["modality_config"]["message"]["format"] == "flat"
        assert transformer["max_seq_length"] == 24
        assert transformer["processing_kwargs"] == {"chat_template": {"add_generation_prompt": True}}
        assert (first / "chat_template.jinja").read_text(encoding="utf-8") == FLAT


def inherited(config, directory, checkpoint=None):
    from megatron_embed.loading.model_directory import find_model
    from megatron_embed.run.inherit import inherited

    return inherited(config, find_model(str(directory)), checkpoint)


def with_data(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data),
                               embedding=dataclasses.replace(config.embedding, normalize=None, pooling=None))


def test_what_is_set_stays_and_empty_means_empty(tmp_path):
    path = dot_products(tmp_path / "model")
    config = with_data(run_config(str(path)), query_prompt="", document_max_length=64)
    started = inherited(config, path)
    assert (started.data.query_prompt, started.data.document_prompt) == ("", "text: ")
    assert (started.data.query_max_length, started.data.document_max_length) == (40, 64)
    assert started.embedding.normalize is False
    kept = inherited(dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, normalize=True)), path)
    assert kept.embedding.normalize is True


def test_the_log_says_what_was_taken(tmp_path, caplog):
    path = dot_products(tmp_path / "model")
    with caplog.at_level("INFO", logger="megatron_embed"):
        inherited(with_data(run_config(str(path)), document_max_length=64), path)
    for words in ("data.query_prompt = 'query: '", "data.query_max_length = 40", "embedding.normalize = False",
                  "embedding.pooling = 'cls'", str(path)):
        assert words in caplog.text
    assert "document_max_length" not in caplog.text


@pytest.mark.parametrize(("length", "expansion", "idle"), [(64, 32, True), (16, 32, True), (32, 32, False),
                                                         (None, 32, False), (64, 0, False)])
def test_a_length_of_queries_beside_their_expansion_is_named(tmp_path, caplog, length, expansion, idle):
    path = dot_products(tmp_path / "model")
    config = with_data(run_config(str(path)), query_max_length=length)
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, temperature=1.0),
        embedding=dataclasses.replace(config.embedding, head="multi_vector", query_expansion=expansion))
    inherited(config, path)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == ([f"data.query_max_length = {length}: has no effect, since embedding.query_expansion = 32 brings "
                     "every query to 32 tokens; change that, or remove this"] if idle else [])


@pytest.mark.parametrize(("settings", "lengths", "unit"), [
    ({"normalize": False}, (16, 16), True),  # cosine is said by nobody and is the library's default
    ({"normalize": False, "settings": {"similarity_fn_name": "dot"}}, (16, 16), False),
    ({"settings": {"similarity_fn_name": "dot"}}, (16, 16), True),
    ({"sbert": {"max_seq_length": 30, "query_length": 8}}, (8, 30), True),
    ({"sbert": {"max_seq_length": 100_000}}, (256, 256), True),  # the model's positions
    ({"sbert": {"do_lower_case": False}}, (256, 256), True),  # 512 by default, at most the positions
])
def test_lengths_and_unit_length(tmp_path, settings, lengths, unit):
    path = save_directory(tmp_path / "model", **settings)
    started = inherited(with_data(run_config(str(path))), path)
    assert (started.data.query_max_length, started.data.document_max_length) == lengths
    assert started.embedding.normalize is unit


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path):
    from megatron_embed.config.load import save_resolved

    path = dot_products(tmp_path / "model")
    config = with_data(run_config(str(path)))
    began = inherited(config, path)
    (tmp_path / "step_000001").mkdir()
    save_resolved(began, tmp_path / "step_000001" / "config.yaml")
    change(path / "config_sentence_transformers.json", prompts={"query": "another: "}, similarity_fn_name="cosine",
           default_prompt_name=None)
    assert inherited(config, path) != began
    assert inherited(config, path, tmp_path / "step_000001") == began
