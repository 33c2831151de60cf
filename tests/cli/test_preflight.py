"""`doctor --config` and `plan` read what `train` reads: every kind of model directory, and nothing that is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.planning.shapes import find_shape, model_files
from tests.helpers.adapter_reference import RANK, write_adapter
from tests.helpers.beir_helpers import write_folder
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables
from tests.helpers.toys import save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Hugging Face directory with 4 heads, a PEFT directory of it, a checkpoint, a run's directory, as training
    leaves them."""
    folder = tmp_path_factory.mktemp("models")
    base = Path(save_model(folder / "base", "qwen3", tokenizer=True, num_key_value_heads=4))
    write_adapter(folder / "peft", base)
    step = folder / "run" / "step_000004"
    (step / "model").mkdir(parents=True)
    (step / "model" / ".metadata").write_bytes(b"x")
    (step / "megatron_embed.json").write_text('{"format": 1}')
    shutil.copytree(base, step / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    return {"base": str(base), "peft": str(folder / "peft"), "checkpoint": str(step), "run": str(folder / "run")}


@pytest.fixture
def doctor(models, tmp_path, monkeypatch, capsys):
    """`doctor --config` of a run that lacks nothing, with overrides: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("megatron_embed.run.doctor_checks.visible_gpus", lambda: 0)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    write_folder(tmp_path / "beir")
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    (tmp_path / "corpus.jsonl").write_text('{"docid": "1", "text": "b"}\n')
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "model": {"path": models["base"]}, "checkpoint": {"directory": "out"},
        "data": {"train": ["rows.jsonl"], "validation": ["rows.jsonl"]},
        "evaluation": {"retrieval": ["beir"], "sts": ["rows.jsonl"], "reranking": ["rows.jsonl"]},
        "training": {"global_batch_size": 8}}))

    def ask(*overrides, ranks=1):
        code = main(["doctor", "--config", "run.yaml", "--ranks", str(ranks), *overrides])
        return code, *capsys.readouterr()

    return ask


@pytest.mark.parametrize("kind", ["base", "peft", "checkpoint", "run"])
def test_every_kind_of_model_is_compared_with_the_layout(doctor, models, capsys, kind):
    """Four heads: tensor parallel 4 can be, 8 cannot; `plan` says the same in the words of training."""
    overrides = [f"model.path={models[kind]}", "parallel.tensor_model_parallel_size=4"]
    code, out, _ = doctor(*overrides, ranks=4)
    assert (code, "4 ranks, tp4" in out, "not compared with its shape" in out) == (0, True, False), out
    assert main(["plan", "run.yaml", "--gpus", "4", *overrides]) == 0
    said = capsys.readouterr().out
    assert ("adapters of rank 4" in said) == (kind == "peft") and "1 rows of data.train" in said
    overrides[1] = "parallel.tensor_model_parallel_size=8"
    code, out, _ = doctor(*overrides, ranks=8)
    words = "parallel.tensor_model_parallel_size = 8 does not divide the model's 4 attention heads"
    assert code == 1 and words in out
    assert main(["plan", "run.yaml", "--gpus", "8", *overrides]) == 2
    assert words in capsys.readouterr().err


def test_adapters_of_a_peft_directory_are_planned_as_new_ones_are(doctor, models, capsys):
    given = ["plan", "run.yaml", "--gpus", "1", "--gpu", "h100"]
    assert main([*given, f"model.path={models['peft']}"]) == 0
    own, _, ways = capsys.readouterr().out.partition("\nOn one GPU of ")
    assert "all parameters" not in ways, "the model has adapters already"
    assert main([*given, f"lora.rank={RANK}"]) == 0
    assert own.partition(":")[2] == capsys.readouterr().out.partition("\nOn one GPU of ")[0].partition(":")[2]


def test_a_run_that_lacks_nothing(doctor):
    code, out, _ = doctor("data.train=[{path: rows.jsonl, corpus: corpus.jsonl}, beir]", "evaluation.split=train")
    assert code == 1 and out.count("qrels/train.tsv: no such file") == 2
    (Path("beir") / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    code, out, _ = doctor("data.train=[{path: rows.jsonl, corpus: corpus.jsonl}, beir]")
    assert code == 0, out
    for line in ("ok model.path", "ok tokenizer", "ok data.train ", "ok data.train.corpus", "ok data.validation",
                 "ok evaluation.retrieval", "ok evaluation.sts", "ok evaluation.reranking"):
        assert line in out


def test_no_library_is_loaded(doctor, models):
    code = ("import sys; from megatron_embed.__main__ import main\n"
            f"code = main(['doctor', '--config', 'run.yaml', 'model.path={models['peft']}'])\n"
            "heavy = {'torch', 'transformers', 'datasets', 'megatron'} & set(sys.modules)\n"
            "assert not heavy, heavy\nsys.exit(code)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("override, words", [
    ("model.path=gone", "model.path = 'gone': no such directory; give a model directory or a hub name"),
    ("model.path=./a/b", "model.path = './a/b': no such directory"),
    ("model.path=beir/model", "model.path = 'beir/model': no such directory; give a model directory"),  # beir/ is here
    ("model.path=rows.jsonl", "model.path = 'rows.jsonl': a file; give a model directory"),
    ("model.path=beir", "model.path = 'beir': no config.json, so this is not a model directory"),
    ("model.path=org/model", "as a hub name it is not in the cache"),
    ("data.train=gone.jsonl", "data.train = 'gone.jsonl': no such file"),
    ("data.train=gone.parquet", "data.train = 'gone.parquet': no such file"),
    ("data.train=[rows.jsonl, beir/rows]", "data.train = 'beir/rows': no such file or directory"),
    ("data.train=beir", "qrels/train.tsv: no such file; splits that exist: test"),
    ("data.train=rows.txt", "data.train = 'rows.txt': not a file of rows by its name"),
    ("data.train=[{path: rows.jsonl, corpus: gone.jsonl}]", "data.train.corpus = 'gone.jsonl': no such file"),
    ("data.train=[]", "data.train = []: training needs at least one file of rows"),
    ("data.validation=gone.jsonl.gz", "data.validation = 'gone.jsonl.gz': no such file"),
    ("evaluation.retrieval=gone", "evaluation.retrieval = 'gone': no corpus.jsonl and queries.jsonl"),
    ("evaluation.split=dev", "qrels/dev.tsv: no such file; splits that exist: test"),
    ("evaluation.sts=gone.jsonl", "evaluation.sts = 'gone.jsonl': no such file"),
    ("evaluation.reranking=gone.jsonl", "evaluation.reranking = 'gone.jsonl': no such file"),
    ("optimizer.precision_aware=true", "optimizer.precision_aware = True needs the package transformer_engine: pip"),
    ("model.fp8=first_pass", "model.fp8 = 'first_pass' needs the package transformer_engine: pip"),
    ("logging.wandb=true", "logging.wandb = True needs the package wandb: pip install wandb"),
])
def test_what_is_missing_is_named(doctor, monkeypatch, override, words):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name in (
        "wandb", "transformer_engine") else find(name, package))
    code, out, _ = doctor(override)
    assert code == 1 and words in out, out


@pytest.mark.parametrize("kind, file, words", [
    ("base", "model.safetensors", "no model.safetensors and no model.safetensors.index.json; fetch the weights"),
    ("base", "tokenizer.json vocab.txt", "no tokenizer files; copy tokenizer.json"),
    ("base", "config.json", "no config.json, so this is not a model directory"),
    ("peft", "adapter_model.safetensors", "no adapter_model.safetensors; save the adapter"),
    ("checkpoint", "model/.metadata", "no model/.metadata, so the checkpoint has no weights"),
])
def test_directories_that_lack_a_file(doctor, models, tmp_path, kind, file, words):
    shutil.copytree(models[kind], tmp_path / "copy")
    for name in file.split():
        (tmp_path / "copy" / name).unlink()
    code, out, _ = doctor("model.path=copy")
    assert code == 1 and words in out, out


def test_a_shard_and_the_base_of_an_adapter_are_looked_for(doctor, models, tmp_path):
    shutil.copytree(models["base"], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "a.safetensors")
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    code, out, _ = doctor("model.path=copy")
    assert code == 1 and "b.safetensors is missing (1 of 2 files)" in out
    shutil.copytree(models["peft"], tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for base, words in (("gone", "base_model_name_or_path = 'gone': no such directory"),
                        (models["peft"], "has adapters itself; merge them first"),
                        ("Qwen/Qwen3-0.6B", "as a hub name it is not in the cache"), (None, "must name the directory")):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        code, out, _ = doctor("model.path=peft")
        assert code == 1 and words in out, out


def test_a_hub_model_in_the_cache_is_read_there(doctor, models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copytree(models["base"], folder / "snapshots" / "abc")
    assert model_files("org/model") == folder / "snapshots" / "abc"
    assert find_shape("org/model").num_attention_heads == 4
    assert doctor("model.path=org/model")[0] == 0
    code, out, _ = doctor("model.path=org/model", "parallel.tensor_model_parallel_size=8", ranks=8)
    assert code == 1 and "the model's 4 attention heads" in out


def test_what_is_fetched_at_the_start_is_a_note(doctor, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    code, out, _ = doctor("model.path=org/model", "data.train=org/rows:all/train")
    assert code == 0 and out.count("on the hub, not on this machine: fetched when the run starts") == 2
