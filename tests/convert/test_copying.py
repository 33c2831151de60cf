"""Copies between files are complete, in order and read back, and no tensor is created."""

import io
import threading

import pytest
import torch

from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.convert.storage import copying
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.errors import CheckpointError
from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import save_toy

DATA = bytes(range(250))


@pytest.fixture
def files(tmp_path):
    """A file of 250 bytes to read and an empty one to write."""
    (tmp_path / "source").write_bytes(DATA)
    with io.FileIO(str(tmp_path / "source")) as source, io.FileIO(str(tmp_path / "target"), "w+") as target:
        yield source, target


def written(files):
    return files[1].seek(0) or files[1].readall()


def test_ranges_that_begin_and_end_differently_on_both_sides(files, monkeypatch):
    monkeypatch.setattr(copying, "_BLOCK", 7)
    source, target = files
    sources = [ByteRange(source, *start_length) for start_length in ((100, 30), (0, 1), (40, 0), (200, 29))]
    targets = [ByteRange(target, 50, 20), ByteRange(target, 0, 35), ByteRange(target, 35, 5)]
    copy_and_verify([Copy(name="x", source=sources, target=targets)])
    expected = DATA[100:130] + DATA[:1] + DATA[200:229]
    assert written(files) == expected[20:] + bytes(10) + expected[:20]


def test_computed_tensors_are_written_and_verified_too(files):
    tensor = torch.arange(12.0).reshape(3, 4).t()  # not contiguous
    targets = [ByteRange(files[1], 8, 40), ByteRange(files[1], 0, 8)]
    copy_and_verify([Copy(name="x", source=lambda: tensor, target=targets)])
    expected = tensor.contiguous().numpy().tobytes()
    assert written(files) == expected[40:] + expected[:40]


def test_each_is_reported_in_order_by_the_second_thread(files):
    copies = [Copy(name=str(index), source=[ByteRange(files[0], index, 5)], target=[ByteRange(files[1], 5 * index, 5)])
              for index in range(30)]
    seen = []
    copy_and_verify(copies, lambda copy: seen.append((copy.name, threading.current_thread())))
    assert [name for name, _ in seen] == [str(index) for index in range(30)]
    assert threading.main_thread() not in {thread for _, thread in seen}
    assert written(files) == b"".join(DATA[index:index + 5] for index in range(30))


def test_what_reads_back_differently_is_refused_and_ends_the_rest(files):
    def copies():
        yield Copy(name="first", source=[ByteRange(files[0], 0, 5)], target=[ByteRange(files[1], 0, 5)])
        for index in range(30):  # all to the same range: whichever is read back first finds a later one there
            yield Copy(name=f"x{index}", source=[ByteRange(files[0], index, 5)], target=[ByteRange(files[1], 9, 5)])

    ready = threading.Event()
    with pytest.raises(CheckpointError, match=r"target: x0 reads back differently from what was written; check the "):
        copy_and_verify(copies(), lambda copy: ready.wait(0.2))
    assert not ready.is_set()


def test_a_file_that_ends_early_is_named(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"source: ended at byte 250 while it was read"):
        copy_and_verify([Copy(name="x", source=[ByteRange(files[0], 248, 5)], target=[ByteRange(files[1], 0, 5)])])


@pytest.mark.parametrize("kind", ["BertModel", "Qwen3ForCausalLM", "MixtralModel"])
def test_a_conversion_makes_no_tensor(kind, tmp_path, monkeypatch):
    """So its memory depends neither on the index of layers nor on the size of a tensor (test_memory.py measures)."""
    def forbidden(*args):
        raise AssertionError("a whole tensor was read")

    load = DcpReader._load
    monkeypatch.setattr(SafetensorsFile, "_read_bytes", forbidden)
    monkeypatch.setattr(DcpReader, "_load",
                        lambda self, key, chunk, device: forbidden() if device != "meta" else load(self, key, chunk,
                                                                                                   device))
    source = save_toy(tmp_path / "source", kind)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    monkeypatch.undo()
    assert_bit_equal(tensors_of(tmp_path / "back"), tensors_of(source))
