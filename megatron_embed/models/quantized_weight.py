"""Weights in 4 or 8 bits by bitsandbytes: quantized tensor by tensor, and restored for each product.

A Hugging Face tensor is quantized whole and then sliced, so that every layout holds the same numbers, and those that
Transformers holds with bitsandbytes. Imports no Megatron.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.models.quantization import BLOCK
from megatron_embed.names import Quantization

SCALES_PER_GROUP = 256
"""Scales of a tensor that share a scale of their own in double quantization."""


@dataclass(frozen=True, kw_only=True)
class NestedScales:
    """Second level of the scales of whole tensors that stand behind one another."""

    values: Tensor
    """[groups, 2] float32: scale and offset of each SCALES_PER_GROUP scales."""
    code: Tensor
    """[256] float32, what a scale's 8 bits stand for; one tensor for all weights of a device."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A Hugging Face weight, whole, [outputs, inputs]."""

    codes: Tensor
    """[outputs, inputs / 2] uint8, two weights each, or with int8 [outputs, inputs]."""
    scales: Tensor
    """[outputs, inputs / BLOCK] float32, or uint8 in double quantization; with int8 [outputs, 1]."""
    nested: NestedScales | None

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same on a device."""
        nested = self.nested
        if nested is not None:
            nested = NestedScales(values=nested.values.to(device), code=shared_code(nested.code.to(device)))
        return QuantizedTensor(codes=self.codes.to(device), scales=self.scales.to(device), nested=nested)


def quantize(weight: Tensor, kind: Quantization, *, double: bool) -> QuantizedTensor:
    """Quantize a weight, [outputs, inputs] of a floating-point dtype, on its device.

    Args:
        double: quantize the scales of nf4, too.
    """
    functions: Any = _functions()
    outputs, inputs = weight.shape
    if kind == "int8":
        codes, absmax, _ = functions.int8_vectorwise_quant(weight.half())
        return QuantizedTensor(codes=codes, scales=absmax[:, None], nested=None)
    assert kind == "nf4" and inputs % BLOCK == 0
    packed, state = functions.quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=double,
                                            quant_type="nf4")
    nested = None
    if double:
        second = state.state2.absmax
        nested = NestedScales(values=torch.stack([second, state.offset.expand_as(second)], dim=1),
                              code=shared_code(state.state2.code))
    return QuantizedTensor(codes=packed.view(outputs, inputs // 2), scales=state.absmax.view(outputs, inputs // BLOCK),
                           nested=nested)


class QuantizedWeight:
    """A rank's share of a linear's weight, in place of its parameter; empty until `fill`.

    Neither a parameter nor a buffer: it is in no state dict, and a cast of the model leaves its float32 scales alone.
    """

    def __init__(self, shape: tuple[int, int], *, allreduce: bool) -> None:
        """`allreduce`: Megatron's mark of the parameter: whether all data-parallel ranks hold copies of it."""
        self.shape = shape
        self.allreduce = allreduce
        self.codes = torch.empty(0)
        self.scales = torch.empty(0)
        self.nested: NestedScales | None = None
        self.first_scales: tuple[tuple[int, int, int], ...] = ()

    def fill(self, tensor: QuantizedTensor, first_scales: Sequence[tuple[int, int, int]] = ()) -> None:
        """Take the numbers of this share.

        Args:
            tensor: the share, in the order of the rank's rows; with double quantization its `nested` is that of the
                whole Hugging Face tensors.
            first_scales: with double quantization (number of rows, place of the first row's first scale among those of
                the whole tensors, its distance from row to row) for each run of rows.
        """
        per_byte = 1 if tensor.codes.dtype == torch.int8 else 2
        assert (tensor.codes.shape[0], tensor.codes.shape[1] * per_byte) == self.shape, "a share of another shape"
        # bitsandbytes reads as many scales as the shape has blocks, whether they are there or not.
        assert per_byte == 1 or tensor.scales.shape[1] * BLOCK == self.shape[1], "a share of broken blocks"
        self.codes, self.scales, self.nested = tensor.codes.contiguous(), tensor.scales.contiguous(), tensor.nested
        self.first_scales = tuple(first_scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held for this weight alone."""
        held = [self.codes, self.scales, *([] if self.nested is None else [self.nested.values])]
        return sum(tensor.nbytes for tensor in held)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs] in `dtype`: a new tensor, for one product. No communication."""
        assert self.codes.numel(), "a quantized weight that was never loaded"
        if self.codes.dtype == torch.int8:
            return self.codes.to(dtype).mul_(self.scales * (1.0 / 127.0))
        functions: Any = _functions()
        state = functions.QuantState(
            absmax=self._scales().reshape(-1), shape=torch.Size(self.shape), dtype=dtype, blocksize=BLOCK,
            quant_type="nf4")
        restored: Tensor = functions.dequantize_4bit(self.codes.view(-1, 1), state)
        return restored

    def _scales(self) -> Tensor:
        """[outputs, inputs / BLOCK] float32."""
        if self.nested is None:
            return self.scales
        first = _places_of_first_scales(self.first_scales, self.codes.device)
        places = first[:, None] + torch.arange(self.scales.shape[1], device=first.device)
        second = self.nested.values[places // SCALES_PER_GROUP]
        return self.nested.code[self.scales.int()] * second[..., 0] + second[..., 1]


def restored_whole(quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs] in `dtype`: what a weight stands for."""
    rows, columns = quantized.codes.shape
    inputs = columns if quantized.codes.dtype == torch.int8 else 2 * columns
    weight = QuantizedWeight((rows, inputs), allreduce=True)
    weight.fill(quantized, [(rows, 0, inputs // BLOCK)])
    return weight.restored(dtype)


@functools.lru_cache(maxsize=256)
def _places_of_first_scales(runs: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """[outputs] int64; the layers of a model share it."""
    return torch.cat([torch.arange(rows) * step + first for rows, first, step in runs]).to(device)


_codes: dict[torch.device, Tensor] = {}


def shared_code(code: Tensor) -> Tensor:
    """The same code for all weights of a device: bitsandbytes makes a copy for each."""
    known = _codes.setdefault(code.device, code)
    assert torch.equal(known, code), "bitsandbytes has one code of 8 bits"
    return known


def _functions() -> Any:
    """bitsandbytes.functional, imported where a weight is quantized: the package is optional."""
    import bitsandbytes.functional as functions

    return functions
