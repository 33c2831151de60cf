"""The next tensor is made while the last one is used: in order, a bounded number at once, errors where they belong."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch

from megatron_embed.convert import safetensors_file
from megatron_embed.convert.ahead import ahead
from megatron_embed.convert.convert import hf_to_megatron, megatron_to_hf
from tests.convert.toy import save_toy


def test_results_come_in_order_from_another_thread():
    threads = []

    def job(number):
        threads.append(threading.current_thread())
        return number

    assert list(ahead(partial(job, number) for number in range(20))) == list(range(20))
    assert list(ahead([])) == []
    assert threading.main_thread() not in threads


def test_the_next_job_runs_while_the_caller_works_on_the_last():
    started = [threading.Event() for _ in range(3)]
    for number, _ in enumerate(ahead([started[number].set for number in range(3)])):
        if number < 2:
            assert started[number + 1].wait(60)


def test_a_failing_job_raises_in_its_place_and_ends_the_rest():
    done = []

    def job(number):
        if number == 2:
            raise OSError("gone")
        done.append(number)
        return number

    results = ahead(partial(job, number) for number in range(10))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(results)
    assert done == [0, 1] or done == [0, 1, 3]


def test_at_most_three_results_are_alive():
    alive, most = weakref.WeakSet(), []

    def job():
        tensor = torch.zeros(1000)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    for tensor in ahead([job] * 30):
        assert not tensor.any()
    assert max(most) == 3


@pytest.mark.parametrize("kind", ["BertModel", "Qwen3ForCausalLM"])
def test_memory_does_not_depend_on_the_number_of_layers(kind, tmp_path, monkeypatch):
    """Bytes of weights that were read and are still alive, at most: the same for 2 and for 8 layers."""
    alive = {"now": 0, "most": 0}
    read = safetensors_file.SafetensorsFile._read_bytes
    lock = threading.Lock()

    def count(size):
        with lock:
            alive["now"] += size
            alive["most"] = max(alive["most"], alive["now"])

    def counting(self, offset, length):
        data = read(self, offset, length)
        count(length)
        weakref.finalize(data.untyped_storage(), count, -length)
        return data

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "_read_bytes", counting)
    peaks = {}
    for layers in (2, 8):
        source = save_toy(tmp_path / f"source{layers}", kind, num_hidden_layers=layers, vocab_size=40)
        alive["most"] = 0
        hf_to_megatron(source, tmp_path / f"megatron{layers}")
        megatron_to_hf(tmp_path / f"megatron{layers}", tmp_path / f"back{layers}")
        gc.collect()
        peaks[layers] = alive["most"]
    total = sum(file.stat().st_size for file in (tmp_path / "back8").glob("*.safetensors"))
    assert 0 < peaks[2] < total / 3
    assert peaks[8] == pytest.approx(peaks[2], rel=0.3)
