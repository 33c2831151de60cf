"""Maps and directories of vectors that come from somewhere else: used as they are described, or refused."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save

from megatron_embed.errors import ConfigError, DataError
from megatron_embed.evaluation.vector_files import ShardWriter, VectorFile
from megatron_embed.evaluation.vector_map import SETTINGS, TENSORS, MappedVectors, VectorMap

OLD, NEW, HIDDEN = 6, 4, 3
WEIGHT = torch.randn(OLD, NEW, generator=torch.Generator().manual_seed(0))
AFFINE = {"weight": WEIGHT, "bias": torch.ones(NEW)}
MLP = {**AFFINE, "hidden_weight": torch.ones(OLD, HIDDEN), "hidden_bias": torch.ones(HIDDEN),
       "output_weight": torch.ones(HIDDEN, NEW)}


def put(folder, kind, tensors, **described):
    folder.mkdir(exist_ok=True)
    (folder / TENSORS).write_bytes(save(tensors))
    (folder / SETTINGS).write_text(json.dumps({
        "kind": kind, "old_dim": OLD, "new_dim": NEW, "unit_length": False, **described}))
    return str(folder)


@pytest.mark.parametrize("kind, tensors", [("orthogonal", {"weight": WEIGHT}), ("affine", AFFINE), ("mlp", MLP)])
def test_a_map_is_read_as_it_was_written(tmp_path, kind, tensors):
    written = VectorMap(kind=kind, tensors=tensors, unit_length=True)
    assert written.write(str(tmp_path), {}) is None
    read = VectorMap.read(str(tmp_path), "--map")
    old = torch.randn(5, OLD)
    assert read.kind == kind and read.unit_length and torch.equal(read(old), written(old))
    assert read.identity() == written.identity() != VectorMap(
        kind=kind, tensors={**tensors, "weight": 2 * WEIGHT}, unit_length=True).identity()


@pytest.mark.parametrize("kind, tensors, described, words", [
    ("affine", AFFINE, {"unit_length": "false"}, "unit_length = 'false' must be true or false"),
    ("affine", AFFINE, {"old_dim": True}, "old_dim and new_dim must be"),
    ("evil", AFFINE, {}, "kind = 'evil' must be one of"), (["mlp"], AFFINE, {}, "must be one of"),
    ("affine", {**AFFINE, "bias": torch.ones(1)}, {}, r"has bias \[1\]"),
    ("affine", {**AFFINE, "bias": torch.ones(80, NEW)}, {}, r"has bias \[80, 4\]"),
    ("affine", {**AFFINE, "biass": torch.ones(NEW)}, {}, "biass"), ("affine", {"weight": WEIGHT}, {}, "kind affine"),
    ("mlp", AFFINE, {}, "kind mlp"), ("orthogonal", AFFINE, {}, "kind orthogonal"),
    ("mlp", {**MLP, "hidden_bias": torch.ones(1)}, {}, "hidden_bias"),
    ("mlp", {**MLP, "hidden_bias": torch.tensor(1.0)}, {}, "hidden_bias"),
    ("mlp", {**MLP, "output_weight": torch.ones(HIDDEN, 1)}, {}, "output_weight"),
    ("orthogonal", {"weight": torch.ones(OLD, NEW, 2)}, {}, r"weight \[6, 4, 2\]"),
    ("orthogonal", {"weight": WEIGHT.double()}, {}, "weight is F64, not F32"),
    ("orthogonal", {"weight": WEIGHT.bfloat16()}, {}, "weight is BF16"),
    ("orthogonal", {"weight": WEIGHT.int()}, {}, "weight is I32"),
    ("orthogonal", {"weight": WEIGHT * float("nan")}, {}, "weight has numbers that are not finite")])
def test_other_maps_are_refused(tmp_path, kind, tensors, described, words):
    with pytest.raises(ConfigError, match=f"--map .*: no map of vectors .*{words}"):
        VectorMap.read(put(tmp_path, kind, tensors, **described), "--map")


@pytest.mark.parametrize("name", [SETTINGS, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "nested", "[1]", ""])
def test_files_of_a_map_that_cannot_be_read_are_refused(tmp_path, name, kind):
    put(tmp_path, "affine", AFFINE)
    file = tmp_path / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "sparse":
        file.touch()
        os.truncate(file, 6 << 30)
    else:
        file.write_text("[" * 100_000 if kind == "nested" else kind)
    with pytest.raises(ConfigError, match="no map of vectors"):
        VectorMap.read(str(tmp_path), "--map")


@pytest.mark.parametrize("unit_length, factor", [(False, 1e38), (True, 1e30)])
def test_a_vector_that_overflows_in_the_map_is_refused(tmp_path, unit_length, factor):
    rows = np.ones((3, OLD), dtype=np.float32)
    rows[1] *= factor
    np.save(tmp_path / "old.npy", rows)
    put(tmp_path / "map", "orthogonal", {"weight": 3 * torch.ones(OLD, NEW)}, unit_length=unit_length)
    mapped = MappedVectors(str(tmp_path / "old.npy"), "--old", VectorMap.read(str(tmp_path / "map"), "--map"),
                           similarity="dot")
    assert torch.isfinite(mapped.rows(0, 1)).all()
    for read in (lambda: mapped.rows(0, 3), lambda: mapped.gather(np.array([2, 1]))):
        with pytest.raises(DataError, match="old.npy:2: the vector is too long to be mapped"):
            read()


@pytest.mark.parametrize("content, words", [
    ("[" * 100_000, "nested"), ("[1]", "must be an object"), ('{"rows": 3.0}', "rows = 3.0"), ("{", "Expecting"),
    ('{"rows": true}', "rows"), ('{"texts": 5}', "texts must be"), ('{"texts": []}', "texts"),
    ('{"texts": {"a": 1}}', "texts"), ('{"texts": [["x"], 1, 2]}', "texts")])
def test_a_description_of_vectors_that_is_damaged_is_refused(tmp_path, content, words):
    np.save(tmp_path / "000000.npy", np.ones((3, OLD), dtype=np.float32))
    (tmp_path / "vectors.json").write_text(content)
    with pytest.raises(ConfigError, match=f"--old .*: vectors.json cannot be read .*{words}"):
        VectorFile(str(tmp_path), "--old", similarity="dot")
    with pytest.raises(ConfigError, match="--output .*vectors.json cannot be read"):
        ShardWriter(str(tmp_path), {}, rows=3, dim=OLD)


def test_a_pipe_is_no_file_of_vectors(tmp_path):
    os.mkfifo(tmp_path / "v.npy")
    with pytest.raises(ConfigError, match="v.npy: not a regular file"):
        VectorFile(str(tmp_path / "v.npy"), "--old", similarity="dot")
