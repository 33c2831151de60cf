"""Write a model's tensors as one safetensors file, or as shards of limited size with their index."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import write_json
from megatron_embed.convert.hf_directory import INDEX_FILE, SINGLE_FILE
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.safetensors_file import SafetensorsWriter
from megatron_embed.errors import CheckpointError

DeclaredTensor = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor that will be written."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10**9) or "512MiB" (2**20). Raises CheckpointError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size = {text!r} is not a size; write it like 5GB or 512MiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


class ShardedWriter:
    """Writes declared tensors, in their order, into as few files as `max_shard_bytes` allows."""

    def __init__(self, directory: Path, tensors: Sequence[DeclaredTensor], max_shard_bytes: int) -> None:
        self._directory = directory
        self._shards = _split(tensors, max_shard_bytes)
        self._shard_of = {name: index for index, shard in enumerate(self._shards) for name, _, _ in shard}
        self._left = [len(shard) for shard in self._shards]
        self._open: dict[int, SafetensorsWriter] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor."""
        self._writer(name).write(name, tensor)
        self.done(name)

    def reserve(self, name: str) -> ByteRange:
        """The range of a declared tensor; the caller writes its bytes, then calls `done`."""
        return self._writer(name).reserve(name)

    def done(self, name: str) -> None:
        """Mark a tensor as written; a file is synced and closed after its last tensor."""
        index = self._shard_of[name]
        self._left[index] -= 1
        if not self._left[index]:
            self._open.pop(index).__exit__(None)

    def _writer(self, name: str) -> SafetensorsWriter:
        index = self._shard_of[name]
        if index not in self._open:
            self._open[index] = SafetensorsWriter(self._directory / self._file_name(index), self._shards[index])
        return self._open[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Write the index, if there are several files. Every declared tensor must have been written."""
        for writer in self._open.values():
            writer.__exit__(kind)
        if kind is None:
            assert not any(self._left), "declared and never written"
            self._write_index()

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            size = sum(math.prod(shape) * dtype.itemsize for shard in self._shards for _, dtype, shape in shard)
            weight_map = {name: self._file_name(index) for name, index in sorted(self._shard_of.items())}
            write_json(self._directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _file_name(self, index: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _split(tensors: Sequence[DeclaredTensor], max_shard_bytes: int) -> list[list[DeclaredTensor]]:
    """Consecutive tensors of each file; a tensor above the limit gets a file of its own."""
    shards: list[list[DeclaredTensor]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    return shards
