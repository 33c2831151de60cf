"""What a user can get wrong ends in seconds, on every rank alike: exit code 2, one line, file, key, value, remedy."""

import json
import os
import shutil

import pytest
import yaml

from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import (
    assert_refused,
    command,
    line_of,
    model,  # noqa: F401  fixtures
    settings,
)
from tests.helpers.toys import MINI_EN, save_model


@pytest.fixture
def write(tmp_path, model):
    """Writes a configuration with some sections' keys replaced; gives its path."""

    def write(**sections):
        values = settings(model, tmp_path / "run")
        for section, keys in sections.items():
            values.setdefault(section, {}).update(keys)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return str(path)

    return write


def test_unknown_key(write):
    path = write(training={"learning_rat": 1e-4})
    assert_refused(run_on_ranks(command, 1, ["train", path]), f"{path}:{line_of(path, 'learning_rat')}",
                   "training.learning_rat", "did you mean 'learning_rate'?")


def test_wrong_type(write):
    path = write(training={"seed": "x"})
    assert_refused(run_on_ranks(command, 1, ["train", path]), f"{path}:{line_of(path, 'seed')}", "training.seed = 'x'",
                   "expected a whole number")


def test_override_of_wrong_type_and_unknown_override(write):
    path = write()
    assert_refused(run_on_ranks(command, 1, ["train", path, "training.learning_rate=fast"]),
                   "training.learning_rate = 'fast'")
    assert_refused(run_on_ranks(command, 1, ["train", path, "data.shufle=false"]), "data.shufle", "'shuffle'")


def test_missing_data_file_on_two_ranks(write, tmp_path):
    path = write(data={"train": [str(tmp_path / "absent.jsonl")]})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"error: {path}:{line_of(path, 'train')}: data.train = ",
                   str(tmp_path / "absent.jsonl"))


GOOD = json.dumps({"query": "a question", "positive": ["an answer"]})
BAD_ROWS = {
    "not_json": ("{'query': 'a'}", "JSON"),
    "cut_short": (GOOD[:-5], "JSON"),
    "no_object": ('["a", "b"]', "object"),
    "lacks_query": (json.dumps({"positive": ["b"]}), "query"),
    "lacks_positive": (json.dumps({"query": "a"}), "positive"),
    "empty_positives": (json.dumps({"query": "a", "positive": []}), "positive"),
    "empty_positive": (json.dumps({"query": "a", "positive": [""]}), "positive"),
    "number": (json.dumps({"query": 3, "positive": ["b"]}), "query"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_is_named_by_file_and_line(write, tmp_path, kind):
    row, word = BAD_ROWS[kind]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([GOOD, GOOD, row, GOOD]) + "\n")
    path = write(data={"train": [str(rows)]})
    results = run_on_ranks(command, 2 if kind == "lacks_query" else 1, ["train", path])
    assert_refused(results, f"error: {rows}:3: ", word)


@pytest.mark.parametrize("ranks, training, words", [
    (1, {"global_batch_size": 10}, ["training.global_batch_size = 10", "= 4 * 1 = 4", "next valid: 12"]),
    (2, {"global_batch_size": 12}, ["training.global_batch_size = 12", "= 4 * 2 = 8", "next valid: 16"]),
    (1, {"global_batch_size": 4096}, ["training.global_batch_size = 4096", "larger than the 1000 rows"]),
    (1, {"warmup_steps": 2}, ["training.warmup_steps = 2", "2 training steps"]),
    (1, {"warmup_ratio": 0.9}, ["training.warmup_ratio = 0.9", "the 2 steps", "2 training steps"]),
    (1, {"warmup_steps": 1, "warmup_ratio": 0.1}, ["training.warmup_ratio = 0.1", "warmup_steps = 1 is set too"]),
    (1, {"wsd_decay_ratio": 0.2}, ["training.wsd_decay_ratio = 0.2", "has no effect without lr_decay_style: wsd"]),
    (1, {"wsd_decay_ratio": 0.9, "lr_decay_style": "wsd", "warmup_steps": 1},
     ["training.wsd_decay_ratio = 0.9", "more than the 2 training steps"]),
    (1, {"micro_batch_size": 0}, ["training.micro_batch_size = 0", ">= 1"]),
])
def test_batch_sizes_that_do_not_divide(write, ranks, training, words):
    path = write(training=training)
    key = words[0].split(" = ")[0].split(".")[1]
    results = run_on_ranks(command, ranks, ["train", path])
    assert_refused(results, f"{path}:{line_of(path, key)}", *words)


def test_model_directory_that_is_none(write, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    path = write(model={"path": str(empty)})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"error: {path}:{line_of(path, 'path')}: model.path = ",
                   str(empty), "no config.json")
    assert_refused(run_on_ranks(command, 1, ["train", path, f"model.path={tmp_path / 'nowhere'}"]),
                   f"error: command line: model.path = '{tmp_path / 'nowhere'}'", "no such directory")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, ["config.json", "model_type = 'gpt2'", "bert, roberta"]),
    ({"auto_map": {"AutoModel": "m.M"}}, ["auto_map", "never run"]),
    ({"hidden_size": None}, ["config.json"]),
])
def test_model_that_is_not_supported(write, model, tmp_path, change, words):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert_refused(run_on_ranks(command, 1, ["train", write(model={"path": str(other)})]), *words)


