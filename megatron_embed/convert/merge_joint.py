"""The joint heads of merged models: merged as their other tensors are, or left out."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_embed.convert.storage.safetensors_file import TensorEntry
from megatron_embed.errors import CheckpointError
from megatron_embed.models.joint_files import (
    VECTORS_FILE,
    find_joint_heads,
    read_joint_heads,
    remove_joint_heads,
    write_joint_heads,
)

logger = logging.getLogger(__name__)


class HeadTensors:
    """The heads of a directory by the names of `read_joint_heads`, read as other files of tensors are."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path = path
        self._tensors = tensors

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        tensor = self._tensors[name]
        return TensorEntry(dtype=tensor.dtype, shape=tuple(tensor.shape), offset=0)

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._tensors[name]

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim`."""
        return self._tensors[name].narrow(dim, start, stop - start)


def merge_joint_heads(work: Path, models: Sequence[Path], base: Path | None,
                      merged: Callable[[str, Sequence[HeadTensors], HeadTensors | None], Tensor]) -> None:
    """Write the merged heads to `work`, which has the files of the first model. Unless every model and the base have
    heads, the merged model has none: those of one would not fit its other weights.

    Args:
        merged: one merged tensor of the models and the base.
    Raises:
        CheckpointError: a model's heads cannot be read, or are of other sizes or weights of scores than the first's.
    """
    folders = [*models, *([] if base is None else [base])]
    heads = {folder: read_joint_heads(folder) for folder in folders}
    present = {folder: tensors for folder, tensors in heads.items() if tensors is not None}
    if len(present) < len(heads):
        remove_joint_heads(work)
        if present:
            without = next(folder for folder, tensors in heads.items() if tensors is None)
            logger.warning("%s has no joint heads (%s), so the merged model has none", without, VECTORS_FILE)
        return
    first = find_joint_heads(models[0])
    for folder in folders[1:]:
        other = find_joint_heads(folder)
        if other != first and (folder != base or len(present[folder]["weight"]) != len(present[models[0]]["weight"])):
            raise CheckpointError(f"{models[0]} and {folder} cannot be merged: their joint heads are {first} and "
                                  f"{other}; merge models with the same sizes and weights")
    opened = [HeadTensors(folder, present[folder]) for folder in folders]
    own, origin = opened[: len(models)], None if base is None else opened[-1]
    write_joint_heads(work, {name: merged(name, own, origin) for name in ("weight", "bias")})
