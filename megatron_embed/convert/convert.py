"""Hugging Face directory -> Megatron checkpoint and back: a family's table run either way, one tensor at a time.

No model is built. What is written is read back and compared before the destination gets its name.
"""

import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.dcp import DcpReader, DcpWriter
from megatron_embed.convert.family import Family
from megatron_embed.convert.layout import (
    CARRIED_FILE,
    CheckpointDirectory,
    copy_files,
    open_checkpoint,
    read_json,
    staging,
    write_companions,
    write_json,
)
from megatron_embed.convert.rules.lookup import rules_for
from megatron_embed.convert.safetensors_file import SafetensorsFile, bytes_of
from megatron_embed.convert.sharded import Announced, ShardedWriter, parse_size
from megatron_embed.convert.source import HFDirectory, largest_dtype
from megatron_embed.convert.transforms import Context, PadVocabulary, Transform, nbytes
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape

_ROOM_FOR_FILES = 64 << 20
"""Bytes allowed for config, tokenizer and headers when the free space of the disk is checked."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did; `str()` is the line for the user."""

    destination: Path
    tensors: int
    """Hugging Face tensors, carried ones included."""
    total_bytes: int
    dtype: str
    seconds: float
    """Verification included."""

    def __str__(self) -> str:
        return (f"{self.destination}: {self.tensors} tensors, {self.total_bytes / 1e9:.2f} GB, {self.dtype}, in "
                f"{self.seconds:.1f} s; every tensor read back bit-equal")


def hf_to_megatron(src: str | Path, dst: str | Path) -> ConversionReport:
    """Write the Megatron checkpoint `dst` of the Hugging Face directory `src`.

    Raises:
        CheckpointError: `src` is no model we know, `dst` cannot be written, or what was written reads back differently.
    """
    started = time.monotonic()
    with HFDirectory(src) as source:
        _refuse_inside(Path(dst), source.path)
        total = sum(source.entry(name).nbytes for name in source.stored_names)
        rows = _rows(source.family, source.shape)
        with staging(dst, total + _ROOM_FOR_FILES) as work:
            info = write_companions(source.path, work)
            (work / "model").mkdir()
            reader = _ChecksummedReader(source)
            with DcpWriter(work / "model") as writer:
                for row in _progress(rows, "writing"):
                    writer.add(row.key, row.rule.to_ours(reader, row.context), index=row.index, count=row.count)
            _verify_megatron(work / "model", rows, reader.checksums)
            _verify_carried(work / "hf" / CARRIED_FILE, {
                source.stored_names[name]: name for name in source.carried if name not in info.tied_copies}, source)
        return ConversionReport(destination=Path(dst), tensors=len(source.stored_names), total_bytes=total,
                                dtype=info.dtype, seconds=time.monotonic() - started)


