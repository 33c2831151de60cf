"""The commands on one and two ranks, on real rows: train, resume, encode, evaluate, convert, and what they leave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.helpers.commands import (
    evaluated,
    small_beir,  # noqa: F401  fixtures
)
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import MINI_EN, MINILM, layout, save_model

METRICS = {"step", "loss", "in_batch_accuracy", "positive_similarity", "negative_similarity", "margin",
           "masked_fraction", "negatives_per_query", "grad_norm", "learning_rate", "tokens_per_second",
           "padding_fraction", "step_seconds", "truncated_fraction", "skipped_steps", "tflops_per_rank", "memory_gib",
           "data_wait_seconds",
           "margin_to_mean_negative", "margin_to_hardest_negative", "epoch"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


@pytest.fixture(scope="module")
def trained(model, small_beir, tmp_path_factory):
    """(run directory, export directory, configuration) of three steps on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    run, export = folder / "run", folder / "export"
    values = settings(model, run)
    values["training"] |= {"train_steps": 3, "learning_rate": 1e-3, "micro_batch_size": 2}
    values["data"] |= {"num_negatives": 1, "query_prompt": "query: "}
    values["checkpoint"] |= {"export_at_end": str(export), "keep": 0, "save_every_steps": 2}
    values["evaluation"] = {"retrieval": [str(small_beir)], "every_steps": 2}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    results = run_on_ranks(command, 2, ["train", str(path)])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    assert [out for _, out, *_ in results] == ["", ""]
    return run, export, str(path)


def test_training_leaves_metrics_checkpoints_and_an_export(trained):
    run, export, _ = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line.keys() == METRICS
        assert 0 < line["loss"] < 100
        assert line["grad_norm"] > 0
        assert line["negatives_per_query"] == 15
        assert 0 <= line["padding_fraction"] < 0.05
    evaluations = [line for line in lines if "eval/ndcg@10" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert all(key == "step" or key.startswith("eval/") for key in lines[0])  # before training: no loss
    assert {entry.name for entry in run.iterdir()} >= {"step_000002", "step_000003", "latest", "metrics.jsonl"}
    saved = yaml.safe_load((run / "step_000003" / "config.yaml").read_text())
    assert saved["training"]["train_steps"] == 3
    assert saved["training"]["clip_grad"] == 1.0
    assert (export / "modules.json").is_file()
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "| optimizer steps | 3 |" in card
    assert f"| ndcg@10 | {evaluations[-1]['eval/ndcg@10']:.4f} |" in card


def test_run_checkpoint_and_export_evaluate_to_the_last_score_of_training(trained, small_beir):
    run, export, _ = trained
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    scores = {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}
    assert 0 < scores["ndcg@10"] < 1
    for directory, ranks in ((run, 2), (run / "step_000003", 1), (export, 1)):
        metrics = evaluated(["--model", str(directory), "--data", str(small_beir), "--max-length", "48"], ranks)
        assert metrics.keys() >= {"ndcg@10", "mrr@10", "recall@100", "map"}
        for key, value in scores.items():
            assert metrics[key] == pytest.approx(value, abs=1e-6), key


def test_the_evaluation_before_training_is_that_of_the_model(trained, model, small_beir):
    first = json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[0])
    metrics = evaluated(["--model", model, "--data", str(small_beir), "--max-length", "48", "--pooling", "mean",
                         "--query-prompt", "query: "], 1)
    assert metrics["ndcg@10"] > 0
    for key, value in metrics.items():
        assert first[f"eval/{key}"] == pytest.approx(value, abs=1e-6), key