def test_model_with_missing_or_damaged_weights(write, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:5000])
    assert_refused(run_on_ranks(command, 2, ["train", write(model={"path": str(other)})]), str(other), "safetensors")
    (other / "model.safetensors").unlink()
    assert_refused(run_on_ranks(command, 1, ["train", write(model={"path": str(other)})]), str(other), "safetensors")


def test_model_without_a_tokenizer(write, model, tmp_path):
    without = shutil.ignore_patterns("tokenizer*", "vocab.txt", "special*")
    other = shutil.copytree(model, tmp_path / "other", ignore=without)
    assert_refused(run_on_ranks(command, 1, ["train", write(model={"path": str(other)})]), str(other), "tokenizer")


@pytest.mark.parametrize("section, key, value, words", [
    ("model", "attention", "te", ["model.attention = 'te' needs a GPU", "use 'auto' or 'sdpa'"]),
    ("optimizer", "cpu_offload", True, ["optimizer.cpu_offload = True", "this machine has no GPU", "set it to false"]),
    ("optimizer", "precision_aware", True, ["optimizer.precision_aware = True needs a GPU", "pip install"])])
def test_what_needs_a_gpu(write, section, key, value, words):
    path = write(**{"model": {"dtype": "bfloat16"}, section: {"dtype": "bfloat16", key: value} if section == "model"
                    else {key: value}})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{path}:{line_of(path, key)}", *words)


@pytest.mark.parametrize("section, key", [("checkpoint", "directory"), ("logging", "directory")])
def test_output_directory_that_cannot_be_written(write, tmp_path, section, key):
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "run")
    path = write(**{section: {key: target}})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{section}.{key} = {target!r}", "cannot be written",
                   f"{path}:{line_of(path, target)}")


def test_export_directory_that_is_in_use(write, tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "model.safetensors").write_text("precious")
    path = write(checkpoint={"export_at_end": str(target)})
    assert_refused(run_on_ranks(command, 1, ["train", path]), "checkpoint.export_at_end", str(target), "exists already")
    assert (target / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("ranks, parallel, words", [
    (2, {"tensor_model_parallel_size": 4}, ["parallel.tensor_model_parallel_size = 4", "world size = 2"]),
    (2, {"context_parallel_size": 3}, ["parallel.context_parallel_size = 3", "world size = 2"]),
    (1, {"virtual_pipeline_model_parallel_size": 2}, ["parallel.virtual_pipeline_model_parallel_size = 2", ">= 2"]),
    (2, {"expert_model_parallel_size": 2}, ["parallel.expert_model_parallel_size = 2", "no experts"]),
    (1, {"pipeline_model_parallel_size": 0}, ["parallel.pipeline_model_parallel_size = 0", "must be >= 1"]),
    (2, {"expert_model_parallel_size": 8},
     ["parallel.expert_model_parallel_size = 8", "world size = 2 is not a multiple", "nearest valid: 2"]),
])
def test_layout_that_the_world_does_not_allow(write, ranks, parallel, words):
    path = write(parallel=parallel)
    assert_refused(run_on_ranks(command, ranks, ["train", path]), f"{path}:{line_of(path, 'parallel_size')}", *words)


@pytest.mark.parametrize("change, parallel, words", [
    ({"num_hidden_layers": 1}, {"pipeline_model_parallel_size": 2},
     ["2 stages, more than the model's 1 layers", "largest valid total: 1"]),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, {"tensor_model_parallel_size": 2}, ["5 attention heads"]),
    ({"intermediate_size": 49}, {"tensor_model_parallel_size": 2}, ["49 MLP width", "nearest valid: 1"]),
    ({}, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
     ["(times virtual size 4)", "8 stages", "4 layers", "largest valid total: 4"]),
])
def test_layout_that_does_not_divide_the_model(write, tmp_path, change, parallel, words):
    other = save_model(tmp_path / "other", "qwen3", tokenizer=True, **change)
    path = write(model={"path": other}, parallel=parallel)
    key = next(iter(parallel))
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"parallel.{key} = 2", *words)


