"""Merges equal their formulas in float64; models that differ are refused; memory."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from megatron_embed.__main__ import main
from megatron_embed.convert.merge import MERGE_FILE, merge_models
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.joint_files import JointHeads, read_joint_heads, write_settings_file
from tests.helpers.joint_reference import add_joint_heads
from tests.helpers.ranks import REPOSITORY
from tests.helpers.tensor_files import assert_bit_equal, edit_config, edit_tensors, tensors_of
from tests.helpers.toys import MINILM, save_toy


def trained(base, path, seed, size=1.0):
    """A copy of a model with noise added to its floating-point tensors."""
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(seed)

    def move(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                moved = tensor.float() + size * torch.randn(tensor.shape, generator=generator)
                tensors[name] = moved.to(tensor.dtype)

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        move(tensors)
        save_file(tensors, file, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(base, three models that were trained from it)."""
    folder = tmp_path_factory.mktemp("models")
    base = save_toy(folder / "base", "Qwen3Model")
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}, "merges": ["a b"]}, "padding": None}))
    return base, [trained(base, folder / f"model{seed}", seed) for seed in (1, 2, 3)]


def in_double(path):
    return {name: tensor.double() for name, tensor in tensors_of(path).items()}


def linear(tensors, weights, base):
    return sum(weight / sum(weights) * tensor for weight, tensor in zip(weights, tensors, strict=True))


def slerp(tensors, weights, base):
    """Shoemake's formula; the constant at which it becomes linear is mergekit's."""
    first, second = tensors
    share = weights[1] / sum(weights)
    cosine = float((first / first.norm() * (second / second.norm())).sum())
    if abs(cosine) > 0.9995:
        return (1 - share) * first + share * second
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)


def multi_slerp(tensors, weights, base):
    """With mergekit's step in the tangent space at the mean, which ours leaves out because it is zero."""
    shares = [weight / sum(weights) for weight in weights]
    deltas = [tensor - base for tensor in tensors] if base is not None else tensors
    units = [delta / (delta.norm() + 1e-8) for delta in deltas]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(share * (unit - (unit * mean).sum() * mean) for share, unit in zip(shares, units, strict=True))
    length = tangent.norm() + 1e-8
    direction = mean * torch.cos(length) + tangent * torch.sin(length) / length
    merged = direction * sum(share * delta.norm() for share, delta in zip(shares, deltas, strict=True))
    return merged if base is None else base + merged


def task_arithmetic(tensors, weights, base):
    return base + sum(weight * (tensor - base) for weight, tensor in zip(weights, tensors, strict=True))


