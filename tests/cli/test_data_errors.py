"""Data that fails after the start, on one rank alone: every rank ends alike, with one line that names file and line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.embedding_reference import save_model as save_moe
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.toys import MINI_EN, layout, save_model

BLANK = "\u200b\u200b"
"""Two zero-width blanks, which the tokenizer below drops."""
STRANGE = "ψψψ"
"""Letters that it does not know."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture(scope="module")
def bare(model, tmp_path_factory):
    """The same with a tokenizer that adds no special tokens and drops what it does not know."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("models") / "bare"))
    for name in ("vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    alphabet = {letter: token for token, letter in enumerate("abcdefghijklmnopqrstuvwxyz ,.?0123456789", 1)}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {"|": 0, **alphabet}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "|"}))
    return str(folder)


def write_config(folder, model, **sections):
    values = settings(model, folder / "run")
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def failing(arguments, failing_ranks, step):
    """`command`, where the batch of one step cannot be had on some ranks."""
    import torch.distributed as dist

    from megatron_embed.data.loader import BatchLoader
    from megatron_embed.errors import DataError

    original, rank = BatchLoader.batch, dist.get_rank()

    def batch(self, current):
        if current == step and rank in failing_ranks:
            raise DataError(f"rows.jsonl:{rank}: the file was changed after it was checked; start the run again")
        return original(self, current)

    BatchLoader.batch = batch
    try:
        return command(arguments)
    finally:
        BatchLoader.batch = original


@pytest.mark.parametrize("ranks, sizes, failing_ranks", [
    (2, layout(), {1}), (2, layout(), {0, 1}), (2, layout(2), {1}), (2, layout(pp=2), {0})],
    ids=["dp2", "both", "tp2", "pp2"])
def test_batch_that_one_rank_cannot_read_ends_all_ranks_alike(model, tmp_path, ranks, sizes, failing_ranks):
    path = write_config(tmp_path, model, parallel=sizes, training={"train_steps": 3})
    results = run_on_ranks(failing, ranks, ["train", path], failing_ranks, 1)
    assert_refused(results, f"error: rows.jsonl:{min(failing_ranks)}: the file was changed")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1]


def test_training_rows_without_tokens_are_found_before_the_first_step(bare, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = MINI_EN.read_text().splitlines()[:40]
    for row, text in ((30, BLANK), (33, STRANGE)):
        changed = json.loads(lines[row - 1]) | {"positive": [text]}
        rows.write_text("\n".join([*lines[: row - 1], json.dumps(changed), *lines[row:]]) + "\n")
        path = write_config(tmp_path, bare, data={"train": [str(rows)]})
        assert_refused(run_on_ranks(command, 2, ["train", path]), f"error: {rows}:{row}: the text {text!r}",
                       "no tokens", "remove it")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_encoded_row_without_tokens_is_named_by_file_and_line(bare, tmp_path):
    rows, output = tmp_path / "texts.jsonl", tmp_path / "vectors.npy"
    texts = ["one", "two", "three", "four", STRANGE, "six"]
    rows.write_text("\n\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    arguments = ["encode", "--model", bare, "--input", str(rows), "--output", str(output), "--pooling", "mean"]
    for ranks, parallel in ((1, []), (2, []), (2, ["parallel.pipeline_model_parallel_size=2"])):
        assert_refused(run_on_ranks(command, ranks, [*arguments, *parallel]), f"error: {rows}:9: the text {STRANGE!r}")
    assert list(tmp_path.iterdir()) == [rows]


def write_beir(folder, query, document):
    (folder / "qrels").mkdir(parents=True)
    documents = {"z": "one", "a": document, "m": "three"}
    (folder / "corpus.jsonl").write_text("".join(
        json.dumps({"_id": key, "text": text}) + "\n" for key, text in documents.items()))
    (folder / "queries.jsonl").write_text("".join(
        json.dumps({"_id": key, "text": text}) + "\n" for key, text in (("q0", "one?"), ("q1", "x"), ("q2", query))))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tz\t1\nq2\tz\t1\n")
    return str(folder)


def test_evaluated_text_without_tokens_is_named_by_file_and_line(bare, tmp_path):
    for name, query, document, location in (
            ("a", "two", STRANGE, "corpus.jsonl:2"), ("b", BLANK, "b", "queries.jsonl:3")):
        beir = write_beir(tmp_path / name, query, document)
        arguments = ["evaluate", "--model", bare, "--data", beir, "--pooling", "mean"]
        assert_refused(run_on_ranks(command, 2, arguments), f"error: {beir}/{location}: the text")
        path = write_config(tmp_path, bare, evaluation={"retrieval": [beir]})
        assert_refused(run_on_ranks(command, 2, ["train", path]), f"error: {beir}/{location}: the text")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fewer_texts_than_ranks_with_experts_on_both(tmp_path):
    """A rank without a text of its own still takes part in the other's all-to-all."""
    experts = str(save_moe(tmp_path / "experts", "qwen3_moe"))
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "one"}\n')
    vectors = []
    for ranks, extra in ((1, []), (2, ["parallel.expert_model_parallel_size=2"])):
        output = tmp_path / f"{ranks}.npy"
        results = run_on_ranks(command, ranks, ["encode", "--model", experts, "--input", str(rows), "--output",
                                                str(output), "--pooling", "mean", *extra])
        assert [code for code, *_ in results] == [0] * ranks, results[-1][2]
        vectors.append(np.load(output))
    assert vectors[0].shape[0] == 1
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def encoded(model, texts, overrides):
    """Vectors of the texts, in bins of one or two of them."""
    from megatron_embed.__main__ import build_parser
    from megatron_embed.loading.model_directory import open_encoder

    encoder, _, _ = open_encoder(build_parser().parse_args(
        ["encode", "--model", model, "--pooling", "mean", "--input", "-", "--output", "-", *overrides]), prompts=False)
    encoder.micro_batch_tokens = 24
    return encoder.encode(texts, "document")


def test_ranks_with_fewer_bins_take_part_where_experts_are_split(tmp_path):
    """Experts cut among ranks of different data exchange tokens just as experts that lie on one rank each do."""
    experts = str(save_moe(tmp_path / "experts", "qwen3_moe"))
    texts = ["a text of about twenty tokens that fills a bin of its own for certain " + str(row) for row in range(3)]
    (truth,) = run_on_ranks(encoded, 1, experts, texts, [])
    assert truth.abs().amax(dim=1).min() > 0
    for key in ("expert_model", "expert_tensor"):
        for vectors in run_on_ranks(encoded, 2, experts, texts, [f"parallel.{key}_parallel_size=2"]):
            torch.testing.assert_close(vectors, truth, rtol=1e-5, atol=1e-6)
