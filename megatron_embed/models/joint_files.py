"""The heads of a joint model beside its weights, as BGE-M3 has them: `colbert_linear.pt` gives every token a vector,
`sparse_linear.pt` a weight.

Both are pickles, of which nothing but plain tensors is read. `joint_heads.json`, beside them or in place of them in a
checkpoint, whose own tensors hold the heads, names the size of the vectors and the weights of the scores in their sum.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_embed.config.json_file import read_json_file
from megatron_embed.config.objective import SCORE_WEIGHTS
from megatron_embed.errors import CheckpointError
from megatron_embed.models.file_checks import open_regular, refuse_compressed

if TYPE_CHECKING:  # `doctor` and `plan` read these files without torch, unless there are tensors
    from torch import Tensor

VECTORS_FILE, WEIGHTS_FILE = "colbert_linear.pt", "sparse_linear.pt"
SETTINGS_FILE = "joint_heads.json"
_LARGEST_FILE = 1 << 30
_LARGEST_DIM = 1 << 20
_LARGEST_WEIGHT = 1e30
"""A sum of scores stays finite in float32."""


@dataclass(frozen=True, kw_only=True)
class JointHeads:
    """The heads that a directory has."""

    dim: int
    """Numbers of a token's vector."""
    score_weights: tuple[float, ...] = SCORE_WEIGHTS
    """Weights of the scores in their sum, in the order of JOINT_SCORES."""


def find_joint_heads(folder: Path) -> JointHeads | None:
    """The heads of a directory; None: it has none.

    Raises:
        CheckpointError: a file is missing, damaged, holds more than plain tensors, or tensors of other shapes.
    """
    tensors, file = read_joint_heads(folder), folder / SETTINGS_FILE
    stated = _stated(file) if file.is_file() else None
    if tensors is None or stated is None:
        return stated if tensors is None else JointHeads(dim=len(tensors["weight"]) - 1)
    if stated.dim != len(tensors["weight"]) - 1:
        raise CheckpointError(f"{file}: embedding_dim = {stated.dim}, and {VECTORS_FILE} gives vectors of "
                              f"{len(tensors['weight']) - 1} numbers; fetch both again")
    return stated


def _stated(file: Path) -> JointHeads:
    try:
        values: Any = read_json_file(file)
        dim, weights = values["embedding_dim"], tuple(values["score_weights"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: no usable embedding_dim and score_weights ({error!r}); fetch it "
                              "again") from error
    if type(dim) is not int or not 0 < dim <= _LARGEST_DIM:
        raise CheckpointError(f"{file}: embedding_dim = {str(dim)[:40]!r} must be a whole number from 1 to "
                              f"{_LARGEST_DIM:,}; fetch it again")
    if len(weights) != len(SCORE_WEIGHTS) or not all(
            type(weight) in (int, float) and 0 <= weight <= _LARGEST_WEIGHT for weight in weights) or not any(weights):
        raise CheckpointError(f"{file}: score_weights must be {len(SCORE_WEIGHTS)} numbers from 0 to "
                              f"{_LARGEST_WEIGHT:g}, not all 0; fetch it again")
    return JointHeads(dim=dim, score_weights=weights)


def write_settings_file(folder: Path, heads: JointHeads) -> None:
    """Write SETTINGS_FILE."""
    values = {"embedding_dim": heads.dim, "score_weights": list(heads.score_weights)}
    (folder / SETTINGS_FILE).write_text(json.dumps(values), encoding="utf-8")


def remove_joint_heads(folder: Path) -> None:
    """Remove all of these files."""
    for name in (VECTORS_FILE, WEIGHTS_FILE, SETTINGS_FILE):
        (folder / name).unlink(missing_ok=True)


def read_joint_heads(folder: Path) -> "dict[str, Tensor] | None":
    """The layer of both heads, as `joint_projection` describes it: `weight` [dim + 1, hidden], `bias` [dim + 1], those
    of the tokens' weights in the last row; None: the directory has neither file.

    Raises: as `find_joint_heads`.
    """
    present = [name for name in (VECTORS_FILE, WEIGHTS_FILE) if (folder / name).is_file()]
    if not present:
        return None
    if len(present) == 1:
        missing = WEIGHTS_FILE if present == [VECTORS_FILE] else VECTORS_FILE
        raise CheckpointError(f"{folder / missing}: no such file, and {present[0]} is there; fetch both, or remove it")
    import torch

    vectors, weights = (_layer(folder / name) for name in (VECTORS_FILE, WEIGHTS_FILE))
    hidden = vectors["weight"].shape[1]
    if tuple(weights["weight"].shape) != (1, hidden):
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: weight is {list(weights['weight'].shape)}, and must be "
                              f"[1, {hidden}] beside {VECTORS_FILE}; fetch both again")
    return {name: torch.cat([vectors[name], weights[name]]) for name in ("weight", "bias")}


def write_joint_heads(folder: Path, tensors: "dict[str, Tensor]") -> None:
    """Write both files; `tensors` as `read_joint_heads` gives them."""
    import torch

    for name, rows in ((VECTORS_FILE, slice(None, -1)), (WEIGHTS_FILE, slice(-1, None))):
        torch.save({key: tensor[rows].contiguous().clone() for key, tensor in tensors.items()}, folder / name)


def _layer(file: Path) -> "dict[str, Tensor]":
    """weight [outputs, inputs] and bias [outputs] of a file."""
    import torch

    try:
        with open_regular(file) as opened:
            if file.stat().st_size > _LARGEST_FILE:
                raise ValueError(f"larger than {_LARGEST_FILE:,} bytes")
            refuse_compressed(opened)
            values = torch.load(opened, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle ends in errors of every kind
        named = "names code, which is never run" if isinstance(error, pickle.UnpicklingError) else (
            (str(error).strip() or type(error).__name__).splitlines()[0])
        raise CheckpointError(f"{file}: not readable as tensors alone ({named}); fetch it again from a source that you "
                              "trust") from error
    good = isinstance(values, dict) and set(values) == {"weight", "bias"} and all(
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes() for value in values.values())
    if not good or values["weight"].dim() != 2 or values["bias"].shape != values["weight"].shape[:1] or (
            not 0 < len(values["weight"]) <= _LARGEST_DIM):
        raise CheckpointError(f"{file}: must hold weight [outputs, inputs] and bias [outputs], and nothing else, as "
                              "torch.nn.Linear.state_dict() gives them; fetch it again")
    return {name: value.float() if value.dtype not in (torch.float32, torch.float64) else value
            for name, value in values.items()}
