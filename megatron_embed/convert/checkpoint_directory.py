"""Our checkpoint directory, and writing any directory safely: under a temporary name, synced, then renamed.

    DIR/megatron_embed.json     description, see CheckpointInfo
    DIR/hf/                     every file of the Hugging Face source except weights
    DIR/hf/carried.safetensors  tensors that training does not use (pooler, lm_head), under the source's own names
    DIR/model/                  torch_dist checkpoint, keys `model.<parameter>`; training keeps its optimizer here too

A training run's directory holds step_XXXXXX/ directories of this layout and `latest`, a file that names the newest.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from megatron_embed.checkpoint.files import INFO_FILE, latest_checkpoint, sync_directory, sync_tree
from megatron_embed.config.json_file import read_json_file, read_json_object
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.lora_names import adapter_settings
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorEntry, bytes_of
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import check_files
from megatron_embed.models.joint_files import VECTORS_FILE, WEIGHTS_FILE
from megatron_embed.models.lora_settings import AdapterSettings
from megatron_embed.models.modules_json import read_modules, transformer_folder
from megatron_embed.models.quantization import QuantizedBase
from megatron_embed.names import HeadKind

PASSTHROUGH_FILE = "carried.safetensors"
FORMAT = 1

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5",
            "*.msgpack", "*.ot", "*.gguf", "*.onnx*", "*.ckpt")
_MODULE_FOLDER = re.compile(r"\d+_(Transformer|Pooling|Normalize|Dense|LogitScore|MultiVectorMask|SpladePooling)")
"""Names of module folders, as Sentence Transformers and our exports write them."""
_SIDECAR_BYTES = 64 << 20
"""Bytes allowed for config, tokenizer and headers in the check of free disk space."""
_SKIPPED_DIRECTORIES = ("onnx", "openvino", "original", "coreml", ".git", ".cache")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Contents of `megatron_embed.json`."""

    family: str
    """Name of the weight table."""
    dtype: str
    """Dtype of the model's weights: float32, bfloat16, ..."""
    source_architectures: list[str]
    """`architectures` of the Hugging Face config that the model came with."""
    prefixed: bool
    """Whether the source's files name the backbone's tensors with the family's prefix."""
    tied_copies: dict[str, str] = field(default_factory=dict)
    """Tied heads that the source stores as copies: name -> embedding that it repeats."""
    max_lengths: dict[str, int] = field(default_factory=dict)
    """Longest text of each role in training, in tokens; empty: sentence_bert_config.json's value holds for all."""
    head: HeadKind | None = None
    """Kind of the reranker's head that was trained with the model; None: none."""
    lora: dict[str, Any] | None = None
    """Fields of AdapterSettings, for a model with adapters."""
    base: dict[str, Any] | None = None
    """Fields of QuantizedBase, for adapters over quantized weights: `model/` holds no others then."""
    format: int = FORMAT

    @property
    def adapters(self) -> AdapterSettings | None:
        """Settings of the adapters; None without any."""
        return None if self.lora is None else adapter_settings(self.lora)

    @property
    def quantized_base(self) -> QuantizedBase | None:
        """The model whose quantized weights the adapters belong to; None if `model/` holds all weights."""
        return None if self.base is None else QuantizedBase(**self.base)


@dataclass(frozen=True)
class CheckpointDirectory:
    """One of our checkpoints."""

    path: Path
    info: CheckpointInfo

    @property
    def hf(self) -> Path:
        """Config, tokenizer and Sentence Transformers files."""
        return self.path / "hf"

    @property
    def model(self) -> Path:
        """The torch_dist checkpoint."""
        return self.path / "model"


