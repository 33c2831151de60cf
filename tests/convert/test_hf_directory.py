"""Hugging Face directories: reading valid ones, and refusing each kind of invalid one."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_embed.convert.hf_directory import INDEX_FILE, HFDirectory
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile, SafetensorsWriter
from megatron_embed.errors import CheckpointError
from tests.helpers.tensor_files import edit_config, edit_tensors, tensors_of
from tests.helpers.toys import MINILM, save_toy


def test_real_directory():
    with HFDirectory(MINILM) as source:
        assert (source.family.name, source.prefixed, source.dtype()) == ("bert", False, torch.float32)
        assert source.passthrough == (
            "bert.embeddings.position_ids", "bert.pooler.dense.bias", "bert.pooler.dense.weight")
        assert len(source.stored_names) == 104
        assert source.stored_names["bert.embeddings.LayerNorm.bias"] == "embeddings.LayerNorm.bias"


def test_reads_equal_safetensors_whole_and_in_slices(tmp_path):
    path = save_toy(tmp_path, "Qwen3ForCausalLM", shard="20KB", dtype=torch.bfloat16)
    assert len(list(path.glob("*.safetensors"))) > 1
    with HFDirectory(path) as source:
        expected = tensors_of(path)
        for name, tensor in expected.items():
            assert torch.equal(source.read(name), tensor)
            assert torch.equal(source.read_slice(name, 0, 3, 7), tensor[3:7])
            assert source.entry(name).shape == tensor.shape
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(source.read_slice(name, 1, 5, 17), expected[name][:, 5:17])
        assert source.read_slice(name, 0, 3, 3).shape == (0, 40)
        with pytest.raises(ValueError, match="slices of dim 2"):
            source.read_slice(name, 2, 0, 1)


def shrink(path):
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def to_bin(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def add_index(path, change):
    """Turn the single file into a shard with an index, then break something."""
    names = list(tensors_of(path))
    shard = "model-00001-of-00001.safetensors"
    (path / "model.safetensors").rename(path / shard)
    index = {"weight_map": dict.fromkeys(names, shard)}
    change(index, path / shard)
    (path / INDEX_FILE).write_text(json.dumps(index))


def append(file, data):
    with file.open("ab") as stream:
        stream.write(data)


def repeat_in_a_second_shard(path):
    """Two shards of which the second holds one tensor of the first again, as after a download of two revisions."""
    tensors = tensors_of(path)
    first, second = (f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2))
    (path / "model.safetensors").rename(path / first)
    save_file({"norm.weight": tensors["norm.weight"]}, path / second)
    weight_map = dict.fromkeys(tensors, first) | {"norm.weight": second}
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


REFUSALS = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "config no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config no object": (lambda path: (path / "config.json").write_text("[]"), "must hold a JSON object"),
    "unknown family": (lambda path: edit_config(path, model_type="gpt2"),
                       "model_type = 'gpt2' is not supported; give a model of one of these families: bert, roberta"),
    "own code": (lambda path: edit_config(path, auto_map={"AutoModel": "modeling.X"}), "trust_remote_code"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no model.safetensors and no .*index.json"),
    "only bin": (to_bin, r"only in pytorch_model.bin, a pickle .*AutoModel.from_pretrained\('.*'\).save_pretrained"),
    "truncated": (shrink, r"model.safetensors: truncated: \d+ bytes, but its header describes \d+; fetch"),
    "empty file": (lambda path: (path / "model.safetensors").write_bytes(b""), "no readable header in 0 bytes"),
    "LFS pointer": (lambda path: (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
                    "no readable header in 42 bytes.*Git LFS"),
    "header no JSON": (lambda path: (path / "model.safetensors").write_bytes(b"\x04" + b"\0" * 7 + b"abcd"),
                       "header is not readable"),
    "shape": (lambda path: edit_config(path, intermediate_size=48),
              r"layers.0.mlp.gate_proj.weight has shape \[40, 24\], but config.json says \[48, 24\] "
              r"\(intermediate_size = 48, hidden_size = 24\); use the config.json that belongs"),
    "heads": (lambda path: edit_config(path, num_key_value_heads=4),
              r"k_proj.weight has shape \[16, 24\].*num_key_value_heads \* head_dim = 32"),
    "too few layers": (lambda path: edit_config(path, num_hidden_layers=2, layer_types=None),
                       r"tensor layers.2.input_layernorm.weight is unknown .*\(11 such\).*num_hidden_layers = 2"),
    "missing tensor": (lambda path: edit_tensors(path, lambda tensors: tensors.pop("layers.1.mlp.up_proj.weight")),
                       "tensor layers.1.mlp.up_proj.weight is missing"),
    "unknown tensor": (lambda path: edit_tensors(path, lambda tensors: tensors.update(extra=torch.zeros(2))),
                       r"tensor extra is unknown to the qwen3 weight table \(1 such\)"),
    "missing shard": (lambda path: add_index(path, lambda index, shard: shard.unlink()),
                      r"index.json: model-00001-of-00001.safetensors is missing; it holds 35 of 35 tensors"),
    "index names more": (lambda path: add_index(path, lambda index, shard: index["weight_map"].update(more=shard.name)),
                         "more should be in model-00001-of-00001.safetensors but is not"),
    "tensor in two shards": (lambda path: repeat_in_a_second_shard(path),
                             r"model-00002-of-00002.safetensors: tensor norm.weight is also in model-00001-of-00002"),
    "bytes behind the tensors": (lambda path: append(path / "model.safetensors", b"\0" * 8),
                                 r"model.safetensors: more than its tensors: \d+ bytes, but its header describes \d+"),
    "checkpoint of ranks": (
        lambda path: shutil.copy(path / "model.safetensors", path / "shard-00000-model-00001-of-00001.safetensors"),
        r"shard-00000-model-00001-of-00001.safetensors: of a checkpoint that several ranks wrote"),
    "index without map": (lambda path: add_index(path, lambda index, shard: index.pop("weight_map")),
                          "no usable weight_map"),
    "index leaves the directory": (
        lambda path: add_index(path, lambda index, shard: index["weight_map"].update(more="../x.safetensors")),
        r"a file in weight_map = '../x.safetensors': must be the plain name"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, tmp_path):
    spoil, match = REFUSALS[name]
    path = save_toy(tmp_path / "model", "Qwen3Model")
    HFDirectory(path).close()
    spoil(path)
    with pytest.raises(CheckpointError, match=match) as caught:
        HFDirectory(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_tensor_under_its_old_and_its_new_name_is_refused(tmp_path):
    path = save_toy(tmp_path / "model", "BertModel")
    edit_tensors(path, lambda tensors: tensors.update({
        "embeddings.LayerNorm.gamma": tensors["embeddings.LayerNorm.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"LayerNorm.\w+ is also in .*LayerNorm.\w+.*of the two would be lost"):
        HFDirectory(path)


@pytest.mark.parametrize("header, match", [
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
     '"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "key a occurs twice"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
     '"b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}', "b begins at byte .*ends at byte"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
     '"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}', "b begins at byte .*ends at byte")])
def test_headers_that_describe_a_byte_twice_or_never_are_refused(header, match, tmp_path):
    text = header.encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(CheckpointError, match=match):
        SafetensorsFile(tmp_path / "x")


def test_an_entry_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for dtype, end, match in (("F32", 8, "bytes 0 to 8 cannot hold"), ("F4", 12, "dtype 'F4' is not supported")):
        text = json.dumps({"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, end]}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 12)
        with pytest.raises(CheckpointError, match=match):
            SafetensorsFile(file)


def test_written_files_are_aligned_for_mixed_dtypes_and_read_by_safetensors(tmp_path):
    tensors = {"half": torch.randn(3).bfloat16(), "flag": torch.tensor([True, False, True]), "ids": torch.arange(5),
               "full": torch.randn(2, 3), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(tmp_path / "x", declared) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    with safe_open(tmp_path / "x", "pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    ours = SafetensorsFile(tmp_path / "x")
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in ours.entries.values())
    ours.close()


def test_tensors_larger_than_one_system_call(tmp_path, monkeypatch):
    """Linux moves less than 2 GiB per call; here the limit is 7 bytes."""
    monkeypatch.setattr("megatron_embed.convert.storage.byte_range._LARGEST_CALL", 7)
    tensor = torch.randn(5, 3)
    with SafetensorsWriter(tmp_path / "x", [("a", tensor.dtype, (5, 3))]) as writer:
        writer.write("a", tensor)
    file = SafetensorsFile(tmp_path / "x")
    assert torch.equal(file.read("a"), tensor)
    assert torch.equal(file.read_slice("a", 1, 0, 2), tensor[:, :2])
    file.close()


def test_a_wrong_tensor_is_not_written(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x", [("a", torch.float32, (2,))])
    with pytest.raises(ValueError, match="is not what was declared"):
        writer.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="never written"):
        writer.__exit__(None)


def test_safetensors_files_without_metadata_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert torch.equal(file.read("a"), torch.ones(2))
    file.close()
