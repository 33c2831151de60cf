"""Names of linear modules with adapters: values of `lora.target_modules`, and PEFT's `target_modules`."""

import re

import pytest
import transformers

from megatron_embed.convert.lora_names import linear_rules, parts_by_linear, peft_targets, resolve_modules
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import ConfigError
from tests.helpers.families import MODERNBERT
from tests.helpers.toys import BERT, QWEN3

ATTENTION = "model.layers.*.self_attn."


def test_targets_are_ends_of_names():
    qwen3 = rules_for("qwen3")
    assert resolve_modules(qwen3, ["v_proj", "self_attn.q_proj"], "k") == (f"{ATTENTION}q_proj", f"{ATTENTION}v_proj")
    assert resolve_modules(qwen3, ["all-linear"], "k") == tuple(linear_rules(qwen3))
    assert len(linear_rules(qwen3)) == 7
    assert len(resolve_modules(rules_for("bert"), ["output.dense"], "k")) == 2
    assert parts_by_linear(qwen3, [f"{ATTENTION}q_proj", f"{ATTENTION}v_proj"]) == {
        "decoder.layers.*.self_attention.linear_qkv": ("q_proj", None, "v_proj")}


@pytest.mark.parametrize("family, target, words", [
    ("qwen3", "proj", r"k = \['proj'\]: 'proj' names no linear layer of a qwen3 model; known: down_proj, .*all-linear"),
    ("qwen3", "q_norm", "names no linear layer"), ("bert", "q_proj", "known: dense, key, query, value, all-linear"),
    ("bert", "pooler.dense", "names no linear layer"),
    ("nomic_bert", "all-linear", "a nomic_bert model takes no adapters: Transformers' class"),
    ("qwen3_moe", "gate_proj", "cannot load adapters without up_proj; add it")])
def test_targets_that_match_no_layer_are_refused(family, target, words):
    with pytest.raises(ConfigError, match=words):
        resolve_modules(rules_for(family), [target], "k")


@pytest.mark.parametrize("kind, targets", [
    ("bert", ["all-linear"]), ("bert", ["dense"]), ("bert", ["query", "value"]), ("bert", ["attention.output.dense"]),
    ("modernbert", ["all-linear"]), ("modernbert", ["Wo"]), ("modernbert", ["mlp.Wo", "Wqkv"]),
    ("bert", ["intermediate.dense", "key"]), ("qwen3", ["all-linear"]), ("qwen3", ["q_proj", "down_proj"])])
def test_peft_adapts_the_same_layers(kind, targets):
    from peft import LoraConfig, get_peft_model

    name, sizes = {"bert": ("Bert", BERT), "qwen3": ("Qwen3", QWEN3), "modernbert": ("ModernBert", MODERNBERT)}[kind]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(
        **sizes | {"num_hidden_layers": 2, "vocab_size": 50}))
    family = rules_for(kind)
    modules = resolve_modules(family, targets, "k")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=peft_targets(family, modules)))
    adapted = {re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.").removesuffix(".lora_A"))
               for name, _ in peft.named_modules() if name.endswith(".lora_A")}
    assert {family.prefix + name for name in adapted} == set(modules)
