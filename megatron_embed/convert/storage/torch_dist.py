"""Megatron's `torch_dist` checkpoint format (torch.distributed.checkpoint's), one tensor at a time, without ranks.

`save` of torch.distributed.checkpoint and of megatron.core.dist_checkpointing needs the whole state dict and a process
group; a conversion streams its tensors.
"""

import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import METADATA_FILE
from megatron_embed.convert.storage.byte_range import ByteRange, write_at
from megatron_embed.convert.storage.safetensors_file import bytes_of
from megatron_embed.convert.storage.torch_dist_metadata import (
    ChunkStorageMetadata,
    MetadataUnpickler,
    TensorStorageMetadata,
    WrittenChunk,
    WrittenTensor,
    write_description,
)
from megatron_embed.convert.storage.torch_record import TorchRecord, save_without_data
from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.models.file_checks import open_regular, plain_name


class DcpWriter:
    """Writes a `torch_dist` checkpoint of whole tensors into an existing directory.

    Readable by `torch.distributed.checkpoint.load` and `megatron.core.dist_checkpointing.load` at any parallel layout.
    """

    _FILE: ClassVar[str] = "__0_0.distcp"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors: dict[str, WrittenTensor] = {}
        self._file = io.FileIO(str(directory / self._FILE), "w+")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def add(self, key: str, tensor: Tensor, *, index: int | None = None, count: int | None = None) -> None:
        """Append one whole tensor, not yet synced to the disk. `index`, `count`: see `reserve`."""
        target = self.reserve(key, tensor.dtype, tensor.shape, index=index, count=count)
        write_at(target.file.fileno(), bytes_of(tensor.detach().contiguous()), target.start)

    def reserve(self, key: str, dtype: torch.dtype, shape: Sequence[int], *, index: int | None = None,
                count: int | None = None) -> ByteRange:
        """Append one whole tensor's description; return the range that the caller fills before the file is closed.

        With `index`, the tensor is that one of `count` slices along an additional first axis of the stored tensor.
        """
        size, sizes = torch.Size(shape), torch.Size(shape)
        if index is not None:
            assert count is not None and 0 <= index < count
            size, sizes = torch.Size([count, *shape]), torch.Size([1, *shape])
        record = save_without_data(self._file, dtype, sizes)
        entry = self._tensors.setdefault(key, WrittenTensor(dtype, size))
        assert (entry.dtype, entry.size) == (dtype, size), f"{key}: its slices differ"
        offsets = torch.Size([index or 0, *[0] * (len(sizes) - 1)] if sizes else [])
        assert all(chunk.offsets != offsets for chunk in entry.chunks), f"{key} added twice"
        entry.chunks.append(WrittenChunk(offsets, sizes, record.start, record.length))
        data = record.data_range(record.load("meta"))
        assert data is not None, f"{key}: torch.save has changed its format"
        return data

    def close(self) -> None:
        """Write the description of the tensors, which completes the checkpoint, and sync everything to the disk."""
        with self._file, ThreadPoolExecutor(max_workers=1) as pool:
            synced = pool.submit(os.fsync, self._file.fileno())  # in parallel with pickling the description
            write_description(self._directory, self._FILE, self._tensors)
            synced.result()


