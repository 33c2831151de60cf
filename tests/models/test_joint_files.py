"""BGE-M3's two files: read as tensors alone, and refused in a sentence if they are anything else."""

import json
import os
import zipfile

import pytest
import torch

from megatron_embed.errors import CheckpointError
from megatron_embed.models.joint_files import (
    JointHeads,
    find_joint_heads,
    read_joint_heads,
    remove_joint_heads,
    write_joint_heads,
    write_settings_file,
)


def heads(dim=4, hidden=6, dtype=torch.float32):
    torch.manual_seed(5)
    return {"weight": torch.randn(dim + 1, hidden).to(dtype), "bias": torch.randn(dim + 1).to(dtype)}


def test_what_is_written_is_what_torch_reads(tmp_path):
    tensors = heads(dim=64, hidden=64, dtype=torch.bfloat16)
    write_joint_heads(tmp_path, tensors)
    several = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    several.load_state_dict(torch.load(tmp_path / "colbert_linear.pt", weights_only=True))
    one = torch.nn.Linear(64, 1, dtype=torch.bfloat16)
    one.load_state_dict(torch.load(tmp_path / "sparse_linear.pt", weights_only=True))
    assert torch.equal(torch.cat([several.weight, one.weight]), tensors["weight"])
    assert torch.equal(read_joint_heads(tmp_path)["bias"], tensors["bias"].float())
    assert (tmp_path / "sparse_linear.pt").stat().st_size < 4000, "a file holds the storage of the other's tensors"
    assert find_joint_heads(tmp_path) == JointHeads(dim=64)
    write_settings_file(tmp_path, JointHeads(dim=64, score_weights=(1.0, 0.5, 0.0)))
    assert find_joint_heads(tmp_path) == JointHeads(dim=64, score_weights=(1.0, 0.5, 0.0))
    remove_joint_heads(tmp_path)
    assert not list(tmp_path.iterdir())
    assert find_joint_heads(tmp_path) is None


def test_compressed_files_are_refused_before_they_fill_the_memory(tmp_path):
    write_joint_heads(tmp_path, heads())
    file = tmp_path / "colbert_linear.pt"
    with zipfile.ZipFile(file) as stored:
        entries = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, data in entries.items():
            compressed.writestr(name, data)
    assert set(torch.load(file, weights_only=True)) == {"weight", "bias"}
    with pytest.raises(CheckpointError, match=r"colbert_linear.pt: not readable as tensors alone \(it is compressed"):
        read_joint_heads(tmp_path)


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def damaged(name, folder, marker):
    """Change one of the two files, or the settings beside them."""
    vectors, weights, settings = folder / "colbert_linear.pt", folder / "sparse_linear.pt", folder / "joint_heads.json"
    if name == "code":
        torch.save({"weight": Code(marker), "bias": torch.zeros(1)}, weights)
    elif name == "cut":
        vectors.write_bytes(vectors.read_bytes()[:300])
    elif name == "one alone":
        weights.unlink()
    elif name == "pipe":
        weights.unlink()
        os.mkfifo(weights)
    elif name == "another width":
        torch.save({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, weights)
    elif name == "more":
        torch.save({"weight": torch.zeros(1, 6), "bias": torch.zeros(1), "third": torch.zeros(1)}, weights)
    elif name == "expanded":
        torch.save({"weight": torch.zeros(1, 1).expand(1, 1 << 40), "bias": torch.zeros(1)}, weights)
    elif name == "integers":
        torch.save({"weight": torch.zeros(1, 6, dtype=torch.int64), "bias": torch.zeros(1)}, weights)
    elif name == "other size":
        settings.write_text(json.dumps({"embedding_dim": 5, "score_weights": [1, 1, 1]}))
    elif name == "no weights":
        settings.write_text(json.dumps({"embedding_dim": 4}))
    else:
        weights_of = {"negative": [1, -1, 1], "all 0": [0, 0, 0], "too large": [1, 10**400, 1]}
        settings.write_text(json.dumps({"embedding_dim": 4, "score_weights": weights_of[name]}))


@pytest.mark.parametrize("name, message", [
    ("code", "sparse_linear.pt: not readable as tensors alone.*names code, which is never run"),
    ("cut", "colbert_linear.pt: not readable as tensors alone"), ("one alone", "sparse_linear.pt: no such file"),
    ("pipe", "sparse_linear.pt"), ("another width", r"must be \[1, 6\] beside"), ("more", "nothing else"),
    ("integers", "must hold weight"), ("expanded", "sparse_linear.pt: must hold weight"),
    ("other size", "embedding_dim = 5, and colbert_linear.pt gives vectors of 4"),
    ("no weights", "joint_heads.json: no usable"),
    *((name, r"score_weights must be 3 numbers from 0 to 1e\+30, not all 0")
      for name in ("negative", "all 0", "too large"))])
def test_what_is_no_head_is_refused(name, message, tmp_path):
    write_joint_heads(tmp_path, heads())
    marker = tmp_path / "ran"
    damaged(name, tmp_path, marker)
    with pytest.raises(CheckpointError, match=message):
        find_joint_heads(tmp_path)
    assert not marker.exists()


def test_of_a_hub_model_the_two_files_are_fetched_and_no_other_weights():
    from huggingface_hub.utils import filter_repo_objects

    from megatron_embed.loading.hub import NOT_FETCHED

    names = ["colbert_linear.pt", "sparse_linear.pt", "pytorch_model.pt", "optimizer.pt", "scheduler.pt", "config.json",
             "pytorch_model.bin", "onnx/model.onnx", "model.safetensors"]
    kept = list(filter_repo_objects(names, ignore_patterns=list(NOT_FETCHED)))
    assert kept == ["colbert_linear.pt", "sparse_linear.pt", "config.json", "model.safetensors"]
