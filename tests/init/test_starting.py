"""Starting configurations: they load, fit the rows, and have the planner's sizes."""

import json

import pytest

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_config
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables
from tests.helpers.toys import MINI_EN, save_model

SMALL = "Qwen/Qwen3-Embedding-0.6B"


def starting(tmp_path, *arguments):
    """(text, configuration) of one call."""
    output = tmp_path / "run.yaml"
    output.unlink(missing_ok=True)
    assert main(["init", *map(str, arguments), "--output", str(output)]) == 0
    return output.read_text(), load_config(str(output), [])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_model_and_data_make_a_configuration_with_planned_sizes(tmp_path):
    text, config = starting(tmp_path, SMALL, MINI_EN)
    assert config.training.micro_batch_tokens and config.training.micro_batch_tokens % 1024 == 0
    assert (config.objective.loss, config.data.num_negatives, config.training.epochs) == ("info_nce", 1, 3)
    assert 900 // config.training.global_batch_size >= 20
    assert "Sizes for 1 x H100" in text and "1,000 rows" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_large_model_gets_a_layout_of_its_gpus(tmp_path):
    text, config = starting(tmp_path, "meta-llama/Llama-3.1-70B", MINI_EN, "--lora", "--gpus", 8)
    assert config.lora.rank == 16 and config.training.learning_rate == 1e-4
    sizes = config.parallel
    assert sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size > 1 and "Sizes for 8 x H100" in text
    assert main(["plan", str(tmp_path / "run.yaml"), "--gpus", "8"]) == 0
    config = starting(tmp_path, "meta-llama/Llama-3.1-70B", MINI_EN)[1]
    assert config.model.quantization == "nf4" and config.lora.rank == 16
    text, _ = starting(tmp_path, "meta-llama/Llama-3.1-70B", MINI_EN, "--gpu", "24gb")
    assert "NO LAYOUT FITS 1 x" in text


def test_rows_decide_the_loss(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [{"text_a": f"a{n}", "text_b": "b", "score": n / 7} for n in range(30)])
    assert starting(tmp_path, SMALL, pairs)[1].objective.loss == "cosent"
    binary = write(tmp_path / "binary.jsonl", [{"text_a": f"a{n}", "text_b": "b", "score": n % 2} for n in range(30)])
    config = starting(tmp_path, SMALL, binary)[1]
    assert (config.objective.loss, config.data.num_negatives) == ("online_contrastive", 0)
    lists = write(tmp_path / "lists.jsonl", [{"query": f"q{n}", "documents": ["a", "b", "c"], "labels": [1, 0, 0]}
                                             for n in range(30)])
    config = starting(tmp_path, SMALL, lists, "--task", "reranker")[1]
    assert (config.task, config.objective.loss, config.data.num_negatives) == ("reranker", "listwise", 2)
    instructed = write(tmp_path / "rows.jsonl", [{"query": f"q{n}", "positive": f"p{n}", "instruction": "find"}
                                                 for n in range(5)])
    config = starting(tmp_path, SMALL, instructed)[1]
    assert "{instruction}" in config.data.query_prompt and config.training.global_batch_size <= 5


def test_what_is_not_here_is_told(tmp_path, capsys):
    text, config = starting(tmp_path, "org/unknown-model", "org/data")
    assert "The model is not on this machine" in text and config.training.micro_batch_size == 8
    for arguments, message in [
            (["init"], "init takes MODEL DATA"), (["init", SMALL], "give the data too"),
            (["init", SMALL, "a.jsonl", "--from", "x"], "init takes MODEL DATA"),
            (["init", SMALL, str(tmp_path / "none.jsonl")], "no such file"),
            (["init", "--from", "python a.py --lr 1", "--lora"], "--task, --lora, --gpus and --columns are for a"),
            (["init", "--from", str(tmp_path / "run.yaml")], "a configuration of megatron-embed already")]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("task, family", [("embedding", "qwen3"), ("reranker", "bert")])
def test_starting_configuration_trains(tmp_path, monkeypatch, task, family):
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model", family, tokenizer=True)
    arguments = ["--lora"] if family == "qwen3" else []
    starting(tmp_path, model, MINI_EN, "--task", task, *arguments)
    limits = ["data.query_max_length=16", "data.document_max_length=16"] if task == "embedding" else [
        "reranker.max_length=128"]
    assert main(["train", "run.yaml", "training.train_steps=2", "training.epochs=null", *limits]) == 0
    assert (tmp_path / "export" / "first").is_dir()
