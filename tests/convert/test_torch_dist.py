"""The torch_dist format: written here and read by torch and by Megatron-Core, and the other way round."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from megatron_embed.convert.storage.safetensors_file import bytes_of
from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter
from megatron_embed.errors import CheckpointError
from tests.helpers.ranks import run_on_ranks


def some_tensors():
    generator = torch.Generator().manual_seed(3)
    return {"model.a.weight": torch.randn(12, 10, generator=generator),
            "model.a.bias": torch.randn(12, generator=generator).bfloat16(),
            "model.ids": torch.arange(7), "model.scalar": torch.tensor(1.5), "model.cube": torch.randn(2, 3, 4).half()}


def write(directory, tensors):
    directory.mkdir()
    with DcpWriter(directory) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
    return directory


def read_all(directory):
    with DcpReader(directory) as reader:
        keys = reader.keys()
        tensors = {key: reader.read(key) for key in keys}
        for key, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (reader.shape(key), reader.dtype(key))
        return tensors


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key


def test_own_round_trip(tmp_path):
    tensors = some_tensors()
    assert_equal(read_all(write(tmp_path / "x", tensors)), tensors)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        ".metadata", "__0_0.distcp", "common.pt", "metadata.json"]


def test_tensors_larger_than_one_system_call(tmp_path, monkeypatch):
    """Linux moves less than 2 GiB per call; here the limit is 100 bytes."""
    monkeypatch.setattr("megatron_embed.convert.storage.byte_range._LARGEST_CALL", 100)
    tensors = some_tensors()
    assert max(tensor.nbytes for tensor in tensors.values()) > 400
    assert_equal(read_all(write(tmp_path / "x", tensors)), tensors)


def test_a_view_is_written_without_the_storage_behind_it(tmp_path):
    big = torch.randn(100_000, 2)
    assert_equal(read_all(write(tmp_path / "x", {"a": big[:3], "b": big[:5, 1]})), {"a": big[:3], "b": big[:5, 1]})
    assert (tmp_path / "x" / "__0_0.distcp").stat().st_size < 10_000


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    tmp_path.joinpath("x").mkdir()
    with pytest.raises(AssertionError, match="added twice"), DcpWriter(tmp_path / "x") as writer:
        for _ in range(2):
            writer.add("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"no \.metadata, so this is not a complete torch_dist checkpoint"):
        DcpReader(tmp_path / "x")


def test_a_full_disk_is_reported_as_such(tmp_path):
    """Also where torch writes: the limit stops the second tensor's description."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="File too large"), DcpWriter(tmp_path / "x") as writer:
        writer.add("a", torch.zeros(1000))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            writer.reserve("b", torch.float32, (1000,))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_torch_loads_ours(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "x", tensors)
    state = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    torch_dcp.load(state, checkpoint_id=tmp_path / "x", no_dist=True)
    assert_equal(state, tensors)
    dcp_to_torch_save(tmp_path / "x", tmp_path / "x.pt")
    assert_equal(torch.load(tmp_path / "x.pt"), tensors)
    one = _load_state_dict_from_keys({"model.ids"}, checkpoint_id=tmp_path / "x")
    assert_equal(one, {"model.ids": tensors["model.ids"]})


def megatron_load(directory):
    """Load on each rank half of a tensor's columns, its rows of a padded tensor, and another tensor whole."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    columns, rows = torch.empty(12, 10 // size), torch.empty(16 // size, dtype=torch.bfloat16)
    ids = torch.empty(7, dtype=torch.int64)
    state = {
        "columns": ShardedTensor.from_rank_offsets("model.a.weight", columns, (1, rank, size)),
        "padded": ShardedTensor.from_rank_offsets("model.a.bias", rows, (0, rank, size), allow_shape_mismatch=True),
        "ids": ShardedTensor.from_rank_offsets("model.ids", ids, replica_id=rank)}
    loaded = dist_checkpointing.load(state, str(directory))
    metadata = dist_checkpointing.load_tensors_metadata(str(directory))
    return loaded, {key: tuple(value.global_shape) for key, value in metadata.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_megatron_loads_ours_at_any_layout(world_size, tmp_path):
    tensors = some_tensors()
    write(tmp_path / "x", tensors)
    results = run_on_ranks(megatron_load, world_size, tmp_path / "x")
    assert torch.equal(torch.cat([loaded["columns"] for loaded, _ in results], 1), tensors["model.a.weight"])
    padded = torch.cat([loaded["padded"] for loaded, _ in results])
    assert torch.equal(padded[:12], tensors["model.a.bias"])
    assert not padded[12:].any()
    assert torch.equal(results[-1][0]["ids"], tensors["model.ids"])
    assert results[0][1] == {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def save_with_torch(directory):
    """Tensors sharded over rows, over columns, unevenly and not at all, on 2 ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tensors = some_tensors()
    state = {"model": {"rows": distribute_tensor(tensors["model.a.weight"], mesh, [Shard(0)]),
                       "columns": distribute_tensor(tensors["model.a.weight"], mesh, [Shard(1)]),
                       "uneven": distribute_tensor(tensors["model.ids"], mesh, [Shard(0)]),
                       "cube": distribute_tensor(torch.ones(2, 4, 3), mesh, [Shard(1)]),
                       "whole": tensors["model.a.bias"]},
             "step": 7, "notes": {"text": "x"}}
    torch_dcp.save(state, checkpoint_id=directory)


