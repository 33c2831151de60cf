"""Tensors and settings in the files of a model directory: read, compared bit by bit, edited."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tensors_of(path):
    """Every tensor in the safetensors files of a directory, by name."""
    files = sorted(Path(path).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_bit_equal(tensors, expected):
    """Same names, dtypes and bytes."""
    assert tensors.keys() == expected.keys()
    assert tensors
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


def edit_tensors(path, change):
    """Rewrite DIR/model.safetensors with `change` applied to its dictionary."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def edit_config(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