CASES = {
    "linear": (linear, "linear", [1, 2, 5], False),
    "linear, one weight 0": (linear, "linear", [1, 0, 1], False),
    "slerp": (slerp, "slerp", [0.3, 0.7], False),
    "slerp, equal": (slerp, "slerp", [1, 1], False),
    "multi-slerp": (multi_slerp, "multi_slerp", [1, 2, 5], False),
    "multi-slerp of differences": (multi_slerp, "multi_slerp", [1, 2, 5], True),
    "task arithmetic": (task_arithmetic, "task_arithmetic", [0.5, -0.25, 1.5], True),
    "task arithmetic of one": (task_arithmetic, "task_arithmetic", [0.4], True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_in_double(case, models, tmp_path, monkeypatch):
    formula, method, weights, has_base = CASES[case]
    monkeypatch.setattr("megatron_embed.convert.merge._BLOCK_ELEMENTS", 700)  # several blocks per tensor
    base, others = models
    chosen = others[:len(weights)]
    report = merge_models(chosen, tmp_path / "merged", method=method, weights=weights, base=base if has_base else None)
    merged, inputs, origin = in_double(tmp_path / "merged"), [in_double(path) for path in chosen], in_double(base)
    assert report.tensors == len(merged) == len(inputs[0]) > 20
    for name, tensor in merged.items():
        expected = formula([values[name] for values in inputs], weights, origin[name] if has_base else None)
        assert not torch.allclose(expected, inputs[0][name], atol=1e-3), name
        torch.testing.assert_close(tensor, expected, rtol=2e-7, atol=1e-6, msg=name)


def test_equal_weights_are_the_default_and_the_first_model_gives_the_files(models, tmp_path):
    _, others = models
    merge_models(others, tmp_path / "one", method="linear")
    merge_models(others, tmp_path / "other", method="linear", weights=[4, 4, 4])
    assert_bit_equal(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other"))
    assert (tmp_path / "one" / "config.json").read_bytes() == (others[0] / "config.json").read_bytes()
    told = json.loads((tmp_path / "one" / MERGE_FILE).read_text())
    assert told == {"method": "linear", "models": [str(path) for path in others], "weights": [1.0] * 3, "base": None}
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "other"}


def test_joint_heads_are_merged_or_left_out(models, tmp_path):
    base, others = models
    folders = [shutil.copytree(folder, tmp_path / f"model{index}") for index, folder in enumerate([base, *others[:2]])]
    for seed, folder in enumerate(folders[1:]):
        add_joint_heads(folder, hidden=64, seed=seed)
    first, second = (read_joint_heads(folder) for folder in folders[1:])
    merge_models(folders[1:], tmp_path / "merged", method="linear", weights=[1, 3])
    for name, tensor in read_joint_heads(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, (first[name] + 3 * second[name]) / 4)
        assert not torch.equal(first[name], second[name])
    merge_models(folders[1:], tmp_path / "of_base", method="task_arithmetic", base=folders[0])
    merge_models(folders[1::-1], tmp_path / "dense", method="linear")
    for name in ("of_base", "dense"):
        assert not list((tmp_path / name).glob("*.pt")), "a head that its backbone was not trained with"
    write_settings_file(folders[2], JointHeads(dim=12, score_weights=(1.0, 0.5, 1.0)))
    with pytest.raises(CheckpointError, match="cannot be merged: their joint heads are"):
        merge_models(folders[1:], tmp_path / "refused", method="linear")
    assert not (tmp_path / "refused").exists()


def test_close_models_are_interpolated_on_the_chord(tmp_path):
    """Fine-tuned siblings are nearly parallel: the line, as mergekit has it, and no division by a small sine."""
    first = save_toy(tmp_path / "first", "Qwen3Model")
    second = trained(first, tmp_path / "second", 1, size=1e-3)
    merge_models([first, second], tmp_path / "merged", method="slerp", weights=[1, 3])
    merged, one, two = (in_double(tmp_path / name) for name in ("merged", "first", "second"))
    for name in merged:
        torch.testing.assert_close(merged[name], 0.25 * one[name] + 0.75 * two[name], rtol=1e-7, atol=1e-7)


def test_opposite_directions_and_zeros_stay_finite(tmp_path):
    first = save_toy(tmp_path / "first", "Qwen3Model")
    shutil.copytree(first, tmp_path / "opposite")
    edit_tensors(tmp_path / "opposite", lambda tensors: tensors.update({name: -t for name, t in tensors.items()}))
    shutil.copytree(first, tmp_path / "zero")
    edit_tensors(tmp_path / "zero", lambda tensors: tensors.update({name: 0 * t for name, t in tensors.items()}))
    for method, other in (("slerp", "opposite"), ("multi_slerp", "opposite"), ("multi_slerp", "zero")):
        merge_models([first, tmp_path / other], tmp_path / f"{method}_{other}", method=method)
    assert all((tensor == 0).all() for name in ("slerp_opposite", "multi_slerp_opposite")
               for tensor in tensors_of(tmp_path / name).values())
    merge_models([first, tmp_path / "zero"], tmp_path / "slerp_zero", method="slerp")
    for name, tensor in in_double(tmp_path / "slerp_zero").items():  # a right angle, as in mergekit
        torch.testing.assert_close(tensor, math.sqrt(0.5) * in_double(first)[name])


def test_bfloat16_shards_and_tied_heads(tmp_path):
    first = save_toy(tmp_path / "first", "Qwen3ForCausalLM", dtype=torch.bfloat16, tie_word_embeddings=False,
                     shard="30KB")
    second = trained(first, tmp_path / "second", 1)
    merge_models([first, second], tmp_path / "merged", method="linear", max_shard_size="30KB")
    merged, one, two = (tensors_of(tmp_path / name) for name in ("merged", "first", "second"))
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 2
    assert "lm_head.weight" in merged and merged.keys() == one.keys()
    for name, tensor in merged.items():
        expected = (one[name].double() + two[name].double()) / 2
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name  # rounded once


def test_base_with_an_lm_head_and_another_dtype(models, tmp_path):
    base = save_toy(tmp_path / "base", "Qwen3ForCausalLM", dtype=torch.bfloat16, tie_word_embeddings=False)
    first = save_toy(tmp_path / "first", "Qwen3Model", tie_word_embeddings=False)
    assert all(name.startswith(("model.", "lm_head")) for name in tensors_of(base))
    merge_models([trained(first, tmp_path / "second", 5)], tmp_path / "merged", method="task_arithmetic", base=base,
                 weights=[0.5])
    merged, origin, moved = (in_double(tmp_path / name) for name in ("merged", "base", "second"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (moved[name] + origin[f"model.{name}"]) / 2, rtol=1e-6, atol=1e-6)


def test_real_model_loads_in_the_stock_library(tmp_path):
    second = trained(MINILM, tmp_path / "second", 1, size=1e-3)
    merge_models([MINILM, second], tmp_path / "merged", method="slerp", weights=[1, 0])
    texts = ["a cat sat on the mat", "der Hund"]
    ours, theirs = (SentenceTransformer(str(path), device="cpu").encode(texts)
                    for path in (tmp_path / "merged", MINILM))
    assert abs(ours - theirs).max() < 1e-6
    told = tensors_of(tmp_path / "merged")
    assert all(torch.equal(tensor, told[name]) for name, tensor in tensors_of(MINILM).items())


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop(name):
    return lambda path: edit_tensors(path, lambda tensors: tensors.pop(name))


DIFFERENCES = {
    "config": (lambda path: edit_config(path, rms_norm_eps=1e-3),
               "config.json: norm_eps is 1e-06 in the first and 0.001"),
    "dtype": (lambda path: edit_tensors(path, lambda t: t.update({"norm.weight": t["norm.weight"].half()})),
              "norm.weight is float32 in the first and float16 in the second; export both in one dtype"),
    "tokenizer": (lambda path: (path / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}, "padding": 3}'),
                  "their tokenizers differ in tokenizer.json: model"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "of the tokenizer is only in .*model1"),
    "pooling": (lambda path: shutil.copytree(MINILM / "1_Pooling", path / "1_Pooling") and
                shutil.copy(MINILM / "modules.json", path), "pooling is None in the first and 'mean' in the second"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_models_that_differ_are_refused(difference, models, tmp_path):
    change, words = DIFFERENCES[difference]
    _, (first, *_) = models
    other = shutil.copytree(first, tmp_path / "other")
    change(other)
    with pytest.raises(CheckpointError, match=words) as refusal:
        merge_models([first, other], tmp_path / "merged", method="linear")
    assert str(other) in str(refusal.value)
    assert not (tmp_path / "merged").exists()


def test_names_and_shapes_that_differ_are_refused(models, tmp_path):
    _, (first, *_) = models
    with_head = save_toy(tmp_path / "head", "Qwen3ForCausalLM", tie_word_embeddings=False)
    headless = save_toy(tmp_path / "headless", "Qwen3Model", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is only in .*head \(1 such\)"):
        merge_models([headless, with_head], tmp_path / "merged", method="linear")
    with pytest.raises(CheckpointError, match="is only in the first"):
        merge_models([with_head], tmp_path / "merged", method="task_arithmetic", base=headless)
    wider = save_toy(tmp_path / "wider", "Qwen3Model", intermediate_size=48)
    with pytest.raises(CheckpointError, match="ffn_hidden_size is 40 in the first and 48 in the second"):
        merge_models([first, wider], tmp_path / "merged", method="linear")


def test_same_tokenizer_in_another_spelling_is_accepted(models, tmp_path):
    _, (first, second, _) = models
    other = shutil.copytree(second, tmp_path / "other")
    values = {"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}, "padding": {"length": 3}, "version": "1.0"}
    (other / "tokenizer.json").write_text(json.dumps(values))
    merge_models([first, other], tmp_path / "merged", method="linear")
    merge_models([first, second], tmp_path / "expected", method="linear")
    for name, tensor in load_file(tmp_path / "expected" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[name], tensor)


def test_values_that_are_not_finite_are_refused(models, tmp_path):
    _, (first, *_) = models
    broken = shutil.copytree(first, tmp_path / "broken")
    edit_tensors(broken, lambda tensors: tensors["norm.weight"].fill_(math.nan))
    with pytest.raises(CheckpointError, match="merged model.norm.weight has values that are not finite"):
        merge_models([first, broken], tmp_path / "merged", method="slerp")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("arguments, words", [
    (dict(method="slerp", count=3), "slerp: 3 models, but slerp takes two; use multi_slerp"),
    (dict(method="linear", count=1), "1 model cannot be merged"),
    (dict(method="task_arithmetic", count=2), "name it with --base"),
    (dict(method="linear", count=2, base=True), "--base: linear does not use it"),
    (dict(method="linear", count=2, weights=[1]), "1 weights for 2 models"),
    (dict(method="slerp", count=2, weights=[-1, 2]), "needs weights of at least 0"),
    (dict(method="linear", count=2, weights=[0, 0]), "that are not all 0"),
    (dict(method="linear", count=2, weights=[1, math.inf]), "finite"),
])
def test_invalid_arguments_are_refused(arguments, words, models, tmp_path):
    base, others = models
    with pytest.raises(ConfigError, match=words):
        merge_models(others[:arguments["count"]], tmp_path / "merged", method=arguments["method"],
                     weights=arguments.get("weights"), base=base if arguments.get("base") else None)


def test_command(models, tmp_path, capsys):
    _, (first, second, _) = models
    merged = tmp_path / "merged"
    assert main(["merge", str(first), str(second), "--method", "slerp", "--weights", "1", "3", "--output",
                 str(merged)]) == 0
    assert capsys.readouterr().out.startswith(f"{merged}: slerp of 2 models, ")
    nowhere = str(tmp_path / "none")
    assert main(["merge", str(first), nowhere, "--method", "slerp", "--output", str(tmp_path / "x")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main(["merge", str(first), str(second), "--method", "slerp", "--output", str(merged)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


PEAK = """
import sys
from megatron_embed.convert.merge import merge_models
def peak():  # of this process alone: getrusage's begins with what the parent held
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
merge_models(sys.argv[1:2], sys.argv[2], method="task_arithmetic", weights=[1.0], base=sys.argv[1])
before = peak()
merge_models(sys.argv[3:6], sys.argv[6], method="multi_slerp")
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """24 MB per layer and model: eight layers of three models are 576 MB, of which no more than a block is held."""
    size = {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8,
            "head_dim": 64, "vocab_size": 103}
    save_toy(tmp_path / "tiny", "Qwen3Model")
    peaks = {}
    for layers in (2, 8):
        paths = [save_toy(tmp_path / f"{layers}_{index}", "Qwen3Model", num_hidden_layers=layers, **size)
                 for index in range(3)]
        arguments = [tmp_path / "tiny", tmp_path / f"warm{layers}", *paths, tmp_path / f"merged{layers}"]
        peaks[layers] = int(subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True,
                                           text=True, check=True, cwd=REPOSITORY).stdout) / 1024
    assert peaks[2] > 0 and peaks[8] < peaks[2] + 25, peaks
