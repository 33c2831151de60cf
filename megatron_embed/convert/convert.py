"""Hugging Face directory -> Megatron checkpoint and back: a family's table run either way, one tensor at a time.

No model is built. What is written is read back and compared before the destination gets its name.
"""

import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_embed.convert.dcp import DcpReader, DcpWriter
from megatron_embed.convert.family import Family
from megatron_embed.convert.heads import HeadExport, read_head
from megatron_embed.convert.layout import (
    CARRIED_FILE,
    CheckpointDirectory,
    copy_files,
    open_carried,
    open_checkpoint,
    read_json,
    staging,
    write_companions,
    write_json,
)
from megatron_embed.convert.merged import MergedReader
from megatron_embed.convert.rules.lookup import rules_for
from megatron_embed.convert.safetensors_file import SafetensorsFile, bytes_of
from megatron_embed.convert.sharded import Announced, ShardedWriter, parse_size
from megatron_embed.convert.source import HFDirectory, largest_dtype
from megatron_embed.convert.transforms import Context, PadVocabulary, Transform, nbytes
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape

HEAD_KEYS = "model.head."
"""Beginning of the keys of a reranker's head in a checkpoint."""
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
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


@dataclass(frozen=True, kw_only=True)
class RerankerFormat:
    """Which Hugging Face model a reranker's checkpoint becomes."""

    kind: Literal["yes_no", "score"]
    """Of its head."""
    classification: bool
    """*ForSequenceClassification; else *ForCausalLM."""
    token_ids: tuple[int, int] | None
    """Of yes and no; null for a score head."""


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


def megatron_to_hf(src: str | Path, dst: str | Path, *, max_shard_size: str = "5GB", merge_lora: bool = False,
                   finish: Callable[[Path], object] | None = None,
                   reranker: RerankerFormat | None = None) -> ConversionReport:
    """Write the Hugging Face directory `dst` of the checkpoint `src`, in the dtype of the checkpoint.

    Args:
        src: one of our checkpoints, or a training run's directory (its newest one is taken).
        max_shard_size: largest safetensors file, e.g. "5GB".
        merge_lora: write W + scale * B A where a linear layer has an adapter.
        finish: called with the complete directory before it gets its name, e.g. to add an export's files and to compare
            it with the trained model; if it raises, nothing is left behind.
        reranker: how the head of a reranker's checkpoint is written; must be given for one.
    Raises:
        CheckpointError: `src` is no complete checkpoint, `dst` cannot be written, or it reads back differently; there
            are adapters and they are not to be merged, or the other way round.
    """
    started = time.monotonic()
    shard_bytes = parse_size(max_shard_size)
    checkpoint = open_checkpoint(src)
    _refuse_inside(Path(dst), checkpoint.path)
    shape, family = model_shape(checkpoint.hf), rules_for(checkpoint.info.family)
    carried_file = checkpoint.hf / CARRIED_FILE
    with _reader(checkpoint, family, shape, merge_lora) as reader, ExitStack() as open_files:
        rows = _rows(family, shape)
        _check_checkpoint(reader, rows, checkpoint.model)
        carried = open_files.enter_context(closing(SafetensorsFile(carried_file))) if carried_file.is_file() else None
        head = _head_of(reader, checkpoint, family, shape, reranker)
        plan = _Plan(reader, rows, checkpoint, family, carried, head)
        with staging(dst, plan.total_bytes + _ROOM_FOR_FILES) as work:
            copy_files(checkpoint.hf, work)
            _write_dtype(work / "config.json", plan.dtype)
            checksums = plan.write(work, shard_bytes)
            _verify_hf(work, rows, checksums, shape)
            if finish is not None:
                finish(work)
    return ConversionReport(destination=Path(dst), tensors=len(plan.announced), total_bytes=plan.total_bytes,
                            dtype=str(plan.dtype).removeprefix("torch."), seconds=time.monotonic() - started)


