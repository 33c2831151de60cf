"""Byte ranges of open files, read and written at known offsets whatever their length."""

import io
import os
from dataclasses import dataclass

_LARGEST_CALL = 1 << 30
"""Bytes of one read or write call; Linux moves at most 2 GiB less a page."""


@dataclass(frozen=True)
class ByteRange:
    """Contiguous bytes of an open file."""

    file: io.FileIO
    start: int
    length: int

    def part(self, start: int, length: int) -> "ByteRange":
        """`length` bytes from byte `start` of the range."""
        assert 0 <= start <= start + length <= self.length, (self, start, length)
        return ByteRange(self.file, self.start + start, length)


def take(ranges: list[ByteRange], length: int) -> list[ByteRange]:
    """The first `length` bytes of several ranges."""
    taken = []
    for byte_range in ranges:
        taken.append(byte_range.part(0, min(byte_range.length, length)))
        length -= taken[-1].length
    assert not length, ranges
    return taken


def read_at(descriptor: int, target: memoryview, offset: int) -> int:
    """Read from `offset` of an open file until `target` is full or the file ends; return the number of bytes read."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:done + _LARGEST_CALL]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:done + _LARGEST_CALL], offset + done)
