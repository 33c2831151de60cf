"""InternLM directories made of a Llama's (or Qwen2's) tensors: Transformers has no class of theirs to write them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.helpers.tensor_files import tensors_of

_RENAMED = (("model.embed_tokens", "model.tok_embeddings"), (".self_attn.o_proj", ".attention.wo"),
            (".input_layernorm", ".attention_norm"), (".post_attention_layernorm", ".ffn_norm"),
            (".mlp.gate_proj", ".feed_forward.w1"), (".mlp.up_proj", ".feed_forward.w3"),
            (".mlp.down_proj", ".feed_forward.w2"), ("lm_head.", "output."))


EQUAL = "-equal"
"""Ending of the directory of an equal model of Transformers."""


def stock_of(directory: str | Path) -> Path:
    """The directory that Transformers reads: that of the equal model, if there is one."""
    equal = Path(f"{directory}{EQUAL}")
    return equal if equal.is_dir() else Path(directory)


def as_internlm2(directory: Path) -> None:
    """Make an InternLM2 of a Llama's directory, which becomes the equal model's."""
    directory.rename(f"{directory}{EQUAL}")
    write_internlm(Path(f"{directory}{EQUAL}"), directory, 2)


def write_internlm(source: Path, target: Path, version: int) -> None:
    """The directory `target` of InternLM 2 or 3 with the tensors, or gradients, of the Llama in `source`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    values, tensors = json.loads((source / "config.json").read_text()), tensors_of(source)
    prefixed = any(name.startswith("model.") for name in tensors)
    if version == 2:
        named = {name if prefixed or name.startswith("score.") else f"model.{name}": tensor
                 for name, tensor in tensors.items()}
        tensors = {name if prefixed else name.removeprefix("model."): tensor
                   for name, tensor in _internlm2(named, values["num_attention_heads"],
                                                  values["num_key_value_heads"]).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors",
              {"format": "pt"})
    (target / "config.json").write_text(json.dumps(_config(values, version)))


def _internlm2(tensors: dict[str, torch.Tensor], heads: int, groups: int) -> dict[str, torch.Tensor]:
    """Its `wqkv`: for every group the query heads, a key head and a value head."""
    written = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            size = len(tensor) // heads
            others = [tensors[name.replace("q_proj", part)].reshape(groups, 1, size, -1)
                      for part in ("k_proj", "v_proj")]
            fused = torch.cat([tensor.reshape(groups, heads // groups, size, -1), *others], dim=1)
            written[name.replace("self_attn.q_proj", "attention.wqkv")] = fused.reshape(-1, tensor.shape[1])
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for theirs, ours in _RENAMED:
                name = name.replace(theirs, ours)
            written[name] = tensor
    return written


def _config(values: dict[str, Any], version: int) -> dict[str, Any]:
    """As released: `auto_map`, biases under other names, the rope under its older spelling."""
    name, module = f"InternLM{version}", f"modeling_internlm{version}.InternLM{version}"
    biases = {"bias": values.get("attention_bias", False)}
    if version == 3:
        biases["qkv_bias"] = values.get("attention_bias", values["model_type"] == "qwen2")
    rope = dict(values.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    kept = {key: value for key, value in values.items() if key not in ("attention_bias", "mlp_bias", "layer_types")}
    end = values["architectures"][0].removeprefix("Llama").removeprefix("Qwen2")
    return kept | biases | {
        "model_type": name.lower(), "architectures": [name + end], "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "auto_map": {"AutoConfig": f"configuration_{name.lower()}.{name}Config", "AutoModel": f"{module}Model",
                     "AutoModelForCausalLM": f"{module}ForCausalLM"}}


class InternLM2(torch.nn.Module):
    """An InternLM2 in plain torch, its linear layers under the names of its files, where PEFT finds them."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        config = LlamaConfig.from_pretrained(stock_of(directory))
        self.tok_embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(_InternLM2Layer(config) for _ in range(config.num_hidden_layers))
        self.norm, self.rotary = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps), LlamaRotaryEmbedding(config)
        self.load_state_dict(tensors_of(Path(directory)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] without padding -> [batch, tokens, hidden]."""
        states = self.tok_embeddings(tokens)
        angles = self.rotary(states, torch.arange(tokens.shape[1])[None])
        for layer in self.layers:
            states = layer(states, angles)
        return self.norm(states)


class _InternLM2Layer(torch.nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.groups, self.head_dim = config.num_key_value_heads, hidden // config.num_attention_heads

        def linears(**shapes: tuple[int, int]) -> torch.nn.ModuleDict:
            return torch.nn.ModuleDict({name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

        self.attention = linears(wqkv=(hidden, hidden + 2 * self.groups * self.head_dim), wo=(hidden, hidden))
        self.feed_forward = linears(w1=(hidden, inner), w3=(hidden, inner), w2=(inner, hidden))
        self.attention_norm, self.ffn_norm = (LlamaRMSNorm(hidden, config.rms_norm_eps) for _ in range(2))

    def forward(self, states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        fused = self.attention["wqkv"](self.attention_norm(states)).unflatten(-1, (self.groups, -1, self.head_dim))
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (fused[..., part, :].transpose(1, 2) for part in (-2, -1))
        query, key = apply_rotary_pos_emb(query, key, *angles)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        states = states + self.attention["wo"](mixed.transpose(1, 2).flatten(2))
        gate, up = (self.feed_forward[name](self.ffn_norm(states)) for name in ("w1", "w3"))
        return states + self.feed_forward["w2"](silu(gate) * up)
