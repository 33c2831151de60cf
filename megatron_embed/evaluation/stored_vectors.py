"""Vectors as a store keeps them: int8 codes within ranges, or one bit of each component, in the bytes and with the
ranges of Sentence Transformers' `quantize_embeddings`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.config.json_file import read_optional_json_object
from megatron_embed.errors import CheckpointError, DataError
from megatron_embed.names import RANGES_FILE, Precision, VectorDtype

CALIBRATION_VECTORS = 4096
"""Documents whose vectors give the ranges of a model without ranges of its own."""
Ranges = Mapping[int, NDArray[np.float32]]
"""Width of vectors -> [2, width], smallest and largest value of each component."""


def needs_ranges(dtype: VectorDtype) -> bool:
    """Whether numbers of this type are codes within ranges."""
    return dtype in ("int8", "uint8")


def ranges_of(vectors: Tensor) -> NDArray[np.float32]:
    """[2, width] smallest and largest value of each component of [rows, width] vectors, at least one."""
    return torch.stack(torch.aminmax(vectors.float(), dim=0)).cpu().numpy()


def as_dtype(vectors: Tensor, dtype: VectorDtype, ranges: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """The numbers that a file holds of [rows, width] float32 vectors on the CPU.

    Args:
        ranges: [2, width], of int8 and uint8.
    Returns:
        [rows, width], or of binary and ubinary [rows, ceil(width / 8)], the first component in the highest bit.
    Raises:
        DataError: a component is larger than the type, or the range of a component than float32, can hold.
    """
    values = vectors.numpy()
    if dtype in ("binary", "ubinary"):
        packed = np.packbits(values > 0, axis=-1)
        return packed if dtype == "ubinary" else (packed ^ np.uint8(128)).view(np.int8)
    if not needs_ranges(dtype):
        with np.errstate(over="ignore"):
            numbers = values.astype(dtype)
        _refuse_overflow(values, numbers, f"--output-dtype {dtype}: a component", "encode the texts as float32")
        return numbers
    assert ranges is not None
    with np.errstate(over="ignore"):
        steps = (ranges[1] - ranges[0]) / 255
    _refuse_overflow(ranges, steps, f"--output-dtype {dtype}: the range of a component", "encode the texts as float32")
    codes = np.clip(np.floor((values - ranges[0]) / np.where(steps == 0, 1, steps)), 0, 255)
    return codes.astype(np.uint8) if dtype == "uint8" else (codes - 128).astype(np.int8)


def _refuse_overflow(values: NDArray[Any], numbers: NDArray[Any], what: str, remedy: str) -> None:
    """Raises DataError if numbers that were made of finite values are not."""
    if not np.isfinite(numbers).all():
        raise DataError(f"{what} is too large for it (the largest has a size of {np.abs(values).max():.3g}); {remedy}")


def read_ranges(source: Path) -> Ranges:
    """The ranges that a file, or a model directory's RANGES_FILE, holds; empty: there is none. Raises CheckpointError
    for a damaged file."""
    file = source if source.suffix == ".json" else source / RANGES_FILE
    ranges = {}
    for width, value in read_optional_json_object(file).items():
        try:
            with np.errstate(over="ignore"):
                array = np.array(value, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            array = np.empty(0, dtype=np.float32)
        valid = array.ndim == 2 and len(array) == 2 and str(array.shape[1]) == width and np.isfinite(array).all()
        with np.errstate(over="ignore"):
            valid = valid and np.isfinite(array[1] - array[0]).all() and (array[0] <= array[1]).all()
        if not valid:
            raise CheckpointError(f"{file}: {width!r} must be [smallest, largest], two lists of {width} numbers; "
                                  "remove the file, or export the model again")
        ranges[array.shape[1]] = array
    return ranges


def ranges_text(ranges: Ranges) -> str:
    """The content of a file of ranges, from which every float32 is read back as it is."""
    return json.dumps({str(width): value.tolist() for width, value in ranges.items()}) + "\n"


def ranges_name(output: str) -> str:
    """The file of the ranges of codes in a .npy file or a directory of them."""
    return f"{output[:-4]}.{RANGES_FILE}" if output.endswith(".npy") else str(Path(output) / RANGES_FILE)


def precision_prefixes(dims: Sequence[int], precisions: Sequence[Precision]) -> list[
        tuple[str, int | None, Precision]]:
    """(prefix of the metrics' names, width or None for whole vectors, precision) of every search at a precision; that
    in float32 has the plain names."""
    return [(f"{'' if width is None else f'dim_{width}/'}{precision}/", width, precision)
            for width in (None, *dims) for precision in precisions if precision != "float32"]


def bits(vectors: Tensor) -> Tensor:
    """[rows, width] 1 where a component is above 0, else -1: dot products are width - 2 * Hamming distance, exactly."""
    return torch.where(vectors > 0, 1.0, -1.0)
