"""Sentence Transformers directories with Dense modules, written with that library's own module."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Dense

Step = tuple[Any, ...]
"""("Normalize",), or ("Dense", inputs, outputs, bias, activation)."""
IDENTITY, TANH = torch.nn.Identity(), torch.nn.Tanh()
SHAPES: dict[str, tuple[Step, ...]] = {
    "sentence-t5": (("Dense", 32, 32, False, IDENTITY), ("Normalize",)),
    "embeddinggemma": (("Dense", 32, 1056, False, IDENTITY), ("Dense", 1056, 24, False, IDENTITY), ("Normalize",)),
    "after-normalize": (("Normalize",), ("Dense", 32, 1024, True, TANH), ("Normalize",),
                        ("Dense", 1024, 20, True, TANH)),
}
"""Modules behind the pooling of a model with 32 hidden units; the first two as in the models of these names."""


def add_modules(path: Path, steps: Sequence[Step], pooling: str = "mean", seed: int = 11) -> Path:
    """Write modules.json, the pooling and these modules, with random weights, into a directory; the directory."""
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"),
               *((f"{index}_{step[0]}", step[0]) for index, step in enumerate(steps, 2))]
    (path / "modules.json").write_text(json.dumps([
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (folder, kind) in enumerate(entries)]), encoding="utf-8")
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(
        {"embedding_dimension": 32, "pooling_mode": pooling.split("+"), "include_prompt": True}), encoding="utf-8")
    torch.manual_seed(seed)
    for (folder, kind), step in zip(entries[2:], steps, strict=True):
        (path / folder).mkdir(exist_ok=True)
        if kind == "Dense":
            _, inputs, outputs, bias, activation = step
            module = Dense(inputs, outputs, bias=bias, activation_function=activation)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.randn_like(parameter) * (1.5 * inputs**-0.5))
            module.save(str(path / folder))
    return path


def load_steps(path: Path) -> list[tuple[str, Any]]:
    """The stock modules behind the pooling, in float64, by folder; None: Normalize."""
    entries = json.loads((path / "modules.json").read_text(encoding="utf-8"))[2:]
    return [(entry["path"], Dense.load(str(path), subfolder=entry["path"]).double()
             if entry["type"].endswith("Dense") else None) for entry in entries]


def through(steps: Sequence[tuple[str, Any]], row: torch.Tensor) -> torch.Tensor:
    """A pooled vector behind these modules."""
    for _, module in steps:
        if module is None:
            row = torch.nn.functional.normalize(row, dim=-1)
        else:
            row = module({"sentence_embedding": row})["sentence_embedding"]
    return row


def save_gradients_of(steps: Sequence[tuple[str, Any]], path: Path) -> float:
    """Write the gradients of the modules as if they were weights; their squared L2 norm."""
    squares = 0.0
    for folder, module in steps:
        if module is None:
            continue
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
        (path / folder).mkdir(exist_ok=True)
        save_file({name: gradient.float() for name, gradient in gradients.items()},
                  path / folder / "model.safetensors")
        squares += sum(float(gradient.square().sum()) for gradient in gradients.values())
    return squares
