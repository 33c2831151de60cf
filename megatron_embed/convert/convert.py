"""Convert a Hugging Face directory to a Megatron checkpoint and back, one tensor at a time, with a family's table.

No model is built; tensors are copied from file to file in blocks. Everything written is read back and compared before
the destination gets its name.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_embed.config.json_file import read_json_object
from megatron_embed.convert.checkpoint_directory import (
    CheckpointDirectory,
    copy_files,
    open_checkpoint,
    open_passthrough,
    staging,
    write_json,
    write_sidecar_files,
)
from megatron_embed.convert.dense_tensors import holds_dense, write_trained_heads
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.lora_merge import MergedReader
from megatron_embed.convert.quantized_base import base_directory
from megatron_embed.convert.quantized_merge import QuantizedReader
from megatron_embed.convert.report import ConversionReport, peak_memory, progress
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.sharded import parse_size
from megatron_embed.convert.storage.torch_dist import DcpReader, DcpWriter
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.to_hf import (
    WRITTEN_DTYPES,
    HFWriter,
    RerankerFormat,
    StoredParameter,
    check_checkpoint,
    head_export,
    stored_parameters,
)
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape


def hf_to_megatron(src: str | Path, dst: str | Path) -> ConversionReport:
    """Write the Megatron checkpoint `dst` of the Hugging Face directory `src`.

    Raises:
        CheckpointError: `src` is not a known model, `dst` cannot be written, or it reads back differently.
    """
    started = time.monotonic()
    with HFDirectory(src) as source:
        _refuse_inside(Path(dst), source.root)
        total = sum(source.entry(name).nbytes for name in source.stored_names)
        parameters = list(stored_parameters(source.family, source.shape))
        with staging(dst, total) as work:
            info = write_sidecar_files(source.root, work)
            (work / "model").mkdir()
            targets: list[ByteRange] = []
            with DcpWriter(work / "model") as writer:
                copy_and_verify(_copies_to_megatron(source, parameters, writer, targets))
            _verify_megatron(work / "model", parameters, targets)
        return ConversionReport(destination=Path(dst), tensors=len(source.stored_names), total_bytes=total,
                                dtype=info.dtype, seconds=time.monotonic() - started, peak_bytes=peak_memory())


def megatron_to_hf(src: str | Path, dst: str | Path, *, max_shard_size: str = "5GB", dtype: str | None = None,
                   merge_lora: bool = False,
                   finish: Callable[[Path], object] | None = None,
                   reranker: RerankerFormat | None = None) -> ConversionReport:
    """Write the Hugging Face directory `dst` of the checkpoint `src`.

    Args:
        src: one of our checkpoints, or a training run's directory (its newest checkpoint is converted).
        max_shard_size: largest safetensors file, e.g. "5GB".
        dtype: dtype that every floating-point tensor is rounded to, e.g. "bfloat16"; None: unchanged.
        merge_lora: write W + scale * B A for every linear layer with an adapter.
        finish: called with the complete directory before it gets its name, e.g. to add an export's files and to compare
            it with the trained model; if it raises, nothing is left behind.
        reranker: how to write the head of a reranker's checkpoint; required for one.
    Raises:
        CheckpointError: `src` is not a complete checkpoint, `dst` cannot be written, or it reads back differently;
            `merge_lora` does not match whether `src` has adapters.
    """
    started = time.monotonic()
    shard_bytes = parse_size(max_shard_size)
    checkpoint = open_checkpoint(src)
    _refuse_inside(Path(dst), checkpoint.path)
    shape, family = model_shape(checkpoint.hf), rules_for(checkpoint.info.family)
    with _reader(checkpoint, family, shape, merge_lora) as reader, open_passthrough(checkpoint) as passthrough:
        parameters = list(stored_parameters(family, shape))
        check_checkpoint(reader, parameters, checkpoint.model)
        head = head_export(reader, checkpoint, passthrough, shape, reranker)
        writer = HFWriter(reader, parameters, checkpoint, passthrough, head=head, dtype=WRITTEN_DTYPES[dtype])
        with staging(dst, writer.total_bytes) as work:
            copy_files(checkpoint.hf, work)
            if head is None and holds_dense(reader):
                write_trained_heads(reader, checkpoint.hf, checkpoint.path, work,
                                    WRITTEN_DTYPES[dtype])
            _write_dtype(work / "config.json", writer.dtype)
            _verify_hf(work, writer.write(work, shard_bytes), shape)
            if finish is not None:
                finish(work)
    return ConversionReport(destination=Path(dst), tensors=len(writer.declared), total_bytes=writer.total_bytes,
                            dtype=str(writer.dtype).removeprefix("torch."), seconds=time.monotonic() - started,
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
    base, folder = checkpoint.info.quantized_base, base_directory(checkpoint)
    if base is not None and folder is not None:
        return QuantizedReader(checkpoint.model, settings, base, HFDirectory(folder))
    return MergedReader(checkpoint.model, family, shape, settings)


def _copies_to_megatron(source: HFDirectory, parameters: list[StoredParameter], writer: DcpWriter,
                        targets: list[ByteRange]) -> Iterator[Copy]:
    """A copy of every Hugging Face tensor into the checkpoint; appends each parameter's range to `targets`."""
    for parameter in progress(parameters, "converting"):
        rule, context = parameter.rule, parameter.context
        names = rule.hf_names(context)
        dtype = source.entry(names[0]).dtype
        for name in names:
            if source.entry(name).dtype != dtype:
                raise CheckpointError(f"{source.path}: {names[0]} is {dtype} and {name} {source.entry(name).dtype}, "
                                      "but they become one tensor; save the model in one dtype")
        target = writer.reserve(parameter.key, dtype, rule.ours_shape(context), index=parameter.index,
                                count=parameter.count)
        targets.append(target)
        for part, name in enumerate(names):
            yield Copy(name=name, source=source.source_of(name), target=parameter.in_ours(part, target))