def test_experts_that_cannot_be_divided(write, tmp_path):
    experts = save_experts(tmp_path / "experts", "qwen3_moe")
    config = json.loads((experts / "config.json").read_text())
    (experts / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    path = write(model={"path": str(experts)}, parallel={"expert_model_parallel_size": 2})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{path}:{line_of(path, 'expert_model_parallel_size')}",
                   "parallel.expert_model_parallel_size = 2", "3 experts", "nearest valid: 1")


@pytest.mark.parametrize("training, words", [
    ({"micro_batch_size": 8}, ["training.micro_batch_size = 8 gives 1 micro-batches", "nearest valid: 4"]),
    ({"global_batch_size": 3, "micro_batch_size": 1}, ["training.micro_batch_size = 1 gives 3", "multiple of 2"]),
])
def test_micro_batches_that_do_not_fill_an_interleaved_pipeline(write, training, words):
    path = write(training=training, parallel={"pipeline_model_parallel_size": 2,
                                              "virtual_pipeline_model_parallel_size": 2})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{path}:{line_of(path, 'micro_batch_size')}", *words)


@pytest.mark.parametrize("budget, parallel, objective, words", [
    (40, {}, {}, ["less than max(query_max_length, document_max_length) = max(48, 48)", "nearest valid: 48"]),
    (49, {"context_parallel_size": 2}, {}, ["not a multiple of 4", "nearest valid: 48"]),
    (47, {"tensor_model_parallel_size": 2}, {}, ["less than max", "nearest valid: 48"]),
    (95, {}, {"negatives": "micro_batch"},
     ["query_max_length + (documents of a query in data.train) * document_max_length = 48 + 1 * 48",
      "nearest valid: 96"]),
])
def test_token_budget_that_cannot_hold_what_it_must(write, budget, parallel, objective, words):
    path = write(training={"micro_batch_tokens": budget}, parallel=parallel, objective=objective)
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{path}:{line_of(path, 'micro_batch_tokens')}",
                   f"training.micro_batch_tokens = {budget} is ", *words)


def test_global_batch_that_ranks_cannot_share_under_a_token_budget(write):
    path = write(training={"micro_batch_tokens": 96, "global_batch_size": 7})
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"{path}:{line_of(path, 'global_batch_size')}",
                   "training.global_batch_size = 7", "data_parallel_size = 2; next valid: 8")


def test_length_beyond_the_model(write):
    path = write(data={"document_max_length": 300})
    assert_refused(run_on_ranks(command, 2, ["train", path, "parallel.context_parallel_size=2"]),
                   f"{path}:{line_of(path, 'document_max_length')}", "data.document_max_length = 300", "256 positions")


def test_encode_refusals(model, tmp_path):
    rows, output = tmp_path / "texts.jsonl", str(tmp_path / "vectors.npy")
    rows.write_text('{"text": "one"}\n{"txt": "two"}\n')
    base = ["encode", "--model", model, "--input", str(rows)]
    assert_refused(run_on_ranks(command, 2, [*base, "--output", output]), f"{rows}:2: ", "text")
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert_refused(run_on_ranks(command, 1, [*base, "--output", str(tmp_path / "no" / "v.npy")]), "--output",
                   "directory that exists")
    assert_refused(run_on_ranks(command, 1, [*base, "--output", str(tmp_path / "v.txt")]), "--output", ".npy")
    assert_refused(run_on_ranks(command, 1, [*base, "--output", output, "--max-length", "300"]), "--max-length 300",
                   "256 positions")
    assert_refused(run_on_ranks(command, 2, [*base, "--output", output, "parallel.tensor_model_parallel_size=4"]),
                   "parallel.tensor_model_parallel_size = 4")
    absent = str(tmp_path / "absent.jsonl")
    arguments = ["encode", "--model", model, "--input", absent, "--output", output]
    assert_refused(run_on_ranks(command, 1, arguments), absent)
    assert not os.path.exists(output)


def test_evaluate_refusals(model, tmp_path):
    assert_refused(run_on_ranks(command, 1, ["evaluate", "--model", model, "--data", str(tmp_path)]), str(tmp_path))
    beir = str(MINI_EN.parent / "beir")
    assert_refused(run_on_ranks(command, 2, ["evaluate", "--model", str(tmp_path), "--data", beir]), str(tmp_path),
                   "no config.json")
    assert_refused(run_on_ranks(command, 1, ["evaluate", "--model", model, "--data", beir, "--split", "dev"]), "dev")


def test_convert_refusals(model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    target = str(tmp_path / "target")
    assert_refused(run_on_ranks(command, 1, ["convert", "hf-to-megatron", str(empty), target]), str(empty),
                   "no config.json")
    for extra in ([], ["--format", "sentence-transformers"]):
        assert_refused(run_on_ranks(command, 1, ["convert", "megatron-to-hf", model, target, *extra]), model)
    assert not os.path.exists(target)
