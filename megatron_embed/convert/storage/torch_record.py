"""One tensor as `torch.save` writes it, inside a larger file: a zip archive whose entry `data/0` is its numbers."""

import io
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.storage.byte_range import Run, fill, pour


class TorchRecord(io.RawIOBase):
    """A part of a file as a file of its own, as `torch.load` wants it."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self.start, self.length = start, length
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer or reach the end: torch takes a shorter read for a damaged file."""
        view = memoryview(buffer).cast("B")
        wanted = view[:max(0, min(len(view), self.length - self._position))]
        done = fill(self._file.fileno(), wanted, self.start + self._position)
        self._position += done
        return done

    def load(self, device: str) -> Tensor:
        """The tensor; on `meta`, which reads no numbers, what it is alone."""
        record: Any = self
        tensor: Tensor = torch.load(record, map_location=device, weights_only=True)
        return tensor

    def numbers(self, described: Tensor) -> Run | None:
        """Where the numbers of the tensor lie, row by row; null: it was saved in another way than that.

        Args:
            described: the tensor on `meta`.
        """
        record: Any = self
        with zipfile.ZipFile(record) as archive:
            entries = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        numbers, order = entries.get("data/0"), entries.get("byteorder")
        if numbers is None or order is None or numbers.compress_type != zipfile.ZIP_STORED:
            return None
        if not described.is_contiguous() or described.storage_offset() or numbers.file_size != described.nbytes:
            return None
        return self._place(numbers) if _bytes_at(self._place(order)) == sys.byteorder.encode() else None

    def _place(self, entry: zipfile.ZipInfo) -> Run:
        """Where an entry's bytes lie: behind its own header, which repeats its name and pads it with an extra field."""
        name, extra = struct.unpack("<26xHH", _bytes_at(Run(self._file, self.start + entry.header_offset, 30)))
        return Run(self._file, self.start + entry.header_offset + 30 + name + extra, entry.file_size)


def _bytes_at(run: Run) -> bytes:
    found = bytearray(run.length)
    fill(run.file.fileno(), memoryview(found), run.start)
    return bytes(found)


def save_without_numbers(file: io.FileIO, dtype: torch.dtype, shape: torch.Size) -> TorchRecord:
    """Write a tensor's record at the end of `file`, with a hole where its numbers belong."""
    start = file.seek(0, os.SEEK_END)
    written: Any = _WithHoles()
    with _without_crc32():
        # The memory that it is given is never touched, so it takes none.
        torch.save(torch.empty(shape, dtype=dtype), written)
    # Not by torch: what a write raises in there, such as a full disk, it turns into an error about positions.
    for place, data in written.pieces:
        pour(file.fileno(), memoryview(data), start + place)
    return TorchRecord(file, start, written.length)


class _WithHoles:
    """What `torch.save` writes for one tensor but for what is long: that is its numbers alone."""

    _LONGEST = 1 << 16
    """Bytes; the description of a tensor has some hundred."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        """Where each begins, and its bytes."""
        self.length = 0

    def write(self, data: memoryview | bytes) -> int:
        if len(data) <= self._LONGEST:
            self.pieces.append((self.length, bytes(data)))
        self.length += len(data)
        return len(data)

    def flush(self) -> None: ...


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` computes no CRC-32: no loader checks it, and at 0.2 GB/s it takes longer than everything else."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(computed)
