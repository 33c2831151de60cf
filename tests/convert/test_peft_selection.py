"""Which layers PEFT adapts, by its own function; tensors of others are refused, as is what stands twice in the file."""

import re

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from megatron_embed.convert.peft import PeftAdapter
from megatron_embed.convert.peft_selection import PeftSelection
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import model_shape
from tests.helpers.adapter_reference import write_adapter
from tests.helpers.foreign_directories_helpers import change, model_of

NAMES = [f"{prefix}layers.{layer}.{module}" for prefix in ("", "model.") for layer in (0, 1, 10)
         for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
NAMES += ["score", "encoder.layer.1.output.dense"]
SETTINGS = {
    "endings": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "whole-names": {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]},
    "part-of-a-word": {"target_modules": ["proj", "attn.q_proj", "dense"]},
    "expression": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "expression-from-the-beginning": {"target_modules": r"layers\.\d+\..*proj"},
    "expression-of-an-ending": {"target_modules": "q_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj", "layers.0.self_attn.q_proj"]},
    "excluded-by-expression": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "saved": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["score", "mlp"]},
    "saved-layer": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["q_proj"]},
    "saved-by-expression": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": [r"layers\.1"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_selection_is_that_of_peft(tmp_path, name):
    config, ours = LoraConfig(**SETTINGS[name]), PeftSelection(tmp_path / "adapter_config.json", SETTINGS[name])
    expected = [bool(check_target_module_exists(config, module)) for module in NAMES]
    assert [ours.adapts(module) for module in NAMES] == expected
    assert any(expected) != all(expected) or name == "expression-of-an-ending"


@pytest.mark.parametrize("values, words", [
    ({}, "target_modules = None names no modules"), ({"target_modules": []}, "target_modules = [] names no"),
    ({"target_modules": {"q_proj": 1}}, "target_modules = {'q_proj': 1} must be a list of names, or"),
    ({"target_modules": ["q"], "modules_to_save": "score"}, "modules_to_save = 'score' must be a list of names"),
    ({"target_modules": "("}, "target_modules = '(' cannot be used as a regular expression"),
    ({"target_modules": ["q"], "modules_to_save": ["("]}, "modules_to_save = ")])
def test_what_cannot_be_used_is_refused(tmp_path, values, words):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {re.escape(words)}"):
        PeftSelection(tmp_path / "adapter_config.json", values).adapts("layers.0.self_attn.q_proj")


def test_an_expression_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    from megatron_embed.convert import peft_selection

    monkeypatch.setattr(peft_selection, "_SECONDS", 0.05)
    selection = PeftSelection(tmp_path / "adapter_config.json", {"target_modules": "(a|a|aa)+b"})
    with pytest.raises(CheckpointError, match="cannot be used as a regular expression.*list the modules' names"):
        selection.adapts("a" * 60)


def adapter(path, edit=None, **settings):
    """An adapter of all linear layers of a Qwen3, with other settings or tensors."""
    write_adapter(path, model_of("qwen3"))
    change(path / "adapter_config.json", **settings)
    if edit is not None:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(edit(tensors), path / "adapter_model.safetensors")
    return path


def opened(path):
    with PeftAdapter(path, rules_for("qwen3"), model_shape(model_of("qwen3"))) as source:
        return source.settings.modules


def test_all_linear_is_the_same_as_its_names(tmp_path):
    plain = opened(adapter(tmp_path / "names"))
    assert len(plain) == 7
    for targets in ("all-linear", "ALL-LINEAR", r".*_proj"):
        assert opened(adapter(tmp_path / targets.strip(".*"), target_modules=targets)) == plain


def again(tensors):
    """Every tensor under both names, with other numbers under the second."""
    prefix = "base_model.model."
    return tensors | {prefix + "model." + name.removeprefix(prefix): 3 * tensor for name, tensor in tensors.items()}


REFUSED = {
    "targets": (dict(target_modules=["q_proj"]), "give layers.0.mlp.down_proj no adapter"),
    "excluded": (dict(exclude_modules=["v_proj"]), "give layers.0.self_attn.v_proj no adapter"),
    "layer": (dict(target_modules=r".*layers\.1\..*_proj"), "give layers.0."),
    "saved": (dict(modules_to_save=["mlp"]), "give layers.0.mlp.down_proj no adapter"),
    "twice": (dict(edit=again), "base_model.model.layers.0.mlp.down_proj.lora_A.weight and base_model.model.model"),
    "begins-at-random": (dict(init_lora_weights=False, edit=lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "o_proj" not in name}),
        "target_modules gives layers.0.self_attn.o_proj an adapter, and adapter_model.safetensors has no tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_and_settings_that_differ_are_refused(tmp_path, name):
    changes, words = REFUSED[name]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        opened(adapter(tmp_path / "adapter", **changes))


def test_tensors_of_a_head_count_if_it_is_trained_whole(tmp_path):
    def with_score(tensors):
        return tensors | {"base_model.model.score.weight": next(iter(tensors.values()))[:1].clone()}

    rules, shape = rules_for("qwen3"), model_shape(model_of("qwen3"))
    for name, settings in (("saved", {"modules_to_save": ["score"]}), ("type", {"task_type": "SEQ_CLS"})):
        with PeftAdapter(adapter(tmp_path / name, with_score, **settings), rules, shape) as source:
            assert source.read_head("score.weight").shape[0] == 1
    with PeftAdapter(adapter(tmp_path / "neither", with_score), rules, shape) as source:
        assert list(source.head) == ["score.weight"]
        with pytest.raises(CheckpointError, match=r"modules_to_save does not name the module of .*score\.weight"):
            source.read_head("score.weight")


def vectors(path, base):
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).last_hidden_state.numpy()


@pytest.mark.slow
def test_peft_leaves_such_tensors_out(tmp_path):
    """Otherwise these refusals would be for nothing."""
    base = model_of("qwen3")
    plain = vectors(adapter(tmp_path / "plain"), base)
    for name in ("targets", "excluded", "layer"):
        assert abs(vectors(adapter(tmp_path / name, **REFUSED[name][0]), base) - plain).max() > 1e-3, name
    np.testing.assert_allclose(vectors(adapter(tmp_path / "all", target_modules="all-linear"), base), plain, atol=1e-6)
