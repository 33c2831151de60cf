"""Checkpoints are read without running code, whoever wrote them, and without leaving their folder.

A `torch_dist` checkpoint holds pickles: `.metadata`, which torch opens with `pickle.load`; objects among the tensors,
which it opens with `torch.load(weights_only=False)`; `common.pt`. A pickle may name any function and call it. Here
names are looked up in a short list. Others are refused, except those of torch and Megatron (such as plans of who wrote
what), which become placeholders.
"""

import io
import json
import os
import pickle
import pickletools
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import torch

from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import open_regular, plain_name, refuse_compressed

METADATA_FILE = ".metadata"
MEGATRON_FILE = "metadata.json"
COMMON_FILE = "common.pt"
HEAD_KEYS = "model.head."
"""Prefix of the keys of a reranker's head."""
DENSE_KEYS = "model.dense."
"""Prefix of the keys of Dense modules."""
_OWN = ("torch", "megatron", "nvidia_resiliency_ext", "pathlib", "uuid", "collections")
"""Packages whose objects may stand in `.metadata` beside those that are needed, and are left out."""
_LARGEST_PICKLE = 256 << 20
_LARGEST_NUMBER = 1 << 24
"""The largest number under which a pickle may keep an object: Python reserves memory for all numbers below it."""
_RESERVING = ("PUT", "LONG_BINPUT", "FRAME")
"""Instructions of a pickle for which Python reserves memory before it has read so much."""
_BUILTIN = {("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("builtins", "bytearray"): bytearray}


class Placeholder:
    """Stands for any object of the metadata that is not needed to read tensors; holds nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, value: object) -> None: ...
    def extend(self, values: object) -> None: ...
    def add(self, value: object) -> None: ...


class NoCodeUnpickler(pickle.Unpickler):
    """Builds the classes that it knows, and runs no other code."""

    CLASSES: ClassVar[Mapping[str, Any]] = {}
    """Those of torch.distributed.checkpoint, by name."""

    def __init__(self, file: BinaryIO | io.FileIO) -> None:
        """Raises UnpicklingError if the pickle would take much more memory than the file."""
        start = file.tell()
        _refuse_large_numbers(file)
        file.seek(start)
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name in the pickle. Raises UnpicklingError for one that is not allowed there."""
        if module.startswith("torch.distributed.checkpoint.") and name in self.CLASSES:
            return self.CLASSES[name]
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype | torch.layout):
            return torch.__dict__[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) in _BUILTIN:
            return _BUILTIN[module, name]
        if module.split(".")[0] in _OWN:
            return Placeholder
        raise pickle.UnpicklingError(f"it names {module}.{name}, and code that a checkpoint names is never run")


def load_pickle(file: BinaryIO) -> Any:
    """`pickle.load` of a checkpoint's `.metadata`, with torch's own classes."""
    return _torch_unpickler()(file).load()


def _refuse_large_numbers(file: BinaryIO | io.FileIO) -> None:
    """Raises UnpicklingError for a pickle that would take much more memory than its file: one with a length, or a
    number for an object, that is larger than the file or than any that torch writes."""
    size = os.fstat(file.fileno()).st_size
    if size > _LARGEST_PICKLE:
        raise pickle.UnpicklingError(f"it is longer than {_LARGEST_PICKLE >> 20:,} MiB, which no such file is")
    try:
        for instruction, number, position in pickletools.genops(file.read()):
            if instruction.name in _RESERVING and number is not None and number > min(size, _LARGEST_NUMBER):
                raise pickle.UnpicklingError(f"it asks for room for {number:,} objects or bytes at its byte "
                                             f"{position or 0:,}, more than a description of tensors needs")
    except ValueError as error:  # an unknown instruction, or one whose argument is longer than the rest of the file
        raise pickle.UnpicklingError(str(error)) from error


def check_description(folder: Path) -> None:
    """Check that the description of the tensors in `folder` names no code, and no file outside.

    Raises:
        CheckpointError: it does.
    """
    file = folder / METADATA_FILE
    _readable(folder / MEGATRON_FILE, _check_backend)
    metadata = _readable(file, load_pickle)
    if metadata is not None:
        try:
            for info in metadata.storage_data.values():
                plain_name(info.relative_path, f"{file}: relative_path of a tensor")
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{file}: not readable as torch_dist metadata ({error}); take another checkpoint"
                                  ) from error
    _readable(folder / COMMON_FILE, _load_plain)


def install() -> None:
    """Make torch's reader of checkpoints open pickles as above, in this process."""
    from torch.distributed.checkpoint import default_planner, filesystem

    reading: Any = filesystem
    if reading.pickle is not pickle:
        return
    reading.pickle = types.SimpleNamespace(**{**vars(pickle), "load": load_pickle})
    reading.torch = types.SimpleNamespace(**{**vars(torch), "load": _load_tensor})
    planner: Any = default_planner.DefaultLoadPlanner
    planner.load_bytes = _checked(planner.load_bytes)


def _load_tensor(file: Any, **settings: Any) -> Any:
    """`torch.load` of a file that is not larger in memory: torch's reader loads every tensor as a file of its own."""
    refuse_compressed(file)
    return torch.load(file, **settings)


def _checked(load_bytes: Callable[..., Any]) -> Callable[..., Any]:
    """torch's function for one object, after a reading of the same bytes that allows no code."""
    def load(planner: Any, read_item: Any, value: Any) -> Any:
        _load_plain(value)
        value.seek(0)
        return load_bytes(planner, read_item, value)

    return load


def _load_plain(file: Any) -> Any:
    """`torch.load` of plain values and tensors. torch's own message about others advises to run their code."""
    refuse_compressed(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"\b(?:GLOBAL|global|class|function) ([\w.]+)", str(error))
        what = f"names {named.group(1)}" if named else "is damaged, or names more than plain values"
        raise pickle.UnpicklingError(f"it {what}, and code that a checkpoint names is never run") from error


def _readable(file: Path, read: Callable[[Any], Any]) -> Any:
    """The result of `read` for an ordinary file; None if there is none, which the actual reader reports."""
    try:
        with open_regular(file) as opened:
            return read(opened)
    except FileNotFoundError:
        return None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle ends in errors of every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: not readable without running code, or damaged ({reason}); take another "
                              "checkpoint") from error


def _check_backend(file: BinaryIO) -> None:
    """Megatron has readers of other formats, among them ones that open pickles of their own."""
    description = json.loads(file.read(1 << 20))
    if not isinstance(description, dict) or description.get("sharded_backend") != "torch_dist":
        raise ValueError("sharded_backend must be 'torch_dist'")


def _torch_unpickler() -> type[NoCodeUnpickler]:
    from torch.distributed.checkpoint import filesystem, metadata

    known: Any = metadata
    stored: Any = filesystem
    names = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
             "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
    classes = {**{name: vars(known)[name] for name in names if name in vars(known)},
               "_StorageInfo": stored._StorageInfo}
    return type("TorchUnpickler", (NoCodeUnpickler,), {"CLASSES": classes})


def _layout(name: object) -> torch.layout:
    """torch.serialization's own, without its imports."""
    layout = torch.__dict__.get(str(name).removeprefix("torch."))
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name!r} is not a layout of tensors")
    return layout
