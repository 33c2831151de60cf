"""The heads of a joint model beside its weights, as BGE-M3 has them: `colbert_linear.pt` gives every token a vector,
`sparse_linear.pt` a weight.

Both are pickles, of which nothing but plain tensors is read. A checkpoint, whose own tensors hold them, names their size
in `joint_heads.json` instead.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import open_regular

VECTORS_FILE, WEIGHTS_FILE = "colbert_linear.pt", "sparse_linear.pt"
SIZES_FILE = "joint_heads.json"
_LARGEST_FILE = 1 << 30
_LARGEST_DIM = 1 << 20


def joint_dim(folder: Path) -> int | None:
    """Numbers of a token's vector by a directory's heads; None: it has none.

    Raises:
        CheckpointError: a file is missing, damaged, holds more than plain tensors, or tensors of other shapes.
    """
    if (folder / SIZES_FILE).is_file() and not (folder / VECTORS_FILE).is_file():
        return _stated_dim(folder / SIZES_FILE)
    tensors = read_joint_heads(folder)
    return None if tensors is None else len(tensors["weight"]) - 1


def _stated_dim(file: Path) -> int:
    try:
        dim: Any = read_json_file(file)["embedding_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: no usable embedding_dim ({error!r}); take another checkpoint") from error
    if type(dim) is not int or not 0 < dim <= _LARGEST_DIM:
        raise CheckpointError(f"{file}: embedding_dim = {str(dim)[:40]!r} must be a whole number from 1 to "
                              f"{_LARGEST_DIM:,}; take another checkpoint")
    return dim


def write_sizes(folder: Path, dim: int) -> None:
    """Write SIZES_FILE."""
    (folder / SIZES_FILE).write_text(json.dumps({"embedding_dim": dim}), encoding="utf-8")


def read_joint_heads(folder: Path) -> dict[str, Tensor] | None:
    """The layer of both heads, as `joint_projection` describes it: `weight` [dim + 1, hidden], `bias` [dim + 1], those of
    the tokens' weights in the last row; None: the directory has neither file.

    Raises: as `joint_dim`.
    """
    present = [name for name in (VECTORS_FILE, WEIGHTS_FILE) if (folder / name).is_file()]
    if not present:
        return None
    if len(present) == 1:
        missing = WEIGHTS_FILE if present == [VECTORS_FILE] else VECTORS_FILE
        raise CheckpointError(f"{folder / missing}: no such file, and {present[0]} is there; fetch both, or remove it")
    vectors, weights = (_layer(folder / name) for name in (VECTORS_FILE, WEIGHTS_FILE))
    hidden = vectors["weight"].shape[1]
    if tuple(weights["weight"].shape) != (1, hidden):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: weight is {list(weights['weight'].shape)}, and must be "
                              f"[1, {hidden}] beside {VECTORS_FILE}; fetch both again")
    return {name: torch.cat([vectors[name], weights[name]]) for name in ("weight", "bias")}


def write_joint_heads(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write both files; `tensors` as `read_joint_heads` gives them."""
    for name, rows in ((VECTORS_FILE, slice(None, -1)), (WEIGHTS_FILE, slice(-1, None))):
        torch.save({key: tensor[rows].contiguous().clone() for key, tensor in tensors.items()}, folder / name)


def _layer(file: Path) -> dict[str, Tensor]:
    """weight [outputs, inputs] and bias [outputs] of a file."""
    try:
        with open_regular(file) as opened:
            if file.stat().st_size > _LARGEST_FILE:
                raise ValueError(f"larger than {_LARGEST_FILE:,} bytes")
            values = torch.load(opened, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle ends in errors of every kind
        named = "names code, which is never run" if isinstance(error, pickle.UnpicklingError) else (
            (str(error).strip() or type(error).__name__).splitlines()[0])
        raise CheckpointError(f"{file}: not readable as tensors alone ({named}); fetch it again from a source that you "
                              "trust") from error
    good = isinstance(values, dict) and set(values) == {"weight", "bias"} and all(
        isinstance(value, Tensor) and value.is_floating_point() for value in values.values())
    if not good or values["weight"].dim() != 2 or values["bias"].shape != values["weight"].shape[:1] or (
            not 0 < len(values["weight"]) <= _LARGEST_DIM):
        raise CheckpointError(f"{file}: must hold weight [outputs, inputs] and bias [outputs], and nothing else, as "
                              "torch.nn.Linear.state_dict() gives them; fetch it again")
    return {name: value.float() if value.dtype not in (torch.float32, torch.float64) else value
            for name, value in values.items()}
