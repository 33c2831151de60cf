"""Megatron's `torch_dist` checkpoint format (torch.distributed.checkpoint's), one tensor at a time, without ranks.

The `save` of torch.distributed.checkpoint and of megatron.core.dist_checkpointing want the whole state dict and a
process group. A conversion has neither: it streams.
"""

import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from megatron_embed.convert.safetensors_file import fill, first_line
from megatron_embed.errors import CheckpointError

METADATA_FILE = ".metadata"
MEGATRON_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
             "common_backend": "torch", "common_backend_version": 1}


class DcpWriter:
    """Writes a `torch_dist` checkpoint of whole tensors into an existing directory.

    Readable by `torch.distributed.checkpoint.load` and `megatron.core.dist_checkpointing.load` at any parallel layout.
    """

    _FILE: ClassVar[str] = "__0_0.distcp"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors: dict[str, dcp.STORAGE_TYPES] = {}
        self._storage: dict[dcp.MetadataIndex, Any] = {}
        self._file = (directory / self._FILE).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def add(self, key: str, tensor: Tensor, *, index: int | None = None, count: int | None = None) -> None:
        """Append one whole tensor; it is on its way to the disk when this returns.

        With `index`, `tensor` is that one of `count` slices along a first axis that the stored tensor has in front.
        """
        tensor = tensor.detach().contiguous()
        size = tensor.size()
        if index is not None:
            assert count is not None and 0 <= index < count
            tensor, size = tensor[None], torch.Size([count, *size])
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage behind a view
        start = self._file.tell()
        with _without_crc32():
            torch.save(tensor, self._file)
        offsets = torch.Size([index or 0, *[0] * (tensor.dim() - 1)] if tensor.dim() else [])
        entry = self._tensors.setdefault(key, dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=tensor.dtype), size=size, chunks=[]))
        assert isinstance(entry, dcp.TensorStorageMetadata)
        assert entry.size == size and entry.properties.dtype == tensor.dtype, f"{key}: its slices differ"
        assert all(chunk.offsets != offsets for chunk in entry.chunks), f"{key} added twice"
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=tensor.size()))
        info = filesystem._StorageInfo(relative_path=self._FILE, offset=start, length=self._file.tell() - start)
        self._storage[dcp.MetadataIndex(key, offsets, len(entry.chunks) - 1)] = info

    def close(self) -> None:
        """Write what describes the tensors; without it there is no checkpoint. Synced to the disk."""
        _sync_and_close(self._file)
        metadata = dcp.Metadata(state_dict_metadata=self._tensors, planner_data={key: (key,) for key in self._tensors},
                                storage_data=self._storage, storage_meta=dcp.StorageMeta())
        with (self._directory / COMMON_FILE).open("wb") as file:
            torch.save({}, file)
            file.flush()
            os.fsync(file.fileno())
        for name, data in ((MEGATRON_FILE, json.dumps(_BACKENDS).encode()), (METADATA_FILE, pickle.dumps(metadata))):
            with (self._directory / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


class DcpReader:
    """Reads whole tensors of a `torch_dist` checkpoint, whatever number of ranks and files it was written by.

    Memory holds one tensor and one of its chunks. Only tensors are seen; Megatron's pickled objects are left alone.
    """

    def __init__(self, directory: Path) -> None:
        """Read the description of the checkpoint, never running code that a pickle names.

        Raises:
            CheckpointError: no such checkpoint, or one that did not finish.
        """
        self.directory = directory
        self._file: io.FileIO | None = None
        path = directory / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            tensors, storage = metadata.state_dict_metadata, metadata.storage_data
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory}: no {METADATA_FILE}, so this is no finished torch_dist checkpoint; "
                                  "give a directory that a save or conversion completed") from error
        except (OSError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, EOFError, IndexError) as error:
            raise CheckpointError(f"{path}: not readable as torch_dist metadata ({error}); "
                                  "is the file complete?") from error
        self._tensors = {key: value for key, value in tensors.items() if isinstance(value, dcp.TensorStorageMetadata)}
        self._storage = {(index.fqn, tuple(index.offset)): info for index, info in storage.items()
                         if index.offset is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._file is not None:
            self._file.close()

    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors."""
        return tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype that is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The whole tensor, or its slice `index` along the first axis, put together from the chunks that hold it.

        Raises:
            CheckpointError: a file or chunk is missing, short or does not fit its description.
        """
        entry = self._tensors[key]
        if index is None and len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._chunk(key, entry.chunks[0])
        whole = torch.empty(entry.size if index is None else entry.size[1:], dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if index is not None:
                if not offsets[0] <= index < offsets[0] + sizes[0]:
                    continue
                offsets, sizes = offsets[1:], sizes[1:]
            view = whole
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                view = view.narrow(dim, offset, size)
            stored = self._chunk(key, chunk)
            view.copy_(stored if index is None else stored[index - chunk.offsets[0]])
            covered += view.numel()
        if covered != whole.numel():
            raise CheckpointError(f"{self.directory}: {key}: chunks hold {covered} of {whole.numel()} numbers; "
                                  "was a rank's file lost? Take another checkpoint")
        return whole

    def _chunk(self, key: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        """One stored piece of a tensor."""
        info = self._storage.get((key, tuple(chunk.offsets)))
        if info is None or getattr(info, "transform_descriptors", None):  # absent from the pickle when there are none
            raise CheckpointError(f"{self.directory}: {key}: a piece is not stored, or is compressed; "
                                  "write it as plain torch_dist")
        path = self.directory / info.relative_path
        try:
            file = self._open(path)
            if os.fstat(file.fileno()).st_size < info.offset + info.length:
                raise CheckpointError(f"{path}: truncated: {key} ends at byte {info.offset + info.length}; "
                                      "take another checkpoint")
            section: Any = _Section(file, info.offset, info.length)
            tensor: Tensor = torch.load(section, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {key} is not readable ({first_line(error).split('. ')[0]}); "
                                  "take another checkpoint") from error
        if tensor.shape != chunk.sizes or tensor.dtype != self.dtype(key):
            raise CheckpointError(f"{path}: {key}: found {tensor.dtype} {list(tensor.shape)}, described as "
                                  f"{self.dtype(key)} {list(chunk.sizes)}; take another checkpoint")
        return tensor

    def _open(self, path: Path) -> io.FileIO:
        """The file, kept open while the next tensor comes from it too."""
        if self._file is None or self._file.name != str(path):
            if self._file is not None:
                self._file.close()
            self._file = io.FileIO(str(path))
        return self._file


class _Section(io.RawIOBase):
    """A part of a file as a file of its own, as `torch.load` wants it."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer or reach the end: torch takes a shorter read for a damaged file."""
        view = memoryview(buffer).cast("B")
        wanted = view[:max(0, min(len(view), self._length - self._position))]
        done = fill(self._file.fileno(), wanted, self._start + self._position)
        self._position += done
        return done


class _Ignored:
    """Stands for any object of the metadata that is not needed to read tensors; holds nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, value: object) -> None: ...
    def extend(self, values: object) -> None: ...
    def add(self, value: object) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch's metadata classes and nothing else: a checkpoint from elsewhere must not be able to run code."""

    _CLASSES: ClassVar[dict[str, Any]] = {
        cls.__qualname__: cls
        for cls in (dcp.Metadata, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata,
                    dcp.TensorProperties, dcp.MetadataIndex, dcp.StorageMeta, dcp._MEM_FORMAT_ENCODING,
                    filesystem._StorageInfo)}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint.") and name in self._CLASSES:
            return self._CLASSES[name]
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        return _Ignored


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.save` computes no CRC-32: no loader checks it, and at 0.2 GB/s it takes longer than everything else."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(computed)


def _sync_and_close(file: io.BufferedWriter) -> None:
    """Everything written is on the disk afterwards."""
    with file:
        file.flush()
        os.fsync(file.fileno())
