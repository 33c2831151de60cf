"""Read and write safetensors files at known offsets (`pread`, `pwrite`): memory holds one tensor, never a mapped file.

Mapped pages count as resident memory once touched: `safetensors.safe_open` would show a whole shard as used.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from megatron_embed.config.json_file import refuse_many_brackets
from megatron_embed.convert.storage.byte_range import ByteRange, read_at, write_at
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import open_regular

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Names that the format uses for dtypes."""
LONGEST_HEADER = 100_000_000
"""Bytes of a header; the limit of the safetensors library."""
_MOST_VALUES = 4_000_000
"""In a header: of numbers a list takes eight times the memory of its text. A tensor has about 6."""
_LARGEST = 2**63 - 1
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory as bytes, no copy. The tensor must be contiguous and on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def checksum(tensor: Tensor) -> bytes:
    """XXH3-128 of a tensor's bytes: detects accidental corruption, not an adversary."""
    return xxhash.xxh3_128_digest(bytes_of(tensor.contiguous()))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file opened for reading; `entries` is its header, by tensor name."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: not a safetensors file, or shorter than its header says (an interrupted download).
        """
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
        try:
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def byte_range(self, name: str) -> ByteRange:
        """The range of the tensor's bytes."""
        entry = self.entries[name]
        return ByteRange(self._file, entry.offset, entry.nbytes)

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        entry = self.entries[name]
        return self._read_bytes(entry.offset, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows (`dim` 0) or columns (`dim` 1 of a matrix) `start` to `stop`; no other byte is read."""
        entry = self.entries[name]
        shape = (*entry.shape[:dim], stop - start, *entry.shape[dim + 1:])
        if dim == 0:
            row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            data = self._read_bytes(entry.offset + start * row_bytes, (stop - start) * row_bytes)
            return data.view(entry.dtype).reshape(shape)
        if dim != 1 or len(entry.shape) != 2:
            raise ValueError(f"slices of dim {dim} of a tensor of shape {entry.shape} are not supported")
        num_rows, row_bytes = entry.shape[0], entry.shape[1] * entry.dtype.itemsize
        slice_bytes = (stop - start) * entry.dtype.itemsize
        data = torch.empty(num_rows * slice_bytes, dtype=torch.uint8)
        for row in range(num_rows):
            offset = entry.offset + row * row_bytes + start * entry.dtype.itemsize
            self._read_into(bytes_of(data[row * slice_bytes:(row + 1) * slice_bytes]), offset)
        return data.view(entry.dtype).reshape(shape)

    def _read_bytes(self, offset: int, length: int) -> Tensor:
        data = torch.empty(length, dtype=torch.uint8)
        self._read_into(bytes_of(data), offset)
        return data

    def _read_into(self, target: memoryview, offset: int) -> None:
        """Read exactly len(target) bytes from `offset`."""
        done = read_at(self._file.fileno(), target, offset)
        if done < len(target):
            raise CheckpointError(f"{self.path}: ended at byte {offset + done} while it was read; "
                                  "do not change it during a conversion")

    def _read_header(self) -> dict[str, TensorEntry]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little") if size >= 8 else size
        remedy = "is it a safetensors file? Git LFS pointers and interrupted downloads are not; fetch it again"
        if size < 8 or 8 + length > size:
            raise CheckpointError(f"{self.path}: no readable header in {size} bytes: {remedy}")
        if length > LONGEST_HEADER:
            raise CheckpointError(f"{self.path}: a header of {length} bytes, but the format allows {LONGEST_HEADER}: "
                                  f"{remedy}")
        header = bytearray(length)
        self._read_into(memoryview(header), 8)
        try:
            refuse_many_brackets(header)
            if header.count(b",") > _MOST_VALUES:
                raise ValueError(f"more than {_MOST_VALUES:,} values")
            tensors = json.loads(header, object_pairs_hook=_unique_keys)
            tensors.pop("__metadata__", None)
            entries = {name: _entry(self.path, name, value, 8 + length) for name, value in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: header is not readable ({error}): {remedy}") from error
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != end:
                raise CheckpointError(f"{self.path}: {name} begins at byte {entry.offset}, but the data before it "
                                      f"ends at byte {end}; fetch the file again")
            end += entry.nbytes
        if end != size:
            what = "truncated" if end > size else "more than its tensors"
            raise CheckpointError(f"{self.path}: {what}: {size} bytes, but its header describes {end}; "
                                  "fetch the file again")
        return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys; `json` alone silently keeps the last of several."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key} occurs twice")
        values[key] = value
    return values


def _entry(path: Path, name: str, value: Mapping[str, Any], data_start: int) -> TensorEntry:
    """One header entry; its dtype must be known and its byte range must match its shape."""
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name}: dtype {value['dtype']!r} is not supported; known: {', '.join(DTYPES)}")
    for key in ("shape", "data_offsets"):
        sizes = value[key]
        if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= _LARGEST for size in sizes):
            raise CheckpointError(f"{path}: {name}: {key} = {_shortened(sizes)} must be a list of whole numbers from 0 "
                                  "on; fetch the file again")
    start, stop = value["data_offsets"]
    entry = TensorEntry(DTYPES[value["dtype"]], tuple(value["shape"]), data_start + start)
    if stop - start != entry.nbytes:
        raise CheckpointError(f"{path}: {name}: bytes {start} to {stop} cannot hold shape {list(entry.shape)} of "
                              f"{value['dtype']}; fetch the file again")
    return entry


def _shortened(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are declared first, with dtype and shape, then written in any order."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        # Widest elements first: readers view the bytes in place, so a tensor must start at a multiple of its element.
        ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, dtype, shape in ordered:
            length = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + length]}
            position += length
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.total_bytes = position
        self._header = header
        self._start = 8 + len(text)
        self._pending = {name for name, _, _ in tensors}
        self._file = io.FileIO(str(path), "w+")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a declared tensor."""
        entry = self._header[name]
        if list(tensor.shape) != entry["shape"] or _NAMES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was declared: {entry}")
        target = self.reserve(name)
        write_at(target.file.fileno(), bytes_of(tensor.detach().contiguous()), target.start)

    def reserve(self, name: str) -> ByteRange:
        """The range of a declared tensor; the caller writes its bytes before the file is closed."""
        start, stop = self._header[name]["data_offsets"]
        self._pending.discard(name)
        return ByteRange(self._file, self._start + start, stop - start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Sync to the disk and close; every declared tensor must have been written."""
        try:
            if kind is None:
                assert not self._pending, f"declared and never written: {sorted(self._pending)}"
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