def test_ours_reads_what_torch_saved_on_two_ranks(tmp_path):
    run_on_ranks(save_with_torch, 2, tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.distcp"))) == 2
    tensors = some_tensors()
    assert_equal(read_all(tmp_path / "x"), {
        "model.rows": tensors["model.a.weight"], "model.columns": tensors["model.a.weight"],
        "model.uneven": tensors["model.ids"], "model.whole": tensors["model.a.bias"],
        "model.cube": torch.ones(2, 4, 3)})


def bytes_at(ranges):
    return b"".join(os.pread(part.file.fileno(), part.length, part.start) for part in ranges)


def test_byte_ranges_hold_the_tensors(tmp_path):
    """Ranges of what we wrote and of what torch saved on two ranks; None for tensors that are not stored by rows."""
    tensors = {**some_tensors(), "model.large": torch.randn(300, 100), "model.none": torch.zeros(0, 3)}
    with DcpReader(write(tmp_path / "ours", tensors)) as reader:
        assert {key: bytes_at(reader.byte_ranges(key)) for key in tensors} == {
            key: bytes(bytes_of(tensor)) for key, tensor in tensors.items()}
        assert bytes_at(reader.byte_ranges("model.a.weight", 3)) == bytes(bytes_of(tensors["model.a.weight"][3]))
    run_on_ranks(save_with_torch, 2, tmp_path / "x")
    with DcpReader(tmp_path / "x") as reader:
        for key, chunks in (("model.rows", 2), ("model.uneven", 2), ("model.whole", 1)):
            ranges = reader.byte_ranges(key)
            assert len(ranges) == chunks
            assert bytes_at(ranges) == bytes(bytes_of(reader.read(key)))
        assert reader.byte_ranges("model.columns") is None
        assert reader.byte_ranges("model.cube") is None
        assert bytes_at(reader.byte_ranges("model.rows", 8)) == bytes(bytes_of(tensors["model.a.weight"][8]))


def test_a_transposed_tensor_has_no_byte_range(tmp_path):
    """It is saved with its strides, which `read` handles."""
    torch_dcp.save({"a": torch.randn(4, 6).t(), "b": torch.ones(3)}, checkpoint_id=tmp_path / "x", no_dist=True)
    with DcpReader(tmp_path / "x") as reader:
        assert reader.byte_ranges("b") is not None
        stored = reader.read("a")
        ranges = reader.byte_ranges("a")
        assert ranges is None or bytes_at(ranges) == bytes(bytes_of(stored.contiguous()))


def test_a_tensor_of_many_slices_is_found_slice_by_slice(tmp_path):
    tensors = torch.randn(100, 4, 3)
    (tmp_path / "x").mkdir()
    with DcpWriter(tmp_path / "x") as writer:
        for index in torch.randperm(100).tolist():
            writer.add("experts", tensors[index], index=index, count=100)
    with DcpReader(tmp_path / "x") as reader:
        assert all(bytes_at(reader.byte_ranges("experts", index)) == bytes(bytes_of(tensors[index]))
                   for index in range(100))
        assert reader.byte_ranges("experts") is None  # more chunks than files may be open
        assert torch.equal(reader.read("experts"), tensors)


def test_metadata_that_names_code_runs_none(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    write(tmp_path / "x", {"a": torch.zeros(2)})
    metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    metadata.planner_data = {"a": Trap(), "b": [{1, 2}, ("x", Trap())]}
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, and code that a checkpoint names is never run"):
        read_all(tmp_path / "x")
    assert not (tmp_path / "trap").exists()
    with pytest.raises(FileExistsError):  # The plain unpickler does run it, twice.
        pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    assert (tmp_path / "trap").exists()


def change_metadata(directory, change):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def forget_chunk(metadata):
    metadata.storage_data.clear()


def claim_more_rows(metadata):
    entry = metadata.state_dict_metadata["a"]
    entry.size = torch.Size([4, 3])


def claim_huge_chunk(metadata):
    entry = metadata.state_dict_metadata["a"]
    entry.size = entry.chunks[0].sizes = torch.Size([10**6, 10**6])


def claim_dtype(metadata):
    metadata.state_dict_metadata["a"].properties.dtype = torch.float16


@pytest.mark.parametrize("damage, match", [
    (lambda path: (path / "__0_0.distcp").unlink(), "a is not readable .*No such file"),
    (lambda path: os.truncate(path / "__0_0.distcp", 30), "truncated: a ends at byte"),
    (lambda path: (path / "__0_0.distcp").write_bytes(b"\0" * 9999), "a is not readable"),
    (lambda path: change_metadata(path, forget_chunk), "a: a chunk is not stored"),
    (lambda path: change_metadata(path, claim_more_rows), "chunks hold 6 of 12 elements"),
    (lambda path: change_metadata(path, claim_huge_chunk), r"a chunk of \[1000000, 1000000\] elements .* cannot be in"),
    (lambda path: change_metadata(path, claim_dtype), "found torch.float32 .* described as torch.float16"),
])
def test_damage_is_refused(damage, match, tmp_path):
    write(tmp_path / "x", {"a": torch.zeros(2, 3)})
    damage(tmp_path / "x")
    with DcpReader(tmp_path / "x") as reader, pytest.raises(CheckpointError, match=match) as caught:
        reader.read("a")
    assert "\n" not in str(caught.value)
