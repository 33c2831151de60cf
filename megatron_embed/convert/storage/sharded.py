"""A model's tensors as one safetensors file, or as shards of a largest size with their index."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import write_json
from megatron_embed.convert.hf_directory import INDEX_FILE, SINGLE_FILE
from megatron_embed.convert.storage.byte_range import Run
from megatron_embed.convert.storage.safetensors_file import SafetensorsWriter
from megatron_embed.errors import CheckpointError

Announced = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor to come."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10**9) or "512MiB" (2**20). Raises CheckpointError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size = {text!r} is no size; write it like 5GB or 512MiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


class ShardedWriter:
    """Writes announced tensors, in their order, into as few files as `max_shard_bytes` allows."""

    def __init__(self, directory: Path, tensors: Sequence[Announced], max_shard_bytes: int) -> None:
        self._directory = directory
        self._shards = _split(tensors, max_shard_bytes)
        self._shard_of = {name: number for number, shard in enumerate(self._shards) for name, _, _ in shard}
        self._left = [len(shard) for shard in self._shards]
        self._open: dict[int, SafetensorsWriter] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one announced tensor in its file."""
        self._writer(name).write(name, tensor)
        self.done(name)

    def place(self, name: str) -> Run:
        """Where an announced tensor's bytes belong; the caller puts them there, then says `done`."""
        return self._writer(name).place(name)

    def done(self, name: str) -> None:
        """A tensor is in its place; a file is synced and closed with its last tensor."""
        number = self._shard_of[name]
        self._left[number] -= 1
        if not self._left[number]:
            self._open.pop(number).__exit__(None)

    def _writer(self, name: str) -> SafetensorsWriter:
        number = self._shard_of[name]
        if number not in self._open:
            self._open[number] = SafetensorsWriter(self._directory / self._file_name(number), self._shards[number])
        return self._open[number]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Write the index, if there are several files. Every announced tensor must have been written."""
        for writer in self._open.values():
            writer.__exit__(kind)
        if kind is None:
            assert not any(self._left), "announced and never written"
            self._write_index()

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            size = sum(math.prod(shape) * dtype.itemsize for shard in self._shards for _, dtype, shape in shard)
            weight_map = {name: self._file_name(number) for name, number in sorted(self._shard_of.items())}
            write_json(self._directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _split(tensors: Sequence[Announced], max_shard_bytes: int) -> list[list[Announced]]:
    """Consecutive tensors per file; one that is larger than a file may be has a file of its own."""
    shards: list[list[Announced]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += size
    return shards
