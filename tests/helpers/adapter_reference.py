"""Reference for LoRA adapters: PEFT's own model and gradients.

Adapters are written by hand in PEFT's format with one pair of matrices per linear layer and expert; PEFT loads them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 6
_ENCODER = {"encoder.layer.{}.attention.self.query": "hh", "encoder.layer.{}.attention.self.value": "hh",
            "encoder.layer.{}.attention.output.dense": "hh", "encoder.layer.{}.intermediate.dense": "hf",
            "encoder.layer.{}.output.dense": "fh"}
_DECODER = {"layers.{}.self_attn.q_proj": "hq", "layers.{}.self_attn.k_proj": "hk", "layers.{}.self_attn.v_proj": "hk",
            "layers.{}.self_attn.o_proj": "qh", "layers.{}.mlp.gate_proj": "hf", "layers.{}.mlp.up_proj": "hf",
            "layers.{}.mlp.down_proj": "fh"}
_MODERNBERT = {"layers.{}.attn.Wqkv": "hm", "layers.{}.attn.Wo": "hh", "layers.{}.mlp.Wi": "hg",
               "layers.{}.mlp.Wo": "fh"}
_PHI3 = {"layers.{}.self_attn.qkv_proj": "hm", "layers.{}.self_attn.o_proj": "qh", "layers.{}.mlp.gate_up_proj": "hg",
         "layers.{}.mlp.down_proj": "fh"}
_GLM4 = {name: sizes for name, sizes in {**_DECODER, **_PHI3}.items()
         if not name.endswith(("qkv_proj", "gate_proj", "up_proj")) or "gate_up" in name}
TARGETS = {
    "phi3": _PHI3, "glm4": _GLM4,
    "modernbert": _MODERNBERT,
    "bert": _ENCODER, "xlm-roberta": _ENCODER, "qwen3": _DECODER, "qwen2": _DECODER, "llama": _DECODER,
    "gemma2": _DECODER, "gemma3_text": _DECODER,
    "qwen3_moe": {"layers.{}.self_attn.k_proj": "hk", "layers.{}.self_attn.o_proj": "qh",
                  **{f"layers.{{}}.mlp.experts.{expert}.{name}": sizes for expert in range(4)
                     for name, sizes in (("gate_proj", "he"), ("up_proj", "he"), ("down_proj", "eh"))}},
    "mixtral": {"layers.{}.self_attn.q_proj": "hq", "layers.{}.self_attn.v_proj": "hk",
                **{f"layers.{{}}.block_sparse_moe.experts.{expert}.{name}": sizes for expert in range(4)
                   for name, sizes in (("w1", "hf"), ("w3", "hf"), ("w2", "fh"))}}}
"""Names under AutoModel, `{}` the layer, and their inputs and outputs: hidden, query, key, ffn, expert's ffn, queries
with keys and values ("m"), gate with up ("g")."""
_ENCODER_TARGETS = ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_TARGETS = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
                "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
                "modernbert": ["Wqkv", "Wo", "Wi"],
                "bert": _ENCODER_TARGETS, "xlm-roberta": _ENCODER_TARGETS, "qwen3": _DECODER_TARGETS,
                "qwen2": _DECODER_TARGETS, "llama": _DECODER_TARGETS,
                "gemma2": _DECODER_TARGETS, "gemma3_text": _DECODER_TARGETS,
                "qwen3_moe": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                "mixtral": ["q_proj", "v_proj", "w1", "w2", "w3"]}
_OF_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def write_adapter(path: Path, base: Path, task: str = "FEATURE_EXTRACTION", prefix: str = "",
                  saved: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A PEFT directory for the model in `base`, with random numbers in both matrices.

    Args:
        task: PEFT's task type.
        prefix: of the backbone's names, in a model with a head.
        saved: tensors of a head that is trained whole, by name.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim", hidden // heads)
    sizes = {"h": hidden, "q": heads * head, "k": config.get("num_key_value_heads", heads) * head,
             "f": config["intermediate_size"], "e": config.get("moe_intermediate_size", 0)}
    sizes |= {"m": sizes["q"] + 2 * sizes["k"], "g": 2 * sizes["f"]}
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in TARGETS[config["model_type"]].items():
            for matrix, shape in (("A", (RANK, sizes[inputs])), ("B", (sizes[outputs], RANK))):
                numbers = torch.randn(*shape, generator=generator) * 0.1
                tensors[f"base_model.model.{prefix}{name.format(layer)}.lora_{matrix}.weight"] = numbers
    heads = sorted({name.split(".")[-3 if ".dense." in name or ".norm." in name else -2] for name in saved or {}})
    tensors.update({f"base_model.model.{name}": tensor for name, tensor in (saved or {}).items()})
    return _write(path, tensors, base, config["model_type"], task, heads)


def _write(path: Path, tensors: dict[str, torch.Tensor], base: Path, kind: str, task: str,
           heads: Sequence[str] = ()) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA,
        "target_modules": PEFT_TARGETS[kind], "task_type": task, "modules_to_save": list(heads) or None}),
        encoding="utf-8")
    return path


def with_adapter(model: Any, path: Path) -> Any:
    """The Transformers model with PEFT's adapters in it, which alone are trained, in float64."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model, str(path), is_trainable=True)
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    return loaded.base_model.model.double().eval()


def save_adapter_gradients(model: Any, adapter: Path, target: Path) -> float:
    """Save the gradients of an adapter, and of a head that is trained whole, like the adapter. Returns their norm."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".modules_to_save." in name for name in gradients)
    zero = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert not zero, f"gradients that are 0 prove nothing: {zero}"
    tensors = {}
    for name in load_file(adapter / "adapter_model.safetensors"):
        own = name.removeprefix("base_model.model.")
        if ".lora_" not in own:
            (trained,) = (key for key in gradients if key.replace(".modules_to_save.default", "") == own)
            tensors[name] = gradients[trained]
            continue
        module, matrix = own.removesuffix(".weight").rsplit(".lora_", 1)
        if ".experts." in module:
            tensors[name] = _of_expert(gradients, module.replace(".block_sparse_moe.", ".mlp."), matrix)
        else:
            tensors[name] = gradients[f"{module}.lora_{matrix}.default.weight"]
    values = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _write(target, {name: tensor.float() for name, tensor in tensors.items()},
           Path(values["base_model_name_or_path"]), model.config.model_type, values["task_type"],
           values["modules_to_save"] or ())
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def _of_expert(gradients: dict[str, torch.Tensor], module: str, matrix: str) -> torch.Tensor:
    """An expert's share of what PEFT holds for all of a layer, gate and up together.

    PEFT's A is [experts * rank, inputs], expert by expert, its B [outputs, rank * experts], rank by rank; of gate and
    up the ranks and the outputs follow each other, and the blocks of B that would mix them stay 0.
    """
    experts, expert, part = module.rsplit(".", 2)
    part = _OF_MIXTRAL.get(part, part)
    stored = gradients[f"{experts}.{'' if part == 'down_proj' else 'base_layer.'}lora_{matrix}.default.weight"]
    first = RANK if part == "up_proj" else 0
    if matrix == "A":
        return stored.unflatten(0, (4, -1))[int(expert), first:first + RANK]
    block = stored.unflatten(1, (-1, 4))[:, first:first + RANK, int(expert)]
    return block if part == "down_proj" else block.chunk(2)[part == "up_proj"]
