"""The heap of a CPU run is bounded."""

import mmap
import sys

import pytest

from megatron_embed.platform import heap


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc and /proc")
def test_memory_is_given_back_once_a_process_has_grown(monkeypatch: pytest.MonkeyPatch):
    sizes = iter((1 << 30, 1 << 30, (1 << 30) + (600 << 20), (1 << 30) + (600 << 20), 2 << 30))
    trimmed: list[int] = []
    monkeypatch.setattr(heap, "resident_bytes", lambda: next(sizes))
    watch = heap.HeapWatch()
    monkeypatch.setattr(watch, "_trim", trimmed.append)
    answers = [watch.after_step() for _ in range(5)]
    assert answers == [False, False, True, False, False]  # the needs of a step are measured again after the third
    assert trimmed == [0]


def test_resident_memory_follows_an_allocation():
    before = heap.resident_bytes()
    # Pages of its own: the heap of a process that has grown would hand out what it kept.
    with mmap.mmap(-1, 64 << 20) as block:
        block[::4096] = b"x" * (len(block) // 4096)
        assert heap.resident_bytes() - before > 48 << 20