def _reader(checkpoint: CheckpointDirectory, family: Family, shape: ModelShape, merge_lora: bool) -> DcpReader:
    """The checkpoint's tensors, with the adapters merged if it has any."""
    settings = checkpoint.info.adapters
    if settings is not None and not merge_lora:
        raise CheckpointError(f"{checkpoint.path}: holds LoRA adapters (rank {settings.rank}); add --merge-lora to "
                              "write them into the weights, or take --format peft for the adapters alone")
    if settings is None:
        if merge_lora:
            raise CheckpointError(f"{checkpoint.path}: holds no adapters to merge; leave out --merge-lora")
        return DcpReader(checkpoint.model)
    return MergedReader(checkpoint.model, family, shape, settings)


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
                 family: Family, carried: SafetensorsFile | None, head: HeadExport | None) -> None:
        info = checkpoint.info
        self._reader, self._rows, self._carried, self._head = reader, rows, carried, head
        # A model with a head names its backbone's tensors with the prefix, whatever it was made of.
        self._prefix = "" if info.prefixed or head is not None else family.prefix
        self._copies = {embedding: copy for copy, embedding in info.tied_copies.items()
                        if head is None or head.keeps(copy)}
        self._passed: dict[str, str] = {}
        """Tensors that pass through: name to be -> name in the carried file."""
        for name in () if carried is None else carried.entries:
            full = family.full_name(name, prefixed=info.prefixed)
            if head is None or head.keeps(full):
                self._passed[name if head is None else full] = name
        self.announced: list[Announced] = []
        for row in rows:
            dtype = reader.dtype(row.key)
            for name, words in zip(row.rule.hf_names(row.context), row.rule.hf_shapes(), strict=True):
                self.announced += [(stored, dtype, row.context.sizes(words)) for stored in self._stored(name)]
        self.dtype = largest_dtype((dtype, nbytes(shape, dtype)) for _, dtype, shape in self.announced)
        for name, stored in self._passed.items():
            assert carried is not None
            self.announced.append((name, carried.entries[stored].dtype, carried.entries[stored].shape))
        if head is not None:
            self.announced += [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in head.added.items()]
        self.total_bytes = sum(nbytes(shape, dtype) for _, dtype, shape in self.announced)

    def write(self, directory: Path, max_shard_bytes: int) -> dict[str, int]:
        """Write everything; gives the checksum of each of our tensors, without vocabulary padding, and of the others
        by the names that they have in the files."""
        checksums = {}
        with ShardedWriter(directory, self.announced, max_shard_bytes) as writer:
            for row in _progress(self._rows, "writing"):
                tensor = self._reader.read(row.key, row.index)
                checksums[row.name] = checksum(tensor[:row.rule.ours_shape(row.context)[0]])
                for name, part in row.rule.to_hf(tensor, row.context).items():
                    for stored in self._stored(name):
                        writer.write(stored, part)
            for name, tensor in self._others():
                checksums[name] = checksum(tensor)
                writer.write(name, tensor)
        return checksums

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that no row makes, one at a time."""
        for name, stored in self._passed.items():
            assert self._carried is not None
            tensor = self._carried.read(stored)
            yield name, tensor if self._head is None else self._head.edited(name, tensor)
        if self._head is not None:
            yield from self._head.added.items()

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


def _head_of(reader: DcpReader, checkpoint: CheckpointDirectory, family: Family, shape: ModelShape,
             reranker: RerankerFormat | None) -> HeadExport | None:
    """The head of a reranker's checkpoint; null for any other."""
    if reranker is None:
        if checkpoint.info.head is not None:
            raise CheckpointError(f"{checkpoint.path}: is a reranker's checkpoint (head {checkpoint.info.head}); use "
                                  "--format cross-encoder or --format hf")
        return None
    keys = [key for key in reader.keys() if key.startswith(HEAD_KEYS)]  # noqa: SIM118  a reader is no mapping
    head = {key.removeprefix(HEAD_KEYS): reader.read(key) for key in keys}
    if not head and reranker.kind == "yes_no" and shape.tie_word_embeddings:
        assert reranker.token_ids is not None
        embeddings = reader.read(family.checkpoint_place(WORD_EMBEDDINGS)[0])
        head = {"weight": embeddings[list(reranker.token_ids)]}
    if not head:
        with open_carried(checkpoint) as carried:
            head = read_head(carried, family.name, reranker.kind, reranker.token_ids, str(checkpoint.path))
    if "weight" not in head:
        raise CheckpointError(f"{checkpoint.path}: has no classifier, so it is no reranker yet; train it with task: "
                              "reranker first")
    return HeadExport(family.name, reranker.kind, head=head, token_ids=reranker.token_ids,
                      classification=reranker.classification)


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
    unnamed = {key for key in keys if key.startswith("model.") and not key.startswith(HEAD_KEYS)}
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


def _verify_hf(directory: Path, rows: list[_Row], checksums: dict[str, int], shape: ModelShape) -> None:
    """What was written, turned back into our tensors, has the checksums of the checkpoint's."""
    others = checksums.keys() - {row.name for row in rows}
    with HFDirectory(directory) as written:
        assert written.shape == shape, "config.json changed its meaning on the way"
        for row in _progress(rows, "verifying"):
            equal = checksum(row.rule.to_ours(written, row.context)) == checksums[row.name]
            _require_equal(directory, row.name, equal)
        full_names = {stored: full for full, stored in written.stored_names.items()}
        for name in others:
            _require_equal(directory, name, checksum(written.read(full_names[name])) == checksums[name])


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
