"""What `plan --gpus 1` and `init` say of one small GPU."""

import json

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_config, load_text
from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.hardware import GPU_CHOICES
from megatron_embed.planning.layouts import plan_layout
from megatron_embed.planning.quantized import quantized_bytes, quantized_linears
from megatron_embed.planning.shapes import shape_of
from tests.helpers.toys import MINI_EN, REPOSITORY

LORA_8B = str(REPOSITORY / "configs" / "qwen3_8b_embed_lora_dp8_8xh100.yaml")


def plan(capsys, *arguments):
    code = main(["plan", LORA_8B, "--gpus", "1", *arguments])
    return code, capsys.readouterr().out


def test_plan_compares_the_ways_to_train_eight_billion_parameters(capsys):
    _, out = plan(capsys, "--gpu", "24gb")
    fits = {line.split("  ")[1]: "fits:" in line for line in out.partition("On one GPU")[2].splitlines()[1:6]}
    assert fits == {"all parameters": False, "all parameters, 8-bit AdamW": False,
                    "all parameters, AdamW in host memory": False, "LoRA": True, "QLoRA, nf4": True}
    _, out = plan(capsys, "--gpu", "80gb")
    assert "AdamW in host memory  fits:" in out
    _, out = plan(capsys, "--gpu", "24gb", "model.path=Qwen/Qwen3-32B")
    assert "QLoRA, nf4                            does not fit" in out


@pytest.mark.parametrize("values, refused", [
    ({"model_type": "nomic_bert"}, {"LoRA": "a nomic_bert model takes no adapters",
                                    "QLoRA, nf4": "a nomic_bert model takes no adapters"}),
    ({"model_type": "bert", "hidden_size": 780}, {"QLoRA, nf4": "hidden size 780 is not a multiple of 64"})],
    ids=lambda value: value.get("model_type"))
def test_a_way_that_a_model_does_not_have_is_told_from_one_that_does_not_fit(capsys, tmp_path, values, refused):
    sizes = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072,
             "vocab_size": 30528, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(sizes | values))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path}}}\nobjective: {{loss: info_nce, temperature: 0.02}}\n"
                    "data: {train: [rows.jsonl]}\ntraining: {global_batch_size: 64, micro_batch_size: 8, "
                    "train_steps: 100}\ncheckpoint: {directory: runs/one}\n")
    assert main(["plan", str(file), "--gpus", "1", "--gpu", "24gb"]) == 0
    lines = capsys.readouterr().out.partition("On one GPU")[2].splitlines()[1:6]
    reasons = {line.split("  ")[1]: line for line in lines}
    assert all("refused: " in reasons[name] and words in reasons[name] for name, words in refused.items())
    assert sum("fits: " in line for line in lines) == 5 - len(refused)


def test_the_printed_settings_fit_as_they_are(capsys, tmp_path):
    _, out = plan(capsys, "--gpu", "24gb", "model.path=Qwen/Qwen3-14B")
    name, printed = out.partition("Settings of ")[2].split(", besides those of the file", 1)
    assert name == "QLoRA, nf4"
    overrides = [f"{section}.{key}={value}" for section, values in yaml.safe_load(printed).items()
                 for key, value in values.items()]
    config = load_config(LORA_8B, ["model.path=Qwen/Qwen3-14B", *overrides])
    shape = shape_of(config.model.path)
    assert plan_layout(config, shape, 1, GPU_CHOICES["24gb"], adapted_linears(config, shape)).fits
    without = load_config(LORA_8B, ["model.path=Qwen/Qwen3-14B", *(
        item for item in overrides if not item.startswith("model."))])
    assert not plan_layout(without, shape, 1, GPU_CHOICES["24gb"], adapted_linears(without, shape)).fits


@pytest.mark.parametrize("model, gpu, expected", [
    ("Qwen/Qwen3-Embedding-0.6B", "24gb", ("adamw", "none", 0)), ("Qwen/Qwen3-14B", "24gb", ("adamw", "nf4", 16)),
    ("Qwen/Qwen3-Embedding-4B", "80gb", ("adamw_8bit", "none", 0))])
def test_init_takes_what_fits(capsys, model, gpu, expected):
    """With a tenth of the memory to spare, as `plan` compares."""
    assert main(["init", model, str(MINI_EN), "--gpu", gpu]) == 0
    config = load_text(capsys.readouterr().out, "the printed file")
    assert (config.optimizer.name, config.model.quantization, config.lora.rank) == expected
    assert config.training.learning_rate == pytest.approx(1e-4 if expected[2] else config.training.learning_rate)


@pytest.mark.parametrize("double, bits", [(True, 4.13), (False, 4.5)])
def test_bits_per_weight_are_counted(double, bits):
    config = load_config(LORA_8B, ["model.quantization=nf4", f"model.double_quantization={str(double).lower()}"])
    linears = quantized_linears(config, shape_of(config.model.path))
    counted = 8 * sum(quantized_bytes(config, linear) for linear in linears) / sum(linear.weights for linear in linears)
    assert counted == pytest.approx(bits, abs=0.005)