class PassthroughFile:
    """A checkpoint's passthrough tensors, by their full names; a context manager."""

    stored_names: dict[str, str]
    """Full name -> name in the file."""

    def __init__(self, file: Path, family: Family, *, prefixed: bool) -> None:
        """`file` may be absent: then there are none."""
        self._file = SafetensorsFile(file) if file.is_file() else None
        stored = () if self._file is None else self._file.entries
        self.stored_names = {family.full_name(name, prefixed=prefixed): name for name in stored}

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Full names of the tensors."""
        return tuple(self.stored_names)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and size of a tensor."""
        assert self._file is not None
        return self._file.entries[self.stored_names[name]]

    def byte_range(self, name: str) -> ByteRange:
        """The range of the tensor's bytes."""
        assert self._file is not None
        return self._file.byte_range(self.stored_names[name])

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        assert self._file is not None
        return self._file.read(self.stored_names[name])

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim`."""
        assert self._file is not None
        return self._file.read_slice(self.stored_names[name], dim, start, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._file is not None:
            self._file.close()


def open_passthrough(checkpoint: CheckpointDirectory) -> PassthroughFile:
    """The tensors that a checkpoint keeps unchanged beside the trained ones; the caller closes them."""
    return PassthroughFile(checkpoint.hf / PASSTHROUGH_FILE, rules_for(checkpoint.info.family),
                       prefixed=checkpoint.info.prefixed)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is one of our checkpoints or a training run's directory of them."""
    return (Path(path) / INFO_FILE).is_file() or latest_checkpoint(path) is not None


def open_checkpoint(path: str | Path) -> CheckpointDirectory:
    """The checkpoint at `path`, or the newest one of the training run whose directory `path` is.

    Raises:
        CheckpointError: neither, or an unknown format.
    """
    path = Path(path)
    if not (path / INFO_FILE).is_file():
        path = latest_checkpoint(path) or path
    check_files(path)
    file = path / INFO_FILE
    if not file.is_file():
        hint = "; it is a Hugging Face directory already" if (path / "config.json").is_file() else ""
        if inner := next((folder for folder in sorted(path.glob("*")) if is_checkpoint(folder)), None):
            hint = f"; {inner} is one"
        raise CheckpointError(f"{path}: no {INFO_FILE}, so this is not a checkpoint of megatron-embed{hint}; "
                              "give a directory that `convert hf-to-megatron` or `train` wrote")
    try:
        values: Any = read_json_file(file)
        if values["format"] != FORMAT:
            raise CheckpointError(f"{file}: format = {values['format']!r}, but this version reads {FORMAT}; "
                                  "convert it with the version that wrote it")
        info = CheckpointInfo(**values)
        info.adapters, info.quantized_base  # noqa: B018 - raises for a damaged file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); take another checkpoint") from error
    return CheckpointDirectory(path, info)


def write_sidecar_files(source: str | Path, directory: Path, *, dtype: str | None = None,
                        max_lengths: dict[str, int] | None = None,
                        head: HeadKind | None = None,
                        adapters: AdapterSettings | None = None,
                        base: QuantizedBase | None = None) -> CheckpointInfo:
    """Write the sidecar files of a checkpoint, everything beside `model/`: `megatron_embed.json` and `hf/`.

    Args:
        source: the Hugging Face directory or the checkpoint of ours that the model came from.
        directory: the checkpoint being written; exists.
        dtype: dtype of the weights in its `model/`; None: the source's.
        max_lengths: tokens by role; None: the source's.
        head: kind of the reranker's head in `model/`.
        adapters: settings of the adapters in `model/`; None: the source's.
        base: the model whose quantized weights `model/` leaves out; None: the source's.
    Raises:
        CheckpointError: `source` is neither.
    """
    (directory / "hf").mkdir()
    if is_checkpoint(source):
        checkpoint = open_checkpoint(source)
        info = checkpoint.info
        copy_files(checkpoint.hf, directory / "hf")
        if (checkpoint.hf / PASSTHROUGH_FILE).is_file():
            shutil.copyfile(checkpoint.hf / PASSTHROUGH_FILE, directory / "hf" / PASSTHROUGH_FILE)
    else:
        with HFDirectory(source) as opened:
            info = _write_hf_files(opened, directory / "hf")
    info = replace(info, dtype=dtype or info.dtype,
                   max_lengths=info.max_lengths if max_lengths is None else max_lengths, head=head,
                   lora=info.lora if adapters is None else asdict(adapters),
                   base=info.base if base is None else asdict(base))
    write_json(directory / INFO_FILE, {key: value for key, value in asdict(info).items()
                                       if key not in ("head", "lora", "base") or value is not None})
    return info


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, as Transformers writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def module_directories(path: Path) -> Sequence[str]:
    """Sub-directories that `modules.json` of a Sentence Transformers directory names, e.g. 1_Pooling; else none.

    Raises CheckpointError for one that is not a plain name.
    """
    file = path / "modules.json"
    return [module.path for module in read_modules(file) if module.path] if file.is_file() else ()


def copy_files(source: Path, destination: Path) -> None:
    """Copy every file except weights of the transformer; modules of Sentence Transformers keep theirs, and a joint
    model its heads.

    The files of a transformer in a folder of its own are copied beside modules.json, as newer versions write them.
    """
    transformer = transformer_folder(source)
    if transformer != source:
        copy_files(transformer, destination)
    modules = module_directories(source)
    for folder, folders, files in os.walk(source):
        relative = Path(folder).relative_to(source)
        folders[:] = [name for name in folders
                      if name not in _SKIPPED_DIRECTORIES and Path(folder, name) != transformer]
        keeps_weights = any(relative.is_relative_to(module) for module in modules)
        for name in files:
            kept = keeps_weights or (name in (VECTORS_FILE, WEIGHTS_FILE) and not relative.parts)
            if kept or not any(fnmatchcase(name, pattern) for pattern in _WEIGHTS):
                (destination / relative).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, destination / relative / name)
    if transformer != source:
        first, *others = read_json_file(source / "modules.json")
        write_json(destination / "modules.json", [{**first, "path": ""}, *others])


def drop_standard_modules(directory: Path) -> None:
    """Remove the folders of an earlier export's modules from a directory that is being written.

    They are found by their usual names: modules.json may come from elsewhere and must not decide what is removed.
    """
    for folder in directory.iterdir():
        if _MODULE_FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging(destination: str | Path, tensor_bytes: int) -> Iterator[Path]:
    """A temporary directory beside `destination` that is renamed to it if the block succeeds, and removed if it fails.

    Raises:
        CheckpointError: `destination` is in use, its parent cannot be written, or the disk is too small or fails.
    """
    destination = Path(destination).absolute()
    if destination.is_symlink():  # found now and not by the renaming, after the work
        raise CheckpointError(f"{destination}: is a link; name a new directory, nothing is written through links")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not empty; name a new directory, nothing is overwritten")
    work = destination.parent / f".{destination.name}.writing-{os.getpid()}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    except OSError as error:
        raise CheckpointError(f"{destination.parent}: cannot be written ({error.strerror}); "
                              "name a directory that can") from error
    try:
        free, needed_bytes = shutil.disk_usage(work).free, tensor_bytes + _SIDECAR_BYTES
        if free < needed_bytes:
            raise CheckpointError(f"{destination.parent}: {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB "
                                  "needed; free some space or name another disk")
        yield work
        sync_tree(work)
        work.rename(destination)
        sync_directory(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination}: not written ({error}); nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_hf_files(source: HFDirectory, hf: Path) -> CheckpointInfo:
    """Fill `hf` from a Hugging Face directory and return its description."""
    copy_files(source.root, hf)
    if source.stored is not None:  # what is not quantized, and what is converted, is no longer
        config = read_json_object(hf / "config.json")
        write_json(hf / "config.json", {key: value for key, value in config.items() if key != "quantization_config"})
    tied = {head: embedding for head, embedding in source.family.tied
            if source.shape.tie_word_embeddings and head in source.passthrough and _same_bytes(source, head, embedding)}
    stored_names = {name: source.stored_names[name] for name in source.passthrough if name not in tied}
    if stored_names:
        declared = [(stored, source.entry(name).dtype, source.entry(name).shape)
                    for name, stored in stored_names.items()]
        with SafetensorsWriter(hf / PASSTHROUGH_FILE, declared) as writer:
            copy_and_verify(Copy(name=stored, source=source.source_of(name), target=[writer.reserve(stored)])
                            for name, stored in stored_names.items())
    return CheckpointInfo(
        family=source.family.name, dtype=str(source.dtype()).removeprefix("torch."), prefixed=source.prefixed,
        source_architectures=read_json_object(source.path / "config.json").get("architectures") or [], tied_copies=tied)


def _same_bytes(source: HFDirectory, first: str, second: str) -> bool:
    """Whether two tensors are bit-equal; compares blocks, so that memory holds neither of them whole."""
    entry = source.entry(first)
    if (entry.dtype, entry.shape) != (source.entry(second).dtype, source.entry(second).shape):
        return False
    rows = max(1, (64 << 20) * entry.shape[0] // max(1, entry.nbytes))
    return all(
        bytes_of(source.read_slice(first, 0, start, min(start + rows, entry.shape[0])))
        == bytes_of(source.read_slice(second, 0, start, min(start + rows, entry.shape[0])))
        for start in range(0, entry.shape[0], rows))
