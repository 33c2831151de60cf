"""A LoRA run from the command line: train, resume, PEFT's files both ways, the merged model, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tests.helpers.adapter_reference import write_adapter
from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.runs import curve, go_back
from tests.helpers.toys import MINI_EN, save_model

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
TEXTS = [json.loads(line)["query"] for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:12]]


def call(*arguments, ranks=1):
    """Standard output of a command that must succeed."""
    results = run_on_ranks(command, ranks, [str(argument) for argument in arguments])
    assert all(code == 0 for code, *_ in results), results[0][2]
    return results[0][1]


def encode(model, folder, *arguments):
    """[texts, dim] float32."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    call("encode", "--model", model, "--input", folder / "texts.jsonl", "--output", folder / "vectors.npy", *arguments)
    return np.load(folder / "vectors.npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def configuration(model, run, **lora):
    values = settings(model, run)
    values["lora"] = {"rank": 4, "alpha": 16, "target_modules": TARGETS, **lora}
    values["training"] |= {"train_steps": 4, "learning_rate": 2e-2, "recompute": "full", "micro_batch_size": 2}
    values["checkpoint"] |= {"save_every_steps": 2, "keep": 0}
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """(run directory, its export) of four steps on two tensor-parallel ranks, with dropout."""
    folder = tmp_path_factory.mktemp("runs")
    path = configuration(model, folder / "run", dropout=0.1)
    call("train", path, f"checkpoint.export_at_end={folder / 'export'}", "parallel.tensor_model_parallel_size=2",
         ranks=2)
    return folder / "run", folder / "export"


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """The run's adapter in PEFT's format."""
    target = tmp_path_factory.mktemp("peft") / "adapter"
    call("convert", "megatron-to-hf", trained[0], target, "--format", "peft")
    return target


def test_peft_gives_our_vectors(model, trained, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    ours = encode(trained[0], tmp_path)
    before = encode(model, tmp_path, "--pooling", "mean")
    assert np.abs(ours - before).max() > 0.01, "nothing was learned, so nothing is shown"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 4 * len(TARGETS) * 2
    assert all(tensor.any() for tensor in tensors.values())
    peft, tokenizer = PeftModel.from_pretrained(AutoModel.from_pretrained(model), str(adapter)).eval(), (
        AutoTokenizer.from_pretrained(adapter))
    with torch.no_grad():
        states = [peft(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    theirs = torch.nn.functional.normalize(torch.stack([state.mean(dim=0) for state in states]), dim=1)
    assert np.abs(theirs.numpy() - ours).max() <= 1e-5
    assert np.abs(encode(adapter, tmp_path) - ours).max() <= 1e-6
    assert np.abs(SentenceTransformer(str(adapter)).encode(TEXTS) - ours).max() <= 1e-5


def test_merged_equals_unmerged(model, trained, tmp_path):
    run, export = trained
    ours = encode(run, tmp_path)
    assert np.abs(SentenceTransformer(str(export)).encode(TEXTS) - ours).max() <= 1e-5
    call("convert", "megatron-to-hf", run, tmp_path / "merged", "--merge-lora")
    call("convert", "megatron-to-hf", run, tmp_path / "st", "--merge-lora", "--format", "sentence-transformers")
    assert np.abs(encode(tmp_path / "merged", tmp_path, "--pooling", "mean") - ours).max() <= 1e-5
    start, merged = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert start.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, start[name]) != any(f".{target}." in name for target in TARGETS), name
        assert torch.equal(tensor, load_file(export / "model.safetensors")[name])
        assert torch.equal(tensor, load_file(tmp_path / "st" / "model.safetensors")[name])


def test_merge_is_the_formula_rounded_once(model, trained, adapter, tmp_path):
    call("convert", "megatron-to-hf", trained[0], tmp_path / "merged", "--merge-lora")
    start, merged = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in (name for name in tensors if ".lora_A." in name):
        weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        change = 16 / 4 * tensors[name.replace("_A.", "_B.")].double() @ tensors[name].double()
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(merged[weight].double(), start[weight].double() + change, rtol=1e-6, atol=1e-7)


def test_resumed_run_repeats_the_curve_and_goes_on_at_another_layout(model, trained, tmp_path):
    expected = curve(trained[0])
    assert len(set(expected)) == 4
    resumed = go_back(trained[0], tmp_path / "run", 2)
    path = configuration(model, resumed, dropout=0.1)
    call("train", path, "parallel.tensor_model_parallel_size=2", ranks=2)
    assert curve(resumed) == expected
    undropped = configuration(model, tmp_path / "plain")
    call("train", undropped)
    moved = go_back(tmp_path / "plain", tmp_path / "moved", 2)
    call("train", configuration(model, moved), "parallel.pipeline_model_parallel_size=2", ranks=2)
    torch.testing.assert_close(torch.tensor(curve(moved)), torch.tensor(curve(tmp_path / "plain")), rtol=1e-4,
                               atol=1e-4)


def test_training_goes_on_from_a_peft_directory(model, adapter, tmp_path):
    values = yaml.safe_load(configuration(model, tmp_path / "run").read_text())
    del values["lora"]
    values["model"]["path"] = str(adapter)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    call("train", tmp_path / "run.yaml", "training.train_steps=1", "training.learning_rate=1.0e-30",
         "training.weight_decay=0")
    call("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "again", "--format", "peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    one, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "again"))
    assert (one.pop("lora_dropout"), other.pop("lora_dropout")) == (0.1, 0.0), "each as its run trained"
    assert one == other
    assert one["base_model_name_or_path"] == str(Path(model).resolve())
    assert sorted(one["target_modules"]) == sorted(TARGETS)


def test_experts_from_a_peft_directory_and_back(tmp_path):
    """Through a checkpoint of a run on two expert-parallel ranks."""
    base = save_experts(tmp_path / "moe", "qwen3_moe")
    adapter = write_adapter(tmp_path / "adapter", base)
    values = yaml.safe_load(configuration(str(base), tmp_path / "run").read_text())
    del values["lora"]
    values["model"]["path"] = str(adapter)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    call("train", tmp_path / "run.yaml", "training.train_steps=1", "training.learning_rate=1.0e-30",
         "training.weight_decay=0", "parallel.expert_model_parallel_size=2", ranks=2)
    call("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "again", "--format", "peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    call("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "merged", "--merge-lora")
    ours = encode(tmp_path / "again", tmp_path, "--pooling", "mean")
    assert np.abs(encode(tmp_path / "merged", tmp_path, "--pooling", "mean") - ours).max() <= 1e-5
    assert np.abs(encode(base, tmp_path, "--pooling", "mean") - ours).max() > 0.01


@pytest.mark.parametrize("lora, words", [
    ({"target_modules": ["q_proj", "c_attn"]}, ["lora.target_modules", "'c_attn'", "q_proj", "all-linear"]),
    ({"rank": 0}, ["lora.alpha = 16.0", "lora.rank is 0"]),
    ({"rank": -1}, ["lora.rank = -1", "must be >= 0"]),
    ({"dropout": 1.0}, ["lora.dropout = 1.0", "[0, 1)"]),
    ({"alpha": 0}, ["lora.alpha = 0", "must be > 0"]),
    ({"target_modules": []}, ["lora.target_modules = []", "all-linear"])], ids=lambda value: str(value)[:40])
def test_wrong_settings_are_refused(model, tmp_path, lora, words):
    assert_refused(run_on_ranks(command, 1, ["train", str(configuration(model, tmp_path / "run", **lora))]), *words)


def test_dropout_of_no_adapters_is_refused(model, tmp_path):
    values = settings(model, tmp_path / "run") | {"lora": {"dropout": 0.1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), "lora.dropout = 0.1", "no adapters")


def test_a_run_keeps_its_adapters(model, trained, tmp_path):
    resumed = go_back(trained[0], tmp_path / "run", 2)
    for lora in ({"rank": 8}, {"target_modules": ["q_proj"]}, {"alpha": 32}):
        path = configuration(model, resumed, **lora)
        assert_refused(run_on_ranks(command, 1, ["train", str(path)]), "lora.rank", "adapters of rank 4, scale 4")


def test_an_adapter_of_another_model_is_refused_and_removed(model, trained, adapter, tmp_path):
    """Its base model is no longer the one that the run began with: PEFT's vectors are others."""
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    base = shutil.copytree(model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"layers.1.mlp.up_proj.weight": -weights["layers.1.mlp.up_proj.weight"]},
              base / "model.safetensors", metadata={"format": "pt"})
    run = shutil.copytree(trained[0] / "step_000004", tmp_path / "run")
    info = json.loads((run / "megatron_embed.json").read_text())
    info["lora"]["base_model"] = str(base)
    (run / "megatron_embed.json").write_text(json.dumps(info))
    arguments = ["convert", "megatron-to-hf", str(run), str(tmp_path / "out"), "--format", "peft"]
    assert_refused(run_on_ranks(command, 1, arguments), "PEFT's values differ", "the export must not be used")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    shutil.rmtree(base)
    assert "not loaded with PEFT and compared on texts: its base model" in call(*arguments)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("library_name: \"peft\"", "PeftModel.from_pretrained(base", "| optimizer steps | 4 |", "rank 4"):
        assert words in card


def test_adapters_are_never_lost_in_a_conversion(model, trained, tmp_path):
    def refused(*arguments):
        return run_on_ranks(command, 1, ["convert", "megatron-to-hf", *map(str, arguments)])

    assert_refused(refused(trained[0], tmp_path / "out"), "LoRA adapters (rank 4)", "--merge-lora")
    assert_refused(refused(trained[0], tmp_path / "out", "--format", "peft", "--merge-lora"), "leave one out")
    call("convert", "hf-to-megatron", model, tmp_path / "plain")
    assert_refused(refused(tmp_path / "plain", tmp_path / "out", "--merge-lora"), "no adapters to merge")
    assert_refused(refused(tmp_path / "plain", tmp_path / "out", "--format", "peft"), "holds no adapters")
    assert not (tmp_path / "out").exists()


def test_a_peft_directory_is_no_model_to_convert(adapter, tmp_path):
    arguments = ["convert", "hf-to-megatron", str(adapter), str(tmp_path / "out")]
    assert_refused(run_on_ranks(command, 1, arguments), "PEFT adapter", "model.path")


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, ["use_dora = True", "merge_and_unload"]),
    ({"target_parameters": ["mlp.experts.down_proj"]}, ["target_parameters", "merge_and_unload"]),
    ({"peft_type": "IA3"}, ["peft_type = 'IA3'"]),
    ({"r": 8}, ["has shape", "r ask for"]),
    ({"base_model_name_or_path": None}, ["base_model_name_or_path = None"]),
    ({"base_model_name_or_path": "/nowhere/to/be/found"}, ["/nowhere/to/be/found", "no such directory"])],
    ids=lambda value: str(value)[:40])
