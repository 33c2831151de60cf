"""The comparison of an export is not blind: cut texts, lengths, prompts, settings; a base that cuts on the left."""

import argparse
import json
import logging
import shutil

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer

from megatron_embed.errors import CheckpointError
from megatron_embed.export.embedding import LengthProbes, export_probes, length_probes
from megatron_embed.export.sentence_transformers import export_sentence_transformers, set_right_truncation
from megatron_embed.export.verify import ExpectedSettings
from megatron_embed.loading.model_directory import open_encoder
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import save_model

LENGTH = 24
PROMPTS = {"query": "ask: ", "document": ""}


@pytest.mark.parametrize("limit", [1, 7, 24, 200])
def test_texts_at_the_border(limit):
    probes = length_probes(lambda text: len(text.split()), limit)
    counts = [len(text.split()) for text in probes.texts]
    assert counts[:2] == [limit, limit + 1]
    assert counts[2] > limit + 1


def test_texts_that_cannot_be_made_are_left_out():
    probes = length_probes(lambda text: 10 * len(text.split()), 25)
    assert not probes.fitting
    assert [10 * len(text.split()) for text in probes.too_long] == [60]
    assert probes == LengthProbes(fitting=(), too_long=probes.too_long)


def changed(name, **keys):
    """Damages a directory: other values in one of its files."""
    def spoil(directory):
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return spoil


def without_normalize(directory):
    file = directory / "modules.json"
    modules = json.loads(file.read_text())
    file.write_text(json.dumps([module for module in modules if "Normalize" not in module["type"]]))


DAMAGES = {
    "nothing": (lambda directory: None, ""),
    "cut on the left": (changed("tokenizer_config.json", truncation_side="left"), "makes 24 tokens of "),
    "one token fewer": (changed("sentence_bert_config.json", max_seq_length=LENGTH - 1), "max_seq_length = 23"),
    "one token more": (changed("sentence_bert_config.json", max_seq_length=LENGTH + 1), "max_seq_length = 25"),
    "prompt": (changed("config_sentence_transformers.json", prompts={"query": "ask:", "document": ""}),
               "the prompt 'query' = 'ask:'"),
    "similarity": (changed("config_sentence_transformers.json", similarity_fn_name="dot"),
                   "similarity_fn_name = 'dot'"),
    "widths": (changed("config.json", matryoshka_dimensions=[8]), "matryoshka_dimensions = [8]"),
    "dtype": (changed("config.json", dtype="bfloat16"), "dtype = 'bfloat16'"),
    "length of vectors": (without_normalize, "times as long"),
}


def found_in_damages(model, folder):
    """What the comparison says of each damaged export."""
    encoder, _, _ = open_encoder(argparse.Namespace(model=model, dtype=None, pooling="mean", max_length=LENGTH,
                                                    no_normalize=False, overrides=[]), prompts=True,
                                 given_prompts=PROMPTS)
    probes = export_probes(encoder, ["A short text."], LENGTH)
    expected = ExpectedSettings(prompts=PROMPTS, max_seq_length=LENGTH, similarity="cosine", dtype="float32",
                                matryoshka_dims=(16, 8))
    export = shutil.copytree(model, folder / "export")
    export_sentence_transformers(export, pooling="mean", normalize=True, query_prompt=PROMPTS["query"],
                                 document_prompt=PROMPTS["document"], max_seq_length=LENGTH, embedding_dimension=32)
    changed("config.json", matryoshka_dimensions=[8, 16])(export)
    messages = {}
    for name, (spoil, _) in DAMAGES.items():
        directory = shutil.copytree(export, folder / name.replace(" ", "-"))
        spoil(directory)
        try:
            lines = [probe.compare(directory, expected, 0.9999) for probe in probes]
            messages[name] = "" if all("the same tokens of 3 texts at the maximum length, 24" in line for line in lines
                                    ) else f"compared: {lines}"
        except CheckpointError as error:
            messages[name] = str(error)
    return messages


def test_every_damage_is_seen(tmp_path):
    model = save_model(tmp_path / "bert", "bert", tokenizer=True)
    (messages,) = run_on_ranks(found_in_damages, 1, model, tmp_path)
    for name, (_, words) in DAMAGES.items():
        assert words in messages[name] if words else not messages[name], (name, messages[name])
        assert not words or "the export must not be used" in messages[name]


def test_both_places_that_say_where_a_tokenizer_cuts(tmp_path):
    save_model(tmp_path, "bert", tokenizer=True)
    changed("tokenizer_config.json", truncation_side="left")(tmp_path)
    truncation = {"direction": "Left", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    changed("tokenizer.json", truncation=truncation)(tmp_path)
    set_right_truncation(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["truncation_side"] == "right"
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] == truncation | {"direction": "Right"}


def command_with_its_log(arguments):
    """As `command`, whatever an earlier call in this worker did to the log's handlers."""
    for handler in logging.getLogger().handlers[:]:
        logging.getLogger().removeHandler(handler)
    return command(arguments)


def test_the_export_of_a_base_that_cuts_on_the_left_cuts_as_training_did(tmp_path):
    model = save_model(tmp_path / "bert", "bert", tokenizer=True)
    changed("bert/tokenizer_config.json", truncation_side="left")(tmp_path)
    values = settings(model, tmp_path / "run")
    values["data"] |= {"query_max_length": 12, "document_max_length": LENGTH, "query_prompt": "ask: "}
    values["training"] |= {"train_steps": 1}
    values["checkpoint"] |= {"export_at_end": str(tmp_path / "export")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    ((code, _, err, _),) = run_on_ranks(command_with_its_log, 1, ["train", str(tmp_path / "run.yaml")])
    assert code == 0, err
    assert "document vectors: Sentence Transformers gives the same vectors" in err
    assert "the same tokens of 3 texts at the maximum length, 24 tokens" in err  # the shorter role's: one that fits
    assert "the same tokens of 1 texts at the maximum length, 12 tokens" in err
    resolved = yaml.safe_load((tmp_path / "run" / "step_000001" / "config.yaml").read_text())
    assert resolved["model"]["dtype"] == "float32"
    text = " ".join(f"word{index}" for index in range(60))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    arguments = ["encode", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "texts.jsonl"), "--output",
                 str(tmp_path / "vectors.npy"), "--role", "document"]
    ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
    assert code == 0, err
    stock = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert np.abs(stock.encode_document([text]) - np.load(tmp_path / "vectors.npy")).max() <= 1e-5
    assert np.abs(stock.encode_document([text + " and more"]) - stock.encode_document([text])).max() == 0