def _refuse_inside(dst: Path, src: Path) -> None:
    if dst.absolute().resolve().is_relative_to(src.resolve()):
        raise CheckpointError(f"{dst}: lies inside the source {src}; name a directory outside it")


def _verify_megatron(directory: Path, parameters: list[StoredParameter], targets: list[ByteRange]) -> None:
    """Check that a reader finds every parameter, with its shape, at the range that was read back."""
    with DcpReader(directory) as reader:
        check_checkpoint(reader, parameters, directory)
        for parameter, target in zip(parameters, targets, strict=True):
            ranges = reader.byte_ranges(parameter.key, parameter.index)
            _require_same_range(directory, parameter.name, ranges, target)


def _verify_hf(directory: Path, targets: dict[str, ByteRange], shape: ModelShape) -> None:
    """Check that a reader finds every tensor, with its shape, at the range that was read back, and no other tensor."""
    with HFDirectory(directory) as written:
        assert written.shape == shape, "config.json changed its meaning on the way"
        assert {*written.stored_names.values()} == targets.keys(), "a tensor was lost or added on the way"
        for name, stored in written.stored_names.items():
            _require_same_range(directory, stored, [written.byte_range(name)], targets[stored])


def _require_same_range(directory: Path, name: str, ranges: list[ByteRange] | None, expected: ByteRange) -> None:
    """Raise CheckpointError unless `ranges` is the expected range of the same file."""
    if ranges is None or [(part.file.name, part.start, part.length) for part in ranges] != [
            (expected.file.name, expected.start, expected.length)]:
        raise CheckpointError(f"{directory}: {name} reads back differently from what was written; check the disk and "
                              "try again")


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights to config.json, under the key that it uses already."""
    config: dict[str, Any] = read_json_object(config_file)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if not keys and dtype == torch.float32:
        return  # readers assume float32 anyway, so the config stays unchanged
    for key in keys or ["dtype"]:
        config[key] = name
    write_json(config_file, config)
