"""Bytes on their way from file to file: whole, in order, read back; and no tensor is made of them."""

import io
import threading

import pytest
import torch

from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_embed.convert.storage import copying
from megatron_embed.convert.storage.byte_range import Run
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.errors import CheckpointError
from tests.helpers.tensor_files import assert_bit_equal, tensors_of
from tests.helpers.toys import save_toy

DATA = bytes(range(250))


@pytest.fixture
def files(tmp_path):
    """One of 250 bytes to read, an empty one to write."""
    (tmp_path / "source").write_bytes(DATA)
    with io.FileIO(str(tmp_path / "source")) as source, io.FileIO(str(tmp_path / "target"), "w+") as target:
        yield source, target


def written(files):
    return files[1].seek(0) or files[1].readall()


def test_stretches_that_begin_and_end_differently_on_both_sides(files, monkeypatch):
    monkeypatch.setattr(copying, "_BLOCK", 7)
    source, target = files
    runs = [Run(source, 100, 30), Run(source, 0, 1), Run(source, 40, 0), Run(source, 200, 29)]
    places = [Run(target, 50, 20), Run(target, 0, 35), Run(target, 35, 5)]
    copy_and_verify([Copy(name="x", source=runs, target=places)])
    expected = DATA[100:130] + DATA[:1] + DATA[200:229]
    assert written(files) == expected[20:] + bytes(10) + expected[:20]


def test_tensors_that_are_computed_go_the_same_way(files):
    tensor = torch.arange(12.0).reshape(3, 4).t()  # not contiguous
    places = [Run(files[1], 8, 40), Run(files[1], 0, 8)]
    copy_and_verify([Copy(name="x", source=lambda: tensor, target=places)])
    expected = tensor.contiguous().numpy().tobytes()
    assert written(files) == expected[40:] + expected[:40]


def test_each_is_reported_in_order_by_the_second_thread(files):
    copies = [Copy(name=str(number), source=[Run(files[0], number, 5)], target=[Run(files[1], 5 * number, 5)])
              for number in range(30)]
    seen = []
    copy_and_verify(copies, lambda copy: seen.append((copy.name, threading.current_thread())))
    assert [name for name, _ in seen] == [str(number) for number in range(30)]
    assert threading.main_thread() not in {thread for _, thread in seen}
    assert written(files) == b"".join(DATA[number:number + 5] for number in range(30))


def test_what_reads_back_differently_is_refused_and_ends_the_rest(files):
    def copies():
        yield Copy(name="first", source=[Run(files[0], 0, 5)], target=[Run(files[1], 0, 5)])
        for number in range(30):  # all in one place: whichever is read back first finds a later one there
            yield Copy(name=f"x{number}", source=[Run(files[0], number, 5)], target=[Run(files[1], 9, 5)])

    ready = threading.Event()
    with pytest.raises(CheckpointError, match=r"target: x0 reads back differently from what was written; check the "):
        copy_and_verify(copies(), lambda copy: ready.wait(0.2))
    assert not ready.is_set()


def test_a_file_that_ends_early_is_named(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"source: ended at byte 250 while it was read"):
        copy_and_verify([Copy(name="x", source=[Run(files[0], 248, 5)], target=[Run(files[1], 0, 5)])])


@pytest.mark.parametrize("kind", ["BertModel", "Qwen3ForCausalLM", "MixtralModel"])
def test_a_conversion_makes_no_tensor(kind, tmp_path, monkeypatch):
    """So its memory depends neither on the number of layers nor on the size of a tensor (test_memory.py measures)."""
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