def test_foreign_adapters_are_refused(adapter, tmp_path, change, words):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    values = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(values | change))
    arguments = ["encode", "--model", str(copy), "--input", str(MINI_EN), "--output", str(tmp_path / "out.npy")]
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    arguments[4] = str(tmp_path / "rows.jsonl")
    assert_refused(run_on_ranks(command, 1, arguments), "--model", *words)


@pytest.mark.parametrize("edit, words", [
    (lambda tensors: {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name},
     ["no lora_A of model.layers.3.", "some layers"]),
    (lambda tensors: tensors | {"base_model.model.embed_tokens.lora_A.weight": torch.ones(4, 2)},
     ["embed_tokens", "no adapter of a linear layer"]),
    (lambda tensors: tensors | {name.replace("layers.0.", "layers.9."): tensor.clone()
                                for name, tensor in tensors.items() if "layers.0." in name},
     ["layers.9.", "outside the model's 4 layers"])], ids=["missing", "unknown", "outside"])
def test_foreign_tensors_are_refused(adapter, tmp_path, edit, words):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    save_file(edit(load_file(adapter / "adapter_model.safetensors")), copy / "adapter_model.safetensors")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    arguments = ["encode", "--model", str(copy), "--input", str(tmp_path / "rows.jsonl"), "--output",
                 str(tmp_path / "out.npy")]
    assert_refused(run_on_ranks(command, 1, arguments), "--model", *words)
