"""One tensor as `torch.save` writes it, inside a larger file: a zip archive whose entry `data/0` holds its data."""

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

from megatron_embed.convert.storage.byte_range import ByteRange, read_at, write_at
from megatron_embed.models.file_checks import refuse_compressed


class TorchRecord(io.RawIOBase):
    """A part of a file that `torch.load` can read as a file."""

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
        """Fill the buffer or reach the end: torch treats a shorter read as a damaged file."""
        view = memoryview(buffer).cast("B")
        wanted = view[:max(0, min(len(view), self.length - self._position))]
        done = read_at(self._file.fileno(), wanted, self.start + self._position)
        self._position += done
        return done

    def load(self, device: str) -> Tensor:
        """The tensor; on `meta` its dtype and shape alone, without reading its data."""
        record: Any = self
        refuse_compressed(record)
        tensor: Tensor = torch.load(record, map_location=device, weights_only=True)
        return tensor

    def data_range(self, described: Tensor) -> ByteRange | None:
        """The range of the tensor's data, row by row; None if it is stored in another way.

        Args:
            described: the tensor on `meta`.
        """
        record: Any = self
        with zipfile.ZipFile(record) as archive:
            entries = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        data, order = entries.get("data/0"), entries.get("byteorder")
        if data is None or order is None or data.compress_type != zipfile.ZIP_STORED:
            return None
        if not described.is_contiguous() or described.storage_offset() or data.file_size != described.nbytes:
            return None
        return self._entry_range(data) if _read_range(self._entry_range(order)) == sys.byteorder.encode() else None

    def _entry_range(self, entry: zipfile.ZipInfo) -> ByteRange:
        """The range of an entry, behind its own header, which repeats its name and pads it with an extra field."""
        name, extra = struct.unpack("<26xHH", _read_range(ByteRange(self._file, self.start + entry.header_offset, 30)))
        return ByteRange(self._file, self.start + entry.header_offset + 30 + name + extra, entry.file_size)


def _read_range(byte_range: ByteRange) -> bytes:
    buffer = bytearray(byte_range.length)
    read_at(byte_range.file.fileno(), memoryview(buffer), byte_range.start)
    return bytes(buffer)


def save_without_data(file: io.FileIO, dtype: torch.dtype, shape: torch.Size) -> TorchRecord:
    """Append a tensor's record to `file`, with a hole in place of its data."""
    start = file.seek(0, os.SEEK_END)
    written: Any = _HoleWriter()
    with _without_crc32():
        # The empty tensor's memory is never touched, so it takes none.
        torch.save(torch.empty(shape, dtype=dtype), written)
    # Not written by torch, which reports a failing write, such as a full disk, as an error about positions.
    for offset, data in written.parts:
        write_at(file.fileno(), memoryview(data), start + offset)
    return TorchRecord(file, start, written.length)


class _HoleWriter:
    """Keeps what `torch.save` writes for one tensor except the longest part, its data."""

    _LONGEST = 1 << 16
    """Bytes that are kept of one call; the description of a tensor has a few hundred."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []
        """(offset, bytes) of each part that is kept."""
        self.length = 0

    def write(self, data: memoryview | bytes) -> int:
        if len(data) <= self._LONGEST:
            self.parts.append((self.length, bytes(data)))
        self.length += len(data)
        return len(data)

    def flush(self) -> None: ...


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Switch off the CRC-32 of `torch.save`: no loader checks it, and at 0.2 GB/s it takes longest of all."""
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(previous)
