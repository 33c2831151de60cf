"""Rounded vectors through whole commands: `encode`, `evaluate`, a run, its export and its audit."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from megatron_embed.data.records import Record
from megatron_embed.evaluation.stored_vectors import read_ranges
from megatron_embed.evaluation.vector_files import VectorFile
from megatron_embed.export.calibration import sample_documents
from megatron_embed.names import RANGES_FILE
from tests.helpers.commands import evaluated, small_beir  # noqa: F401  a fixture
from tests.helpers.mining_runs import model  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.runs import train


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {row} " + "and more " * (row % 5)}) + "\n"
                            for row in range(30)))
    return str(path)


def encoded(arguments, ranks=1):
    results = run_on_ranks(command, ranks, ["encode", *arguments])
    assert all(code == 0 for code, *_ in results), results[0][2]


def test_encode_writes_codes_and_their_ranges(model, texts, tmp_path):
    arguments = ["--model", str(model), "--input", texts, "--role", "document", "--output"]
    encoded([*arguments, str(tmp_path / "whole.npy")])
    vectors = np.load(tmp_path / "whole.npy")
    for dtype in ("ubinary", "int8"):
        encoded([*arguments, str(tmp_path / f"{dtype}.npy"), "--output-dtype", dtype], ranks=2)
        assert np.array_equal(np.load(tmp_path / f"{dtype}.npy"), quantize_embeddings(vectors, dtype))
    ranges = read_ranges(tmp_path / f"int8.{RANGES_FILE}")
    assert np.array_equal(ranges[vectors.shape[1]], np.stack([vectors.min(axis=0), vectors.max(axis=0)]))
    assert not (tmp_path / f"ubinary.{RANGES_FILE}").exists()
    with pytest.raises(Exception, match="holds codes of vectors .int8., for other programs to search"):
        VectorFile(str(tmp_path / "int8.npy"), "--vectors", similarity="dot")


def test_shards_of_codes_need_ranges(model, texts, tmp_path):
    arguments = ["encode", "--model", str(model), "--input", texts, "--output", str(tmp_path / "shards"),
                 "--output-dtype", "uint8"]
    assert_refused(run_on_ranks(command, 1, arguments), "--output-dtype uint8: shards need ranges", "--ranges")
    assert not (tmp_path / "shards").exists()
    encoded([*arguments[1:5], "--output", str(tmp_path / "some.npy"), "--output-dtype", "int8"])
    ranges = ["--ranges", str(tmp_path / f"some.{RANGES_FILE}")]
    assert run_on_ranks(command, 1, [*arguments, *ranges])[0][0] == 0
    codes, read = np.load(tmp_path / "shards" / "000000.npy"), read_ranges(tmp_path / "shards")
    assert codes.dtype == np.uint8 and np.array_equal(codes - 128, np.load(tmp_path / "some.npy").view(np.uint8))
    assert read.keys() == read_ranges(tmp_path / f"some.{RANGES_FILE}").keys()
    assert_refused(run_on_ranks(command, 1, [*arguments[:-1], "ubinary", *ranges]), "--ranges", "has no effect on")
    (tmp_path / RANGES_FILE).write_text('{"8": [[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]}')
    assert_refused(run_on_ranks(command, 1, [*arguments, "--ranges", str(tmp_path)]), "no ranges of vectors of 32 numb")


def test_evaluate_at_precisions(model, small_beir):
    arguments = ["--model", str(model), "--data", str(small_beir), "--dims", "16", "--precision",
                 "float32,int8,binary,rescore", "--candidates", "12", "--require", "dim_16/rescore/ndcg@10:0"]
    metrics = evaluated(arguments, 2)
    stored = {"int8", "binary", "rescore"}
    assert {name.rpartition("/")[0] for name in metrics} == {
        "", "dim_16", *stored, *(f"dim_16/{precision}" for precision in stored)}
    assert metrics["rescore/recall@100"] < metrics["binary/recall@100"] == 1.0


@pytest.mark.parametrize("arguments, words", [
    (["--precision", "int4"], "'int4' must be some of float32, int8, binary, rescore"),
    (["--precision", "int8,binary, int8"], "--precision: 'int8,binary, int8' names int8 twice; keep one of them"),
    (["--precision", "int8", "--candidates", "5"], "--precision rescore or --reranker"),
])
def test_refusals(model, small_beir, arguments, words):
    ((code, _, err, _),) = run_on_ranks(command, 1, ["evaluate", "--model", str(model), "--data", str(small_beir),
                                                     *arguments])
    assert code == 2 and words in err


@pytest.mark.slow
def test_a_run_exports_its_ranges_and_is_audited(model, texts, small_beir, tmp_path):
    """A run of two ranks, whose export rounds as the run evaluates; a run that begins from it drops the ranges."""
    values = settings(str(model), tmp_path / "run")
    values["embedding"] |= {"precision": ["float32", "int8", "binary", "rescore"], "matryoshka_dims": [32, 16]}
    values["objective"] = {"precision_weights": [1.0, 0.5, 0.5, 0.3], "temperature": 0.1}
    values["evaluation"] = {"retrieval": [str(small_beir)], "best_metric": "dim_16/binary/ndcg@10"}
    values["checkpoint"] |= {"export_at_end": str(tmp_path / "export")}
    first, second = run_on_ranks(train, 2, values)
    names = [f"loss@{dim}{precision}" for dim in (32, 16) for precision in ("", "@int8", "@binary", "@rescore")]
    weights = [1.0, 0.5, 0.5, 0.3] * 2
    assert first["loss"] == second["loss"] == pytest.approx(sum(
        first[name] * weight for name, weight in zip(names, weights, strict=True)), rel=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any({"eval/dim_16/int8/ndcg@10", "eval/rescore/ndcg@10"} <= set(row) for row in rows)
    ranges = read_ranges(tmp_path / "export")
    assert set(ranges) == {32, 16} and RANGES_FILE in (tmp_path / "export" / "README.md").read_text()
    results = run_on_ranks(command, 1, ["audit", str(tmp_path / "run"), "--step", "2"])
    assert results[0][0] == 0, results[0][1] + results[0][2]
    encoded(["--model", str(tmp_path / "export"), "--input", texts, "--role", "document", "--output",
             str(tmp_path / "codes.npy"), "--output-dtype", "int8"])
    stock = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    vectors = stock.encode_document([json.loads(line)["text"] for line in Path(texts).read_text().splitlines()])
    codes = quantize_embeddings(vectors, "int8", ranges=ranges[32]).astype(int)
    assert np.abs(np.load(tmp_path / "codes.npy").astype(int) - codes).max() <= 1
    assert (np.load(tmp_path / "codes.npy") == codes).mean() > 0.99
    values = settings(str(tmp_path / "export"), tmp_path / "next")
    values["checkpoint"] |= {"export_at_end": str(tmp_path / "plain")}
    run_on_ranks(train, 1, values)
    assert (tmp_path / "plain" / "modules.json").is_file() and not (tmp_path / "plain" / RANGES_FILE).exists()


def test_ranges_of_few_rows_are_of_all_their_documents():
    rows = [Record(query="q", positive=(f"a{row}", f"b{row}"), negatives=("c", "c"), instruction=None,
                   source=f"rows.jsonl:{row + 1}") for row in range(3)]
    assert set(sample_documents(rows, 12)) == {f"{name}{row}" for name in "ab" for row in range(3)} | {"c"}
    assert sample_documents(rows, 6) == ["a0", "b0", "b1", "c"]
    assert sample_documents(rows, 2) == ["a0", "b1"]
    assert len(sample_documents(rows, 3)) == 3
