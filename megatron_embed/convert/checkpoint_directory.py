"""Our checkpoint directory, and how any directory comes into being: under a temporary name, synced, then renamed.

    DIR/megatron_embed.json     what this is, see CheckpointInfo
    DIR/hf/                     every file of the Hugging Face source that holds no weights
    DIR/hf/carried.safetensors  tensors that training does not use (pooler, lm_head), under the source's own names
    DIR/model/                  torch_dist checkpoint, keys `model.<parameter>`; training keeps its optimizer here too

A training run's directory holds step_XXXXXX/ directories of this layout and `latest`, a text file naming the newest.
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
from typing import Any

from megatron_embed.checkpoint.files import INFO_FILE, latest_checkpoint
from megatron_embed.config.json_file import read_json_file, read_json_object
from megatron_embed.convert.adapters import settings_of
from megatron_embed.convert.heads import CarriedFile
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsWriter, bytes_of
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import CheckpointError
from megatron_embed.models.adapters import AdapterSettings
from megatron_embed.models.file_checks import check_files
from megatron_embed.models.modules_json import read_modules
from megatron_embed.names import HeadKind

CARRIED_FILE = "carried.safetensors"
FORMAT = 1

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5",
            "*.msgpack", "*.ot", "*.gguf", "*.onnx*", "*.ckpt")
_MODULE_FOLDER = re.compile(r"\d+_(Transformer|Pooling|Normalize|Dense|LogitScore)")
"""Names that Sentence Transformers and our exports give to the folders of modules."""
_SKIPPED_DIRECTORIES = ("onnx", "openvino", "original", "coreml", ".git", ".cache")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Contents of `megatron_embed.json`."""

    family: str
    """Name of the weight table."""
    dtype: str
    """Of the model's weights: float32, bfloat16, ..."""
    source_architectures: list[str]
    """`architectures` of the Hugging Face config that the model came with."""
    prefixed: bool
    """Whether the source's files name the backbone's tensors with the family's prefix."""
    tied_copies: dict[str, str] = field(default_factory=dict)
    """Heads that the source stores although they are tied: name -> the embedding that they repeat."""
    max_lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of the roles `query` and `document` in training; empty: sentence_bert_config.json's one holds for all."""
    head: HeadKind | None = None
    """Which reranker's head was trained with the model; null: none."""
    lora: dict[str, Any] | None = None
    """Of a model with adapters: the fields of AdapterSettings."""
    format: int = FORMAT

    @property
    def adapters(self) -> AdapterSettings | None:
        """What the adapters compute; null without any."""
        return None if self.lora is None else settings_of(self.lora)


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


def open_carried(checkpoint: CheckpointDirectory) -> CarriedFile:
    """The tensors that a checkpoint carries along beside those that are trained; to be closed."""
    return CarriedFile(checkpoint.hf / CARRIED_FILE, rules_for(checkpoint.info.family),
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
        raise CheckpointError(f"{path}: no {INFO_FILE}, so this is no checkpoint of megatron-embed{hint}; "
                              "give what `convert hf-to-megatron` or `train` wrote")
    try:
        values: Any = read_json_file(file)
        if values["format"] != FORMAT:
            raise CheckpointError(f"{file}: format = {values['format']!r}, this version reads {FORMAT}; "
                                  "convert it with the version that wrote it")
        info = CheckpointInfo(**values)
        info.adapters  # noqa: B018 - a damaged file is found here
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error!r}); take another checkpoint") from error
    return CheckpointDirectory(path, info)