class DcpReader:
    """Reads whole tensors of a `torch_dist` checkpoint, however many ranks and files it was written by.

    Memory holds one tensor and one of its chunks. Megatron's pickled objects are not read.
    """

    _MOST_OPEN: ClassVar[int] = 64
    """Files open at the same time; a checkpoint may have one per rank that wrote it."""

    def __init__(self, directory: Path) -> None:
        """Read the description of the checkpoint, never running code that a pickle names.

        Raises:
            CheckpointError: no such checkpoint, or an incomplete one.
        """
        self.directory = directory
        self._files: dict[Path, io.FileIO] = {}
        path = directory / METADATA_FILE
        try:
            with open_regular(path) as file:
                metadata = MetadataUnpickler(file).load()
            tensors, storage = metadata.state_dict_metadata, metadata.storage_data
            for info in storage.values():
                plain_name(info.relative_path, f"{path}: relative_path of a tensor")
            _check_sizes(tensors.values())
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory}: no {METADATA_FILE}, so this is not a complete torch_dist checkpoint; "
                                  "give a directory that a save or conversion has finished") from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle raises errors of every kind
            raise CheckpointError(f"{path}: not readable as torch_dist metadata ({error or type(error).__name__}); "
                                  "is the file complete?") from error
        self._tensors = {key: value for key, value in tensors.items() if isinstance(value, TensorStorageMetadata)}
        self._storage = {(index.fqn, tuple(index.offset)): info for index, info in storage.items()
                         if index.offset is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        for file in self._files.values():
            file.close()

    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors."""
        return tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The whole tensor, or its slice `index` along the first axis, assembled from its chunks.

        Raises:
            CheckpointError: a file or chunk is missing, short or does not fit its description.
        """
        entry = self._tensors[key]
        if index is None and len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._load(key, entry.chunks[0], "cpu")
        first, whole_size = (0, entry.size) if index is None else (1, entry.size[1:])
        chunks = [chunk for chunk in entry.chunks if index is None or chunk.has(index)]
        covered = sum(math.prod(chunk.sizes[first:]) for chunk in chunks)
        if covered != math.prod(whole_size):
            raise CheckpointError(f"{self.directory}: {key}: chunks hold {covered} of {math.prod(whole_size)} "
                                  "elements; was a rank's file lost? Take another checkpoint")
        for chunk in chunks:  # checked before memory is allocated for the sizes that they claim
            with self._record(key, chunk):
                pass
        whole = torch.empty(whole_size, dtype=entry.properties.dtype)
        for chunk in chunks:
            stored, view = self._load(key, chunk, "cpu"), whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets[first:], chunk.sizes[first:], strict=True)):
                view = view.narrow(dim, offset, size)
            view.copy_(stored if index is None else stored[index - chunk.offsets[0]])
        return whole

    def byte_ranges(self, key: str, index: int | None = None) -> list[ByteRange] | None:
        """The ranges of the tensor that `read` would return, in order; None if the files do not hold it row by row.

        Valid until the next call, which may close some of the files.

        Raises:
            CheckpointError: as `read`.
        """
        entry = self._tensors[key]
        chunks = sorted((chunk for chunk in entry.chunks if index is None or chunk.has(index)),
                        key=lambda chunk: tuple(chunk.offsets[:1]))
        if len(chunks) > self._MOST_OPEN or any(chunk.sizes[1:] != entry.size[1:] for chunk in chunks):
            return None
        ranges: list[ByteRange] = []
        covered = 0
        for chunk in chunks:
            first, rows = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
            described = self._load(key, chunk, "meta")
            with self._record(key, chunk) as record:
                data = record.data_range(described)
            if data is None or (index is None and first != covered):
                return None
            row_bytes = data.length // max(1, rows)
            ranges.append(data if index is None else data.part((index - first) * row_bytes, row_bytes))
            covered += rows if index is None else 1
        return ranges if covered == (entry.size[0] if index is None and entry.size else 1) else None

    def _load(self, key: str, chunk: ChunkStorageMetadata, device: Literal["cpu", "meta"]) -> Tensor:
        """One stored chunk of a tensor; on `meta` without its data."""
        with self._record(key, chunk) as record:
            tensor = record.load(device)
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise CheckpointError(f"{self.directory}: {key}: found {tensor.dtype} {list(tensor.shape)}, described as "
                                  f"{self.dtype(key)} {list(chunk.sizes)}; take another checkpoint")
        return tensor

    @contextmanager
    def _record(self, key: str, chunk: ChunkStorageMetadata) -> Iterator[TorchRecord]:
        """The record of one chunk; errors while reading it become CheckpointErrors that name the tensor."""
        info = self._storage.get((key, tuple(chunk.offsets)))
        if info is None or info.transform_descriptors:
            raise CheckpointError(f"{self.directory}: {key}: a chunk is not stored, or is compressed; "
                                  "write it as plain torch_dist")
        entry = self._tensors[key]
        ends = (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
        if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > info.length or len(chunk.sizes) != len(
                entry.size) or any(end > size for end, size in zip(ends, entry.size, strict=True)):
            raise CheckpointError(f"{self.directory}: {key}: a chunk of {list(chunk.sizes)} elements at "
                                  f"{list(chunk.offsets)} cannot be in {info.length} bytes of a tensor of "
                                  f"{list(entry.size)}; take another checkpoint")
        path = self.directory / info.relative_path
        try:
            file = self._open(path)
            if os.fstat(file.fileno()).st_size < info.offset + info.length:
                raise CheckpointError(f"{path}: truncated: {key} ends at byte {info.offset + info.length}; "
                                      "take another checkpoint")
            yield TorchRecord(file, info.offset, info.length)
        except Exception as error:  # a damaged record raises errors of every kind
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {key} is not readable ({first_line(error).split('. ')[0]}); "
                                  "take another checkpoint") from error

    def _open(self, path: Path) -> io.FileIO:
        """The file, kept open until _MOST_OPEN others have been opened."""
        file = self._files.pop(path, None) or open_regular(path)
        self._files[path] = file
        if len(self._files) > self._MOST_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return file


def _check_sizes(tensors: Iterable[object]) -> None:
    """Raise ValueError for a negative size."""
    for tensor in tensors:
        if isinstance(tensor, TensorStorageMetadata):
            sizes = [*tensor.size, *(size for chunk in tensor.chunks for size in (*chunk.sizes, *chunk.offsets))]
            if min(sizes, default=0) < 0:
                raise ValueError("a tensor has a negative size")
