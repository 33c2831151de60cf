"""Directories whose weights bitsandbytes quantized before Transformers saved them: read as Transformers reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_text
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.errors import CheckpointError
from megatron_embed.models.quantized_weight import quantize
from tests.helpers.adapter_reference import write_adapter
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, train
from tests.helpers.stock_curves import stock_curve
from tests.helpers.toys import MINI_EN, layout, save_model

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2,
          "num_hidden_layers": 2}
KINDS = [("nf4", True), ("nf4", False), ("int8", True)]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True, **WIDTHS)


def save_quantized(base, kind, double):
    """The directory as Transformers saves it, beside the original; made once."""
    folder = Path(f"{base}-{kind}-{double}")
    if not folder.exists():
        quantization = (transformers.BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else
                        transformers.BitsAndBytesConfig(
                            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                            bnb_4bit_compute_dtype=torch.float32))
        loaded = transformers.AutoModel.from_pretrained(base, quantization_config=quantization, dtype=torch.float32,
                                                        device_map="cpu")
        loaded.save_pretrained(folder)
        for file in Path(base).glob("*tok*"):
            shutil.copy(file, folder)
        shutil.copy(Path(base) / "vocab.txt", folder)
    return folder


def settings(path, directory, kind, double, *, lora=None, **training):
    values = configuration(str(path), directory, **{"train_steps": 3, "learning_rate": 2e-2, **training})
    values["model"] |= {"quantization": kind, "double_quantization": double}
    values["data"]["shuffle"] = False
    values["objective"]["mask_duplicates"] = False
    values["lora"] = {"rank": 4} if lora is None else lora
    values["checkpoint"]["save_every_steps"] = 100
    return values


@pytest.mark.parametrize("kind, double", KINDS)
def test_codes_and_values_are_those_of_the_quantized_original(model, kind, double):
    folder = save_quantized(model, kind, double)
    with HFDirectory(model) as original, HFDirectory(folder) as stored:
        assert stored.stored_names.keys() == original.stored_names.keys()
        ours, theirs = stored.read_quantized(Q_PROJ), quantize(original.read(Q_PROJ), kind, double=double)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)
        if theirs.nested is not None:
            assert torch.equal(ours.nested.values, theirs.nested.values)
        assert stored.entry(Q_PROJ) == original.entry(Q_PROJ).__class__(
            torch.float32, (8 * 16, 64), stored.entry(Q_PROJ).offset)
        loaded = transformers.AutoModel.from_pretrained(folder, device_map="cpu").dequantize(dtype=torch.float32)
        expected = loaded.get_submodule("layers.1.self_attn.q_proj").weight
        torch.testing.assert_close(stored.read(Q_PROJ), expected.detach(), rtol=1e-6, atol=0)
        assert torch.equal(stored.read_slice(Q_PROJ, 1, 3, 9), stored.read(Q_PROJ)[:, 3:9])
        assert torch.equal(stored.read("model.norm.weight"), original.read("model.norm.weight"))


@pytest.mark.slow
def test_a_run_over_stored_codes_is_the_run_over_the_original(model, tmp_path):
    """Two tensor-parallel ranks; the checkpoint's merged model too."""
    folder = save_quantized(model, "nf4", True)
    merged = []
    for name, path in (("original", model), ("stored", folder)):
        values = settings(path, tmp_path / name, "nf4", True)
        values["parallel"] = layout(2)
        run_on_ranks(train, 2, values)
        arguments = ["convert", "megatron-to-hf", str(tmp_path / name), str(tmp_path / f"{name}_merged"),
                     "--merge-lora"]
        ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
        assert code == 0, err
        merged.append(load_file(tmp_path / f"{name}_merged" / "model.safetensors"))
        assert "quantization_config" not in json.loads((tmp_path / f"{name}_merged" / "config.json").read_text())
    assert curve(tmp_path / "stored") == curve(tmp_path / "original")
    assert len({step[0] for step in curve(tmp_path / "stored")}) == 3
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


def stored_peft_losses(folder, adapter):
    """Losses of PEFT over the directory as Transformers loads it."""
    from peft import PeftModel

    loaded = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    peft = PeftModel.from_pretrained(loaded, str(adapter), is_trainable=True).train()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    return stock_curve(peft, folder, [torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)], 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind, double", KINDS)