def megatron_to_hf(src: str | Path, dst: str | Path, *, max_shard_size: str = "5GB",
                   finish: Callable[[Path], object] | None = None) -> ConversionReport:
    """Write the Hugging Face directory `dst` of the checkpoint `src`, in the dtype of the checkpoint.

    Args:
        src: one of our checkpoints, or a training run's directory (its newest one is taken).
        max_shard_size: largest safetensors file, e.g. "5GB".
        finish: called with the complete directory before it gets its name, e.g. to add an export's files and to compare
            it with the trained model; if it raises, nothing is left behind.
    Raises:
        CheckpointError: `src` is no complete checkpoint, `dst` cannot be written, or it reads back differently.
    """
    started = time.monotonic()
    shard_bytes = parse_size(max_shard_size)
    checkpoint = open_checkpoint(src)
    _refuse_inside(Path(dst), checkpoint.path)
    shape, family = model_shape(checkpoint.hf), rules_for(checkpoint.info.family)
    carried_file = checkpoint.hf / CARRIED_FILE
    with DcpReader(checkpoint.model) as reader, ExitStack() as open_files:
        rows = _rows(family, shape)
        _check_checkpoint(reader, rows, checkpoint.model)
        carried = open_files.enter_context(closing(SafetensorsFile(carried_file))) if carried_file.is_file() else None
        plan = _Plan(reader, rows, checkpoint, family, carried)
        with staging(dst, plan.total_bytes + _ROOM_FOR_FILES) as work:
            copy_files(checkpoint.hf, work)
            _write_dtype(work / "config.json", plan.dtype)
            checksums = plan.write(work, shard_bytes)
            _verify_hf(work, rows, checksums, carried, shape)
            if finish is not None:
                finish(work)
    return ConversionReport(destination=Path(dst), tensors=len(plan.announced), total_bytes=plan.total_bytes,
                            dtype=str(plan.dtype).removeprefix("torch."), seconds=time.monotonic() - started)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of the table for one layer and expert: a parameter of ours, and where a checkpoint keeps it."""

    rule: Transform
    context: Context
    key: str
    index: int | None
    """Along the first axis of the checkpoint's tensor; null: the parameter is the whole tensor."""

    @property
    def name(self) -> str:
        return self.context.name(self.rule.ours)

    @property
    def count(self) -> int | None:
        """Length of the checkpoint tensor's axis of experts; null without one."""
        return None if self.index is None else self.context.shape.num_experts

    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, without vocabulary padding."""
        shape = self.rule.ours_shape(self.context)
        return shape if self.count is None else (self.count, *shape)


class _ChecksummedReader:
    """Reads whole tensors of a Hugging Face directory and notes a checksum of each."""

    def __init__(self, source: HFDirectory) -> None:
        self._source = source
        self.checksums: dict[str, int] = {}

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self.checksums[name] = checksum(tensor)
        return tensor

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        assert (start, stop) == (0, self._source.entry(name).shape[dim]), "only a rank's share reads parts of a tensor"
        return self.read(name)


class _Plan:
    """The tensors of a Hugging Face directory to come: announced first (a header precedes its data), then written."""

    def __init__(self, reader: DcpReader, rows: list[_Row], checkpoint: CheckpointDirectory,
                 family: Family, carried: SafetensorsFile | None) -> None:
        self._reader, self._rows, self._carried = reader, rows, carried
        self._prefix = "" if checkpoint.info.prefixed else family.prefix
        self._copies = {embedding: head for head, embedding in checkpoint.info.tied_copies.items()}
        self.announced: list[Announced] = []
        for row in rows:
            dtype = reader.dtype(row.key)
            for name, words in zip(row.rule.hf_names(row.context), row.rule.hf_shapes(), strict=True):
                self.announced += [(stored, dtype, row.context.sizes(words)) for stored in self._stored(name)]
        self.dtype = largest_dtype((dtype, nbytes(shape, dtype)) for _, dtype, shape in self.announced)
        if carried is not None:
            self.announced += [(name, entry.dtype, entry.shape) for name, entry in carried.entries.items()]
        self.total_bytes = sum(nbytes(shape, dtype) for _, dtype, shape in self.announced)

    def write(self, directory: Path, max_shard_bytes: int) -> dict[str, int]:
        """Write everything; gives the checksum of each of our tensors, without vocabulary padding."""
        checksums = {}
        with ShardedWriter(directory, self.announced, max_shard_bytes) as writer:
            for row in _progress(self._rows, "writing"):
                tensor = self._reader.read(row.key, row.index)
                checksums[row.name] = checksum(tensor[:row.rule.ours_shape(row.context)[0]])
                for name, part in row.rule.to_hf(tensor, row.context).items():
                    for stored in self._stored(name):
                        writer.write(stored, part)
            for name in () if self._carried is None else self._carried.entries:
                assert self._carried is not None
                writer.write(name, self._carried.read(name))
        return checksums

    def _stored(self, name: str) -> list[str]:
        """Names in the file of a full name: its own, and that of a head that repeats it."""
        return [name.removeprefix(self._prefix), *([self._copies[name]] if name in self._copies else [])]


def _rows(family: Family, shape: ModelShape) -> list[_Row]:
    """Every row of the table with what it must know, in the order of writing."""
    rows = []
    for rule, context in family.rows(shape):
        key, index = family.checkpoint_place(context.name(rule.ours))
        rows.append(_Row(rule=rule, context=context, key=key, index=index))
    return rows


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: finds what disks and programs do to data, not what an adversary does."""
    return zlib.crc32(bytes_of(tensor.contiguous()))


