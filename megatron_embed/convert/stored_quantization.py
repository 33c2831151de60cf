"""Weights as Transformers saves what bitsandbytes quantized: codes under the weight's name, their scales beside it."""

import importlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError
from megatron_embed.models.quantization import BLOCK
from megatron_embed.models.quantized_weight import SCALES_PER_GROUP, NestedScales, QuantizedTensor, shared_code
from megatron_embed.names import Quantization

STATE = "quant_state.bitsandbytes__nf4"
"""Part of a weight in nf4 that holds JSON, as bytes: shape, dtype, block sizes."""
LONGEST_STATE = 4096
"""Bytes of that text; bitsandbytes writes about 200."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NF4 = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
_INT8 = re.compile(r"(.+)\.(SCB|weight_format)")


def part_of(name: str, kind: Quantization) -> tuple[str, str] | None:
    """(the weight's name, the part's) of a tensor that belongs to a quantized weight; None for any other tensor."""
    match = (_INT8 if kind == "int8" else _NF4).fullmatch(name)
    if match is None:
        return None
    return (f"{match[1]}.weight" if kind == "int8" else match[1]), match[2]


def read_state(file: Path, name: str, data: Tensor | None) -> tuple[tuple[int, int], torch.dtype, float]:
    """(shape, dtype before quantization, offset of the scales) of a weight in nf4, from its part STATE.

    Raises:
        CheckpointError: not readable, or not in the blocks that bitsandbytes has by default.
    """
    try:
        if data is None or data.dtype != torch.uint8 or data.numel() > LONGEST_STATE:
            raise ValueError("missing" if data is None else "not a short text")
        values: dict[str, Any] = json.loads(bytes(data.tolist()))
        rows, columns = (int(size) for size in values["shape"])
        dtype = _DTYPES[values["dtype"]]
        blocks = (values["quant_type"], values["blocksize"], values.get("nested_blocksize", SCALES_PER_GROUP))
        offset = float(values.get("nested_offset", 0.0))
        if not math.isfinite(offset):
            raise ValueError("nested_offset")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {name}.{STATE} is not readable ({error!r}); fetch the file again") from error
    if blocks != ("nf4", BLOCK, SCALES_PER_GROUP):
        raise CheckpointError(f"{file}: {name} is quantized as {blocks[0]} in blocks of {blocks[1]} and "
                              f"{blocks[2]}, but nf4 in blocks of {BLOCK} and {SCALES_PER_GROUP} is read; take the "
                              "original weights")
    return (rows, columns), dtype, offset


def nf4_tensor(file: Path, name: str, codes: Tensor, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """A whole weight in nf4, from its codes, of whichever dtype holds their bytes, and its parts.

    Raises:
        CheckpointError: a part is missing, of another size, or another code than bitsandbytes'.
    """
    functions: Any = importlib.import_module("bitsandbytes.functional")
    (rows, columns), _, offset = read_state(file, name, parts.get(STATE))
    shape = (rows, columns // BLOCK)
    try:
        packed = codes.contiguous().view(torch.uint8).view(rows, columns // 2)
        scales = parts["absmax"].view(shape)
        _require_code(parts["quant_map"], functions.get_4bit_type("nf4", device="cpu"))
        if "nested_absmax" not in parts:
            return QuantizedTensor(codes=packed, scales=scales.float(), nested=None)
        second = parts["nested_absmax"].float()
        code = functions.create_dynamic_map()
        _require_code(parts["nested_quant_map"], code)
        assert scales.dtype == torch.uint8 and len(second) == -(-scales.numel() // SCALES_PER_GROUP)
    except (KeyError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{file}: {name}: its codes and scales do not belong together ({error}); fetch the file "
                              "again, or take the original weights") from error
    nested = NestedScales(values=torch.stack([second, torch.full_like(second, offset)], dim=1), code=shared_code(code))
    return QuantizedTensor(codes=packed, scales=scales, nested=nested)


def int8_tensor(file: Path, name: str, codes: Tensor, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """A whole weight in int8, from its codes `[outputs, inputs]` and its parts. Raises CheckpointError."""
    scales, layout = parts.get("SCB"), parts.get("weight_format")
    if codes.dtype != torch.int8 or scales is None or scales.shape != codes.shape[:1]:
        raise CheckpointError(f"{file}: {name}: its codes and its scales (SCB) do not belong together; fetch the file "
                              "again, or take the original weights")
    if layout is not None and layout.any():
        raise CheckpointError(f"{file}: {name} is in the order of a GPU's kernel (weight_format), not in rows; save "
                              "it again with bitsandbytes 0.45 or later, or take the original weights")
    return QuantizedTensor(codes=codes, scales=scales.float()[:, None], nested=None)


def _require_code(stored: Tensor, known: Tensor) -> None:
    """Raise an error unless this bitsandbytes reads the same values from the bits."""
    if stored.shape != known.shape or not torch.equal(stored.float(), known.float()):
        raise RuntimeError("another code than bitsandbytes'")