def test_twenty_losses_equal_pefts_over_the_same_directory(model, tmp_path, kind, double, record_property):
    folder = save_quantized(model, kind, double)
    adapter = write_adapter(tmp_path / "adapter", folder)
    run_on_ranks(train, 1, settings(adapter, tmp_path / "run", kind, double, lora={}, train_steps=20,
                                    learning_rate=1e-3, lr_decay_style="constant", weight_decay=0.0))
    (theirs,) = run_on_ranks(stored_peft_losses, 1, folder, adapter)
    ours = np.array([step[0] for step in curve(tmp_path / "run")])
    record_property("largest_difference", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - ours[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind, double", KINDS)
def test_other_commands_take_the_directory(model, tmp_path, kind, double):
    """encode as it is; converted it is the model of its restored weights; PEFT's export is compared on it."""
    folder = save_quantized(model, kind, double)
    (tmp_path / "texts.jsonl").write_text('{"text": "a text"}\n{"text": "another one"}\n')

    def run(*arguments):
        ((code, out, err, _),) = run_on_ranks(command, 1, [str(argument) for argument in arguments])
        assert code == 0, err
        return out

    def vectors(path):
        run("encode", "--model", path, "--input", tmp_path / "texts.jsonl", "--output", tmp_path / "vectors.npy",
            "--pooling", "mean")
        return np.load(tmp_path / "vectors.npy")

    ours = vectors(folder)
    assert np.abs(ours - vectors(model)).max() > 1e-3, "nothing was quantized"
    run("convert", "hf-to-megatron", folder, tmp_path / "checkpoint")
    run("convert", "megatron-to-hf", tmp_path / "checkpoint", tmp_path / "restored")
    assert "quantization_config" not in json.loads((tmp_path / "restored" / "config.json").read_text())
    np.testing.assert_allclose(vectors(tmp_path / "restored"), ours, rtol=0, atol=1e-6)
    run_on_ranks(train, 1, settings(folder, tmp_path / "run", kind, double))
    report = run("convert", "megatron-to-hf", tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    assert "PEFT, on the base model," in report


def changed(folder, target, *, config=None, tensors=None):
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    values["quantization_config"] |= config or {}
    (target / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        save_file(tensors(load_file(target / "model.safetensors")), target / "model.safetensors")
    return target


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(names)}


def with_state(text):
    return lambda tensors: tensors | {
        f"{Q_PROJ.removeprefix('model.')}.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize("config, tensors, words", [
    ({}, without("q_proj.weight.absmax"), ["q_proj", "do not belong together"]),
    ({}, without("1.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"), ["q_proj", "quant_state", "missing"]),
    ({}, with_state(b"[" * 4000), ["q_proj", "not readable"]),
    ({}, with_state(b"{}" + b" " * 5000), ["q_proj", "not a short text"]),
    ({"bnb_4bit_use_double_quant": False}, None, ["bnb_4bit_use_double_quant"]),
    ({"bnb_4bit_quant_type": "fp4"}, None, ["bnb_4bit_quant_type = 'fp4'", "only nf4"]),
], ids=["no scales", "no state", "nested state", "long state", "one level", "fp4"])
def test_damaged_directories_are_refused(model, tmp_path, config, tensors, words):
    from megatron_embed.convert.quantized_shards import quantized_tensor

    folder = changed(save_quantized(model, "nf4", True), tmp_path / "base", config=config, tensors=tensors)
    with pytest.raises(CheckpointError) as error, HFDirectory(folder) as source:
        quantized_tensor(source, Q_PROJ, "nf4", double=True)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_wrong_settings_are_refused(model, tmp_path):
    folder = save_quantized(model, "nf4", True)
    for kind, double in (("none", True), ("int8", True), ("nf4", False)):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(folder, tmp_path / "run", kind, double)))
        assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), "model.quantization",
                       "quantized already", "nf4", "double_quantization: true")
    assert_refused(run_on_ranks(command, 1, ["merge", str(folder), str(folder), "--method", "linear", "--output",
                                              str(tmp_path / "merged")]),
                   "quantized")


def test_init_and_plan_train_adapters_over_it(model, tmp_path, capsys):
    folder = save_quantized(model, "nf4", False)
    assert main(["init", str(folder), str(MINI_EN), "--gpu", "24gb"]) == 0
    text = capsys.readouterr().out
    config = load_text(text, "the printed file")
    assert (config.model.quantization, config.model.double_quantization, config.lora.rank) == ("nf4", False, 16)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "run.yaml"), "--gpus", "1", "--gpu", "24gb"]) == 0
    report = capsys.readouterr().out
    assert "QLoRA, nf4" in report and "all parameters" not in report and "(none)" in report
