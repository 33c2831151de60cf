"""Stretches of bytes in open files, read and written at known offsets whatever the size."""

import io
import os
from dataclasses import dataclass

_LARGEST_CALL = 1 << 30
"""Bytes of one read or write call; Linux moves at most 2 GiB less a page."""


@dataclass(frozen=True)
class Run:
    """Bytes that lie together in an open file."""

    file: io.FileIO
    start: int
    length: int

    def part(self, start: int, length: int) -> "Run":
        """`length` bytes from the run's byte `start` on."""
        assert 0 <= start <= start + length <= self.length, (self, start, length)
        return Run(self.file, self.start + start, length)


def head_of_runs(runs: list[Run], length: int) -> list[Run]:
    """The first `length` bytes of some runs."""
    found = []
    for run in runs:
        found.append(run.part(0, min(run.length, length)))
        length -= found[-1].length
    assert not length, runs
    return found


def fill(descriptor: int, target: memoryview, offset: int) -> int:
    """Read from `offset` of an open file until `target` is full or the file ends; gives the bytes read."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:done + _LARGEST_CALL]], offset + done)
        if count == 0:
            break
        done += count
    return done


def pour(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:done + _LARGEST_CALL], offset + done)
