"""The description of a `torch_dist` checkpoint, `.metadata`: a pickle of torch.distributed.checkpoint's classes.

It is read without them: importing that package takes three seconds of processor time, twice as long as torch itself,
and a checkpoint from elsewhere must not be able to run code.
"""

import io
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron_embed.checkpoint.safe_unpickler import COMMON_FILE, MEGATRON_FILE, METADATA_FILE, NoCodeUnpickler

_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
             "common_backend": "torch", "common_backend_version": 1}


class ChunkStorageMetadata:
    """A chunk of a tensor that is stored separately."""

    offsets: torch.Size
    sizes: torch.Size

    def has(self, index: int) -> bool:
        """Whether the chunk holds a part of slice `index` along the first axis."""
        return self.offsets[0] <= index < self.offsets[0] + self.sizes[0]


class TensorProperties:
    """Dtype of a tensor, from a pickled tuple."""

    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class TensorStorageMetadata:
    """A tensor: its dtype, its size and its chunks."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


class MetadataIndex:
    """Name of a chunk: its tensor's key and its offset."""

    fqn: str
    offset: torch.Size | None = None


class StorageInfo:
    """Location of a chunk: file, offset and length in bytes."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: ClassVar[Any] = None
    """Usually absent from the pickle if there are none."""


class Metadata:
    """The whole description."""

    state_dict_metadata: Mapping[str, Any]
    storage_data: Mapping[MetadataIndex, StorageInfo]


@dataclass(frozen=True)
class WrittenChunk:
    """One chunk of a tensor that was written."""

    offsets: torch.Size
    sizes: torch.Size
    start: int
    """First byte in the file."""
    length: int


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor that was written into one file."""

    dtype: torch.dtype
    size: torch.Size
    chunks: list[WrittenChunk] = field(default_factory=list)


def write_description(directory: Path, file: str, tensors: Mapping[str, WrittenTensor]) -> None:
    """Write the files that turn `file` into a checkpoint and sync them to the disk; `.metadata` last."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as dcp

    described: dict[str, dcp.STORAGE_TYPES] = {}
    storage: dict[dcp.MetadataIndex, Any] = {}
    for key, tensor in tensors.items():
        chunks = [dcp.ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.sizes) for chunk in tensor.chunks]
        described[key] = dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=tensor.dtype), size=tensor.size, chunks=chunks)
        for index, chunk in enumerate(tensor.chunks):
            storage[dcp.MetadataIndex(key, chunk.offsets, index)] = filesystem._StorageInfo(
                relative_path=file, offset=chunk.start, length=chunk.length)
    metadata = dcp.Metadata(state_dict_metadata=described, planner_data={key: (key,) for key in described},
                            storage_data=storage, storage_meta=dcp.StorageMeta())
    common = io.BytesIO()
    torch.save({}, common)
    for name, data in ((COMMON_FILE, common.getvalue()), (MEGATRON_FILE, json.dumps(_BACKENDS).encode()),
                       (METADATA_FILE, pickle.dumps(metadata))):
        with (directory / name).open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


class MetadataUnpickler(NoCodeUnpickler):
    """Unpickler of the classes above and nothing else."""

    CLASSES: ClassVar[Mapping[str, Any]] = {
        "Metadata": Metadata, "TensorStorageMetadata": TensorStorageMetadata, "TensorProperties": TensorProperties,
        "ChunkStorageMetadata": ChunkStorageMetadata, "MetadataIndex": MetadataIndex, "_StorageInfo": StorageInfo}