def write_companions(source: str | Path, directory: Path, *, dtype: str | None = None,
                     max_lengths: dict[str, int] | None = None,
                     head: HeadKind | None = None,
                     adapters: AdapterSettings | None = None) -> CheckpointInfo:
    """Write everything of a checkpoint that is not `model/`: `megatron_embed.json` and `hf/`.

    Args:
        source: the Hugging Face directory or the checkpoint of ours that the model came from.
        directory: the checkpoint being written; exists.
        dtype: of the weights in its `model/`; null: the source's.
        max_lengths: tokens by role; null: the source's.
        head: of the reranker that `model/` holds.
        adapters: those in `model/`; null: the source's.
    Raises:
        CheckpointError: `source` is neither.
    """
    (directory / "hf").mkdir()
    if is_checkpoint(source):
        checkpoint = open_checkpoint(source)
        info = checkpoint.info
        copy_files(checkpoint.hf, directory / "hf")
        if (checkpoint.hf / CARRIED_FILE).is_file():
            shutil.copyfile(checkpoint.hf / CARRIED_FILE, directory / "hf" / CARRIED_FILE)
    else:
        with HFDirectory(source) as opened:
            info = _companions_of_hf(opened, directory / "hf")
    info = replace(info, dtype=dtype or info.dtype,
                   max_lengths=info.max_lengths if max_lengths is None else max_lengths, head=head,
                   lora=info.lora if adapters is None else asdict(adapters))
    write_json(directory / INFO_FILE, {key: value for key, value in asdict(info).items()
                                       if key not in ("head", "lora") or value is not None})
    return info


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, as Transformers writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def module_directories(path: Path) -> Sequence[str]:
    """Sub-directories that `modules.json` of a Sentence Transformers directory names, e.g. 1_Pooling; else none.

    Raises CheckpointError for one that is no plain name.
    """
    file = path / "modules.json"
    return [module.path for module in read_modules(file) if module.path] if file.is_file() else ()


def copy_files(source: Path, destination: Path) -> None:
    """Copy every file that holds no weights of the transformer; modules of Sentence Transformers keep theirs."""
    modules = module_directories(source)
    for folder, folders, files in os.walk(source):
        relative = Path(folder).relative_to(source)
        folders[:] = [name for name in folders if name not in _SKIPPED_DIRECTORIES]
        keeps_weights = any(relative.is_relative_to(module) for module in modules)
        for name in files:
            if keeps_weights or not any(fnmatchcase(name, pattern) for pattern in _WEIGHTS):
                (destination / relative).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / name, destination / relative / name)


def drop_standard_modules(directory: Path) -> None:
    """Remove, from a directory that we are writing, the folders of an earlier export's modules.

    Found by their usual names, not by what modules.json says: that is somebody else's file, and decides no removal.
    """
    for folder in directory.iterdir():
        if _MODULE_FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging(destination: str | Path, needed_bytes: int) -> Iterator[Path]:
    """A new directory beside `destination` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: `destination` is in use, its parent cannot be written, or the disk is too small or fails.
    """
    destination = Path(destination).absolute()
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
        free = shutil.disk_usage(work).free
        if free < needed_bytes:
            raise CheckpointError(f"{destination.parent}: {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB "
                                  "needed; make room or name another disk")
        yield work
        _sync_tree(work)
        work.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination}: not written ({error}); nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _companions_of_hf(source: HFDirectory, hf: Path) -> CheckpointInfo:
    """Fill `hf` from a Hugging Face directory."""
    copy_files(source.path, hf)
    tied = {head: embedding for head, embedding in source.family.tied
            if source.shape.tie_word_embeddings and head in source.carried and _same_bytes(source, head, embedding)}
    carried = [name for name in source.carried if name not in tied]
    if carried:
        entries = [(source.stored_names[name], source.entry(name).dtype, source.entry(name).shape) for name in carried]
        with SafetensorsWriter(hf / CARRIED_FILE, entries) as writer:
            copy_and_verify(Copy(name=stored, source=[source.run(name)], target=[writer.place(stored)])
                            for name, stored in ((name, source.stored_names[name]) for name in carried))
    return CheckpointInfo(
        family=source.family.name, dtype=str(source.dtype()).removeprefix("torch."), prefixed=source.prefixed,
        source_architectures=read_json_object(source.path / "config.json").get("architectures") or [], tied_copies=tied)


def _same_bytes(source: HFDirectory, first: str, second: str) -> bool:
    """Whether two tensors are equal bit for bit, compared in blocks so that neither is held whole."""
    entry = source.entry(first)
    if (entry.dtype, entry.shape) != (source.entry(second).dtype, source.entry(second).shape):
        return False
    rows = max(1, (64 << 20) * entry.shape[0] // max(1, entry.nbytes))
    return all(
        bytes_of(source.read_slice(first, 0, start, min(start + rows, entry.shape[0])))
        == bytes_of(source.read_slice(second, 0, start, min(start + rows, entry.shape[0])))
        for start in range(0, entry.shape[0], rows))


def _sync_tree(path: Path) -> None:
    """Every file and directory under `path` is on the disk afterwards."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