def test_second_call_only_exports_again(trained, tmp_path):
    run, _, path = trained
    before = (run / "metrics.jsonl").read_text()
    export = str(tmp_path / "again")
    assert run_on_ranks(command, 1, ["train", path, f"checkpoint.export_at_end={export}"])[0][0] == 0
    assert (run / "metrics.jsonl").read_text() == before
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (export, trained[1]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def write_texts(path, count=30):
    rows = [json.loads(line)["query"] for line in MINI_EN.read_text().splitlines()[:count]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return rows


def encoded(arguments, ranks, output):
    results = run_on_ranks(command, ranks, ["encode", *arguments, "--output", str(output)])
    assert all(code == 0 for code, *_ in results), results[0][2]
    assert [entry.name for entry in output.parent.iterdir() if entry.name.endswith(".tmp")] == []
    return np.load(output)


@pytest.mark.parametrize("ranks, parallel", [
    (1, []), (2, []), (2, ["parallel.tensor_model_parallel_size=2"]), (2, ["parallel.pipeline_model_parallel_size=2"]),
    (2, ["parallel.context_parallel_size=2"])], ids=["one", "dp2", "tp2", "pp2", "cp2"])
def test_encoded_texts_are_those_of_sentence_transformers(tmp_path, ranks, parallel):
    texts = write_texts(tmp_path / "texts.jsonl", 31)
    vectors = encoded(["--model", str(MINILM), "--input", str(tmp_path / "texts.jsonl"), *parallel], ranks,
                      tmp_path / "vectors.npy")
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(texts, show_progress_bar=False)
    assert vectors.dtype == np.float32
    assert vectors.shape == (31, 384)
    assert np.abs(vectors - expected).max() <= 1e-5


def test_export_encodes_alike_in_the_stock_library_with_prompts(trained, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl")
    stock = SentenceTransformer(str(trained[1]), device="cpu")
    base = ["--model", str(trained[1]), "--input", str(tmp_path / "texts.jsonl"), "--dtype", "float32"]
    vectors = {}
    for role, encode in (("query", stock.encode_query), ("document", stock.encode_document)):
        vectors[role] = encoded([*base, "--role", role], 1, tmp_path / f"{role}.npy")
        assert np.abs(vectors[role] - encode(texts, show_progress_bar=False)).max() <= 1e-5
    assert np.abs(vectors["query"] - vectors["document"]).max() > 1e-3


def test_options_of_encode(model, tmp_path):
    write_texts(tmp_path / "texts.jsonl", 5)
    base = ["--model", model, "--input", str(tmp_path / "texts.jsonl"), "--pooling", "mean"]
    plain = encoded(base, 1, tmp_path / "plain.npy")
    assert np.abs(np.linalg.norm(plain, axis=1) - 1).max() < 1e-6
    raw = encoded([*base, "--no-normalize"], 1, tmp_path / "raw.npy")
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    assert np.abs(raw / np.linalg.norm(raw, axis=1, keepdims=True) - plain).max() < 1e-6
    cut = encoded([*base, "--max-length", "4"], 1, tmp_path / "cut.npy")
    assert np.abs(cut - plain).max() > 1e-3
    half = encoded([*base, "--dtype", "bfloat16"], 1, tmp_path / "half.npy")
    assert half.dtype == np.float32
    assert 1e-4 < np.abs(half - plain).max() < 0.1
    last = encoded([*base[:-1], "lasttoken"], 1, tmp_path / "last.npy")
    assert np.abs(last - plain).max() > 1e-3


def test_models_are_converted_both_ways(model, tmp_path):
    there, back = tmp_path / "megatron", tmp_path / "hf"
    for arguments in (["hf-to-megatron", model, str(there)], ["megatron-to-hf", str(there), str(back)]):
        ((code, out, err, _),) = run_on_ranks(command, 1, ["convert", *arguments])
        assert code == 0, err
        assert out.strip()
    start, end = load_file(Path(model) / "model.safetensors"), load_file(back / "model.safetensors")
    assert start.keys() == end.keys()
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())


def test_run_becomes_a_sentence_transformers_directory(trained, tmp_path):
    target = tmp_path / "export"
    arguments = ["convert", "megatron-to-hf", str(trained[0]), str(target), "--format", "sentence-transformers"]
    ((code, out, err, _),) = run_on_ranks(command, 1, arguments)
    assert code == 0, err
    assert out.count("cosine") >= 2
    texts = ["a short text", "another"]
    ours, theirs = (SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)
                    for folder in (target, trained[1]))
    assert np.array_equal(ours, theirs)


def test_layouts_of_the_command_line_train_alike(model, tmp_path):
    losses = {}
    for name, ranks, sizes in (("one", 1, layout()), ("tp2", 2, layout(2)), ("pp2", 2, layout(pp=2))):
        values = settings(model, tmp_path / name)
        values["parallel"] = {key: value for key, value in sizes.items() if value is not None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        results = run_on_ranks(command, ranks, ["train", str(tmp_path / f"{name}.yaml")])
        assert [code for code, *_ in results] == [0] * ranks, results[0][2]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["one"][0] != losses["one"][1]
    for name in ("tp2", "pp2"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-4)