def _progress(rows: list[_Row], what: str) -> Iterable[_Row]:
    """The rows, with a progress bar if someone is watching."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[_Row] = tqdm(rows, desc=what, unit="tensor", disable=not sys.stderr.isatty())
    return bar


def _refuse_inside(dst: Path, src: Path) -> None:
    if dst.absolute().resolve().is_relative_to(src.resolve()):
        raise CheckpointError(f"{dst}: lies inside the source {src}; name a directory outside it")


def _check_checkpoint(reader: DcpReader, rows: list[_Row], directory: Path) -> None:
    """The checkpoint's model tensors are exactly those of the table, each of the right shape."""
    keys = set(reader.keys())
    unnamed = {key for key in keys if key.startswith("model.")}
    for row in rows:
        key = row.key
        if key not in keys:
            raise CheckpointError(f"{directory}: {key} is missing; a model with num_hidden_layers = "
                                  f"{row.context.shape.num_layers} (hf/config.json) has it: take another checkpoint")
        unnamed.discard(key)
        found, expected = reader.shape(key), row.stored_shape()
        padded = isinstance(row.rule, PadVocabulary) and len(found) == len(expected) and found[0] > expected[0]
        if found != expected and not (padded and found[1:] == expected[1:]):
            raise CheckpointError(f"{directory}: {key} has shape {list(found)}, but hf/config.json says "
                                  f"{list(expected)}; use the config.json that belongs to this checkpoint")
    if unnamed:
        raise CheckpointError(f"{directory}: {min(unnamed)} is unknown to the weight table ({len(unnamed)} such); "
                              "hf/config.json must be of this model")


def _verify_megatron(directory: Path, rows: list[_Row], checksums: dict[str, int]) -> None:
    """What was written, turned back into Hugging Face tensors, has the checksums of what was read."""
    with DcpReader(directory) as reader:
        _check_checkpoint(reader, rows, directory)
        seen = set()
        for row in _progress(rows, "verifying"):
            for name, part in row.rule.to_hf(reader.read(row.key, row.index), row.context).items():
                _require_equal(directory, name, checksum(part) == checksums[name])
                seen.add(name)
        assert seen == set(checksums), seen ^ set(checksums)


def _verify_carried(file: Path, names: dict[str, str], source: HFDirectory) -> None:
    """Tensors that pass through (file's name -> full name) are in `file` and equal the source's."""
    if not names:
        return
    with closing(SafetensorsFile(file)) as carried:
        for stored, name in names.items():
            _require_equal(file, stored, checksum(carried.read(stored)) == checksum(source.read(name)))


def _verify_hf(directory: Path, rows: list[_Row], checksums: dict[str, int],
               carried: SafetensorsFile | None, shape: ModelShape) -> None:
    """What was written, turned back into our tensors, has the checksums of the checkpoint's."""
    with HFDirectory(directory) as written:
        assert written.shape == shape, "config.json changed its meaning on the way"
        for row in _progress(rows, "verifying"):
            equal = checksum(row.rule.to_ours(written, row.context)) == checksums[row.name]
            _require_equal(directory, row.name, equal)
        full_names = {stored: full for full, stored in written.stored_names.items()}
        for name in () if carried is None else carried.entries:
            assert carried is not None
            equal = checksum(written.read(full_names[name])) == checksum(carried.read(name))
            _require_equal(directory, name, equal)


def _require_equal(where: Path, name: str, equal: bool) -> None:
    if not equal:
        raise CheckpointError(f"{where}: {name} reads back differently from what was written; "
                              "check the disk and try again")


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Make config.json name the dtype of the weights, under the key that it uses already."""
    config: dict[str, Any] = read_json(config_file)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if not keys and dtype == torch.float32:
        return  # what a reader assumes anyway: a config without a dtype stays as it came
    for key in keys or ["dtype"]:
        config[key] = name
    write_json(config_file, config)
