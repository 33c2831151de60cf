"""QLoRA: curves equal PEFT's with bitsandbytes, and each other's in every layout; checkpoints hold adapters alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers.adapter_reference import write_adapter
from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.stock_curves import stock_curve
from tests.helpers.toys import layout, save_model

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"hidden_size": 64, "moe_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True, **WIDTHS)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("models") / "adapter", Path(model))


def settings(model, directory, *, kind="nf4", double=None, lora=None, sizes=None, **training):
    """Rows in the order of their file, so that any trainer sees the same ones."""
    training = {"train_steps": 20, "learning_rate": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.0, **training}
    values = configuration(str(model), directory, parallel=sizes, **training)
    values["model"] |= {"quantization": kind, **({} if double is None else {"double_quantization": double})}
    values["data"] |= {"shuffle": False}
    values["objective"] |= {"mask_duplicates": False}
    values["lora"] = lora if lora is not None else {"rank": 4}
    values["checkpoint"] |= {"save_every_steps": 10, "keep": 0}
    return values


def losses(directory):
    return [step[0] for step in curve(directory)]


def peft_losses(base, adapter, kind, double):
    """Losses of PEFT's adapters over bitsandbytes' weights: the stock libraries alone."""
    import transformers
    from peft import PeftModel

    torch.manual_seed(0)
    quantization = None if kind is None else transformers.BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else (
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                        bnb_4bit_compute_dtype=torch.float32))
    loaded = transformers.AutoModel.from_pretrained(base, quantization_config=quantization, dtype=torch.float32,
                                                    device_map="cpu")
    peft = PeftModel.from_pretrained(loaded, str(adapter), is_trainable=True).train()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    return stock_curve(peft, base, [torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)], 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("int8", None)])
def test_twenty_losses_equal_pefts_with_bitsandbytes(model, adapter, tmp_path, kind, double, record_property):
    run_on_ranks(train, 1, settings(adapter, tmp_path / "run", kind=kind, double=double, lora={}))
    (theirs,) = run_on_ranks(peft_losses, 1, model, str(adapter), kind, bool(double))
    ours = losses(tmp_path / "run")
    record_property("largest_difference", np.abs(np.array(ours) - theirs).max())
    assert ours[0] - ours[-1] > 0.1, "nothing was learned"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("whole", ["experts", "dense"])
def test_twenty_losses_are_equal_in_every_layout(model, tmp_path, kind, whole, record_property):
    cases = {
        "dense": [("tp2", layout(2)), ("tp2nosp", layout(2, sp=False)), ("pp2", layout(pp=2)), ("cp2", layout(cp=2))],
        "experts": [("ep2", layout() | {"expert_model_parallel_size": 2}),
                    ("etp1", layout(2) | {"expert_tensor_parallel_size": 1}),
                    ("etp2", layout(2) | {"expert_tensor_parallel_size": 2})]}[whole]
    base = model if whole == "dense" else save_experts(tmp_path / "moe", "qwen3_moe", **EXPERTS)
    curves = {}
    for name, sizes in (("untrained", layout()), (whole, layout()), *cases):
        training = {"learning_rate": 1e-12} if name == "untrained" else {}
        values = settings(base, tmp_path / name, kind=kind, sizes=sizes, moe_aux_loss_coefficient=0.0, **training)
        run_on_ranks(train, 1 if name in ("untrained", whole) else 2, values)
        curves[name] = np.array(losses(tmp_path / name))
    assert np.abs(curves[whole] - curves["untrained"]).max() > 0.01, "nothing was learned"
    for name, _ in cases:
        record_property(f"largest_difference_{name}", np.abs(curves[name] - curves[whole]).max())
        np.testing.assert_allclose(curves[name], curves[whole], rtol=0, atol=1e-5, err_msg=name)


def test_two_tensor_parallel_ranks_train_what_one_does(model, tmp_path):
    """With sequence parallelism, in three steps; every layout and more steps: the slow test above."""
    for name, sizes, ranks in (("one", layout(), 1), ("tp2", layout(2), 2)):
        values = settings(model, tmp_path / name, sizes=sizes, train_steps=3, learning_rate=2e-2)
        values["checkpoint"] = {}
        values["logging"]["directory"] = str(tmp_path / name)
        run_on_ranks(train, ranks, values)
    one, two = (np.array(curve(tmp_path / name))[:, :2] for name in ("one", "tp2"))
    assert (one[:, 1] > 0).all()
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_exports_and_holds_adapters_alone(model, tmp_path):
    """Four steps at PP2 against two and two; the merged export is the model that was trained."""
    values = settings(model, tmp_path / "run", sizes=layout(pp=2), train_steps=4)
    values["checkpoint"] |= {"save_every_steps": 2, "export_at_end": str(tmp_path / "export")}
    run_on_ranks(train, 2, values)
    checkpoint = tmp_path / "run" / "step_000004"
    weights = Path(model, "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < weights / 2
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", 2)
    values["checkpoint"] = {"directory": str(resumed), "save_every_steps": 2, "keep": 0}
    run_on_ranks(train, 2, values)
    assert curve(resumed) == curve(tmp_path / "run")
    for name, sizes in (("tp2", layout(2)), ("dp2", layout())):  # and in another layout
        values["parallel"], elsewhere = sizes, go_back(tmp_path / "run", tmp_path / name, 2)
        values["checkpoint"]["directory"] = str(elsewhere)
        run_on_ranks(train, 2, values)
        np.testing.assert_allclose(losses(elsewhere), losses(tmp_path / "run"), rtol=0, atol=1e-5, err_msg=name)
    start, merged = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert {name for name in start if not torch.equal(start[name], merged[name])} == {
        name for name in start if "_proj." in name}


def test_a_base_model_that_changed_is_refused_and_one_that_moved_is_not(model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    values = settings(base, tmp_path / "run", train_steps=1)
    values["checkpoint"]["save_every_steps"] = 1
    run_on_ranks(train, 1, values)
    moved = base.rename(tmp_path / "moved")
    arguments = ["encode", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "texts.jsonl"), "--output",
                 str(tmp_path / "vectors.npy")]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a text"}) + "\n")
    assert_refused(run_on_ranks(command, 1, arguments), "base", str(base), "megatron_embed.json")
    file = tmp_path / "run" / "step_000001" / "megatron_embed.json"
    info = json.loads(file.read_text())
    info["base"]["path"] = str(moved)
    file.write_text(json.dumps(info))
    ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
    assert code == 0, err
    tensors = load_file(moved / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"] + 1e-3}, moved / "model.safetensors")
    assert_refused(run_on_ranks(command, 1, arguments), "other weights", "fingerprint")
    values["model"]["path"] = str(moved)
    values["training"]["train_steps"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), "model.path", "other weights")


@pytest.mark.parametrize("change, words", [
    ({"lora": {}}, ["model.quantization = 'nf4'", "without adapters", "lora.rank"]),
    ({"model": {"quantization": "int8", "double_quantization": False}}, ["model.double_quantization", "nf4"]),
    ({"model": {"quantization": "nf4", "backend": "te"}}, ["model.quantization", "Transformer Engine", "torch"]),
    ({"model": {"quantization": "int4"}}, ["model.quantization", "nf4", "int8"])], ids=str)
def test_wrong_settings_are_refused(model, tmp_path, change, words):
    values = settings(model, tmp_path / "run")
    for section, keys in change.items():
        values[section] = keys if section == "lora" else values[section] | keys
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), *words)


def test_shares_of_broken_blocks_are_refused(tmp_path):
    base = save_model(tmp_path / "narrow", "qwen3", tokenizer=True, **WIDTHS | {"intermediate_size": 64})
    values = settings(base, tmp_path / "run", sizes=layout(2))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 2, ["train", str(tmp_path / "run.yaml")]),
                   "parallel.tensor_model_parallel_size = 2", "MLP width 64", "multiple of 64", "largest valid: 1")


@pytest.mark.parametrize("method, word", [("bitsandbytes", "fp4"), ("gptq", "gptq"), ("awq", "awq")])
def test_a_base_that_is_quantized_otherwise_is_refused(model, tmp_path, method, word):
    base = shutil.copytree(model, tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4}
    (base / "config.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(base, tmp_path / "run")))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), "quantization_config", word,
                   "original weights")
