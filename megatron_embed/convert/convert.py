"""Hugging Face directory -> Megatron checkpoint and back: a family's table run either way, one tensor at a time.

No model is built. What is written is read back and compared before the destination gets its name.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.ahead import ahead
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
from megatron_embed.convert.merged import MergedReader
from megatron_embed.convert.plan import (
    WRITTEN_DTYPES,
    Checksums,
    Plan,
    RerankerFormat,
    Row,
    check_checkpoint,
    head_of,
    progress,
    rows_of,
)
from megatron_embed.convert.report import ConversionReport, peak_memory
from megatron_embed.convert.rules.lookup import rules_for
from megatron_embed.convert.safetensors_file import SafetensorsFile, checksum
from megatron_embed.convert.sharded import parse_size
from megatron_embed.convert.source import HFDirectory
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape

_ROOM_FOR_FILES = 64 << 20
"""Bytes allowed for config, tokenizer and headers when the free space of the disk is checked."""


def hf_to_megatron(src: str | Path, dst: str | Path) -> ConversionReport:
    """Write the Megatron checkpoint `dst` of the Hugging Face directory `src`.

    Raises:
        CheckpointError: `src` is no model we know, `dst` cannot be written, or what was written reads back differently.
    """
    started = time.monotonic()
    with HFDirectory(src) as source:
        _refuse_inside(Path(dst), source.path)
        total = sum(source.entry(name).nbytes for name in source.stored_names)
        rows = rows_of(source.family, source.shape)
        with staging(dst, total + _ROOM_FOR_FILES) as work:
            carried: dict[str, bytes] = {}
            info = write_companions(source.path, work,
                                    note=lambda name, tensor: carried.update({name: checksum(tensor)}))
            (work / "model").mkdir()
            reader = _ChecksummedReader(source)
            jobs = [partial(row.rule.to_ours, reader, row.context) for row in rows]
            with DcpWriter(work / "model") as writer:
                for row, tensor in zip(progress(rows, "writing"), ahead(jobs), strict=True):
                    writer.add(row.key, tensor, index=row.index, count=row.count)
            _verify_megatron(work / "model", rows, reader.checksums)
            _verify_carried(work / "hf" / CARRIED_FILE, carried)
        return ConversionReport(destination=Path(dst), tensors=len(source.stored_names), total_bytes=total,
                                dtype=info.dtype, seconds=time.monotonic() - started, peak_bytes=peak_memory())


def megatron_to_hf(src: str | Path, dst: str | Path, *, max_shard_size: str = "5GB", dtype: str | None = None,
                   merge_lora: bool = False,
                   finish: Callable[[Path], object] | None = None,
                   reranker: RerankerFormat | None = None) -> ConversionReport:
    """Write the Hugging Face directory `dst` of the checkpoint `src`.

    Args:
        src: one of our checkpoints, or a training run's directory (its newest one is taken).
        max_shard_size: largest safetensors file, e.g. "5GB".
        dtype: that every floating-point tensor is rounded to, e.g. "bfloat16"; null: as the checkpoint has them.
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
        rows = rows_of(family, shape)
        check_checkpoint(reader, rows, checkpoint.model)
        carried = open_files.enter_context(closing(SafetensorsFile(carried_file))) if carried_file.is_file() else None
        head = head_of(reader, checkpoint, family, shape, reranker)
        plan = Plan(reader, rows, checkpoint, family, carried, head, WRITTEN_DTYPES[dtype])
        with staging(dst, plan.total_bytes + _ROOM_FOR_FILES) as work:
            copy_files(checkpoint.hf, work)
            _write_dtype(work / "config.json", plan.dtype)
            _verify_hf(work, rows, plan.write(work, shard_bytes), shape)
            if finish is not None:
                finish(work)
    return ConversionReport(destination=Path(dst), tensors=len(plan.announced), total_bytes=plan.total_bytes,
                            dtype=str(plan.dtype).removeprefix("torch."), seconds=time.monotonic() - started,
                            peak_bytes=peak_memory())


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


class _ChecksummedReader:
    """Reads whole tensors of a Hugging Face directory and notes a checksum of each."""

    def __init__(self, source: HFDirectory) -> None:
        self._source = source
        self.checksums: dict[str, bytes] = {}

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self.checksums[name] = checksum(tensor)
        return tensor

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        assert (start, stop) == (0, self._source.entry(name).shape[dim]), "only a rank's share reads parts of a tensor"
        return self.read(name)


def _refuse_inside(dst: Path, src: Path) -> None:
    if dst.absolute().resolve().is_relative_to(src.resolve()):
        raise CheckpointError(f"{dst}: lies inside the source {src}; name a directory outside it")


def _verify_megatron(directory: Path, rows: list[Row], checksums: dict[str, bytes]) -> None:
    """What was written, turned back into Hugging Face tensors, has the checksums of what was read."""
    with DcpReader(directory) as reader:
        check_checkpoint(reader, rows, directory)
        seen = set()
        jobs = [partial(reader.read, row.key, row.index) for row in rows]
        for row, tensor in zip(progress(rows, "verifying"), ahead(jobs), strict=True):
            for name, part in row.rule.to_hf(tensor, row.context).items():
                _require_equal(directory, name, checksum(part) == checksums[name])
                seen.add(name)
        assert seen == set(checksums), seen ^ set(checksums)


def _verify_carried(file: Path, checksums: dict[str, bytes]) -> None:
    """The tensors that pass through are in `file` as they were read."""
    if not checksums:
        return
    with closing(SafetensorsFile(file)) as carried:
        for name, expected in checksums.items():
            _require_equal(file, name, checksum(carried.read(name)) == expected)


def _verify_hf(directory: Path, rows: list[Row], checksums: Checksums, shape: ModelShape) -> None:
    """What was written, turned back into our tensors, has the checksums of the checkpoint's."""
    with HFDirectory(directory) as written:
        assert written.shape == shape, "config.json changed its meaning on the way"
        jobs = [partial(row.rule.to_ours, written, row.context) for row in rows]
        for row, tensor in zip(progress(rows, "verifying"), ahead(jobs), strict=True):
            _require_equal(directory, row.name, checksum(tensor) == checksums.ours[row.name])
        full_names = {stored: full for full, stored in written.stored_names.items()}
        for name, expected in checksums.others.items():
            _require_equal(directory, name, checksum(written.read(full_names[name])) == expected)


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
