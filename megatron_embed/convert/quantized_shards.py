"""Quantized weights of a rank from a Hugging Face directory: each tensor is quantized whole, then sliced."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.tables.transforms import Context, ReadSlice, Rename, Transform
from megatron_embed.errors import CheckpointError
from megatron_embed.models.quantization import BLOCK
from megatron_embed.models.quantized_weight import (
    SCALES_PER_GROUP,
    NestedScales,
    QuantizedTensor,
    QuantizedWeight,
    quantize,
)
from megatron_embed.names import Quantization


def quantized_tensor(source: HFDirectory, name: str, kind: Quantization, *, double: bool,
                     device: torch.device | None = None) -> QuantizedTensor:
    """A whole tensor of a directory in codes and scales, on `device`: those of its file if it has them, else new ones.

    Raises:
        CheckpointError: the directory is quantized, but this tensor is not.
    """
    if source.stored is None:
        return quantize(source.read(name).to(device), kind, double=double)
    if not source.is_quantized(name):
        raise CheckpointError(f"{source.path}: {source.stored_names[name]} is not quantized, but other weights are "
                              "(llm_int8_skip_modules?), and all linears of the layers must be; take the original "
                              "weights")
    tensor = source.read_quantized(name)
    if (tensor.nested is not None) != (source.stored.quantization == "nf4" and source.stored.double_quantization):
        raise CheckpointError(f"{source.path}: {source.stored_names[name]}: bnb_4bit_use_double_quant of config.json "
                              "is not true of it; correct config.json or fetch the weights again")
    return tensor if device is None else tensor.to(device)


def fill_quantized_weights(source: HFDirectory, weights: Iterable[tuple[str, QuantizedWeight]],
                           quantized: Callable[[str], QuantizedTensor], *, tensor: tuple[int, int],
                           expert_tensor: tuple[int, int]) -> None:
    """Read, quantize and slice what a rank's `weights` are made of, one Hugging Face tensor after another.

    Args:
        source: the directory, open.
        weights: by our parameters' names; layers and experts are counted over the whole model.
        quantized: a whole tensor by its name, quantized.
        tensor: tensor-parallel rank and size.
        expert_tensor: expert-tensor-parallel rank and size, which split the experts.
    """
    for name, weight in weights:
        rule, layer, expert = source.family.rule_for(name)
        context = Context(shape=source.shape, layer=layer, expert=expert)
        parts = [quantized(part) for part in rule.hf_names(context)]
        weight.fill(*share(rule, context, parts, *(expert_tensor if rule.is_expert else tensor)))


def share(rule: Transform, context: Context, parts: list[QuantizedTensor], rank: int,
          size: int) -> tuple[QuantizedTensor, list[tuple[int, int, int]]]:
    """A rank's share of the weight that `rule` makes of whole tensors; the arguments of QuantizedWeight.fill."""
    def sliced(tensors: list[Tensor], per_column: int) -> Tensor:
        return rule.shard(_reader_of(rule.hf_names(context), tensors, per_column), context, rank, size)

    is_int8 = parts[0].codes.dtype == torch.int8
    codes = sliced([part.codes for part in parts], 1 if is_int8 else 2)
    if is_int8 and _splits_columns(rule, size):
        return QuantizedTensor(codes=codes, scales=parts[0].scales, nested=None), []
    scales = sliced([part.scales for part in parts], 1 if is_int8 else BLOCK)
    levels = [part.nested for part in parts if part.nested is not None]
    if not levels:
        return QuantizedTensor(codes=codes, scales=scales, nested=None), []
    nested = NestedScales(values=torch.cat([level.values for level in levels]), code=levels[0].code)
    return QuantizedTensor(codes=codes, scales=scales, nested=nested), _first_scales(rule, context, parts, rank, size)


def _splits_columns(rule: Transform, size: int) -> bool:
    return isinstance(rule, Rename) and rule.shard_dim == 1 and size > 1


def _reader_of(names: tuple[str, ...], tensors: list[Tensor], per_column: int) -> ReadSlice:
    """The slices of tensors in memory, `per_column` weights of a row to one of their columns."""
    def read_slice(name: str, dim: int, start: int, stop: int) -> Tensor:
        unit = per_column if dim == 1 else 1
        return tensors[names.index(name)].narrow(dim, start // unit, (stop - start) // unit)

    return read_slice


def _first_scales(rule: Transform, context: Context, parts: list[QuantizedTensor], rank: int,
                  size: int) -> list[tuple[int, int, int]]:
    """`first_scales` of QuantizedWeight.fill, for the tensors' second levels behind one another."""
    starts, per_row = [0], [part.scales.shape[1] for part in parts]
    for part in parts:
        assert part.nested is not None
        starts.append(starts[-1] + len(part.nested.values) * SCALES_PER_GROUP)
    column = rank * (per_row[0] // size) if _splits_columns(rule, size) else 0
    return [(rows.rows, starts[rows.part] + rows.hf_start * per_row[rows.part] + column, per_row[rows.part])
            for rows in rule.row_ranges(context, rank, size)]
