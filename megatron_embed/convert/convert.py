"""Hugging Face directory -> Megatron checkpoint and back: a family's table run either way, one tensor at a time.

No model is built; tensors move from file to file in blocks. What is written is read back and compared before the
destination gets its name.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from megatron_embed.config.json_file import read_json_object
from megatron_embed.convert.checkpoint_directory import (
    CARRIED_FILE,
    CheckpointDirectory,
    copy_files,
    open_checkpoint,
    staging,
    write_companions,
    write_json,
)
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.lora_merge import MergedReader
from megatron_embed.convert.report import ConversionReport, peak_memory
from megatron_embed.convert.storage.byte_range import Run
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile
from megatron_embed.convert.storage.sharded import parse_size
from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.to_hf import (
    WRITTEN_DTYPES,
    Plan,
    RerankerFormat,
    Row,
    check_checkpoint,
    head_of,
    progress,
    rows_of,
)
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
            info = write_companions(source.path, work)
            (work / "model").mkdir()
            places: list[Run] = []
            with DcpWriter(work / "model") as writer:
                copy_and_verify(_ways_to_megatron(source, rows, writer, places))
            _verify_megatron(work / "model", rows, places)
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
            _verify_hf(work, plan.write(work, shard_bytes), shape)
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


def _ways_to_megatron(source: HFDirectory, rows: list[Row], writer: DcpWriter, places: list[Run]) -> Iterator[Copy]:
    """Every Hugging Face tensor's way into the checkpoint; `places` gets each row's, in turn."""
    for row in progress(rows, "converting"):
        names = row.rule.hf_names(row.context)
        dtype = source.entry(names[0]).dtype
        for name in names:
            if source.entry(name).dtype != dtype:
                raise CheckpointError(f"{source.path}: {names[0]} is {dtype} and {name} {source.entry(name).dtype}, "
                                      "but they become one tensor; save the model in one dtype")
        ours = writer.place(row.key, dtype, row.rule.ours_shape(row.context), index=row.index, count=row.count)
        places.append(ours)
        for part, name in enumerate(names):
            yield Copy(name=name, source=[source.run(name)], target=row.in_ours(part, ours))


def _refuse_inside(dst: Path, src: Path) -> None:
    if dst.absolute().resolve().is_relative_to(src.resolve()):
        raise CheckpointError(f"{dst}: lies inside the source {src}; name a directory outside it")


def _verify_megatron(directory: Path, rows: list[Row], places: list[Run]) -> None:
    """A reader finds every parameter, with its shape, at the place that was read back."""
    with DcpReader(directory) as reader:
        check_checkpoint(reader, rows, directory)
        for row, place in zip(rows, places, strict=True):
            _require_there(directory, row.name, reader.runs(row.key, row.index), place)


def _verify_hf(directory: Path, places: dict[str, Run], shape: ModelShape) -> None:
    """A reader finds every tensor, with its shape, at the place that was read back, and nothing else."""
    with HFDirectory(directory) as written:
        assert written.shape == shape, "config.json changed its meaning on the way"
        assert {*written.stored_names.values()} == places.keys(), "a tensor was lost or added on the way"
        for name, stored in written.stored_names.items():
            _require_there(directory, stored, [written.run(name)], places[stored])


def _require_there(where: Path, name: str, found: list[Run] | None, expected: Run) -> None:
    """One run in the same file."""
    if found is None or [(run.file.name, run.start, run.length) for run in found] != [
            (expected.file.name, expected.start, expected.length)]:
        raise CheckpointError(f"{where}: {name} reads back differently from what was written; check the disk and try "
                              "again")


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Make config.json name the dtype of the weights, under the key that it uses already."""
    config: dict[str, Any] = read_json_object(config_file)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if not keys and dtype == torch.float32:
        return  # what a reader assumes anyway: a config without a dtype stays as it came
    for key in keys or ["dtype"]:
        config[key] = name
    write_json(config_file, config)
