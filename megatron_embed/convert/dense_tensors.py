"""Weights of Dense modules, in a model directory (FOLDER/model.safetensors) and in a checkpoint (`model.dense.N.`)."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import DENSE_KEYS
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorEntry
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.errors import CheckpointError
from megatron_embed.models.dense_settings import DenseSettings, joint_projection
from megatron_embed.models.joint_files import find_joint_heads, write_joint_heads
from megatron_embed.models.saved_settings import read_saved_settings

WEIGHTS_FILE = "model.safetensors"
STORED_NAMES: Mapping[str, str] = {"weight": "linear.weight", "bias": "linear.bias"}
"""Our names -> those in Sentence Transformers' file."""


def open_dense(directory: Path, settings: DenseSettings) -> SafetensorsFile:
    """The weights of a directory's module, checked against its config.json; the caller closes them.

    Raises:
        CheckpointError: they are missing, of other shapes, or only a pickle.
    """
    file = directory / settings.path / WEIGHTS_FILE
    if not file.is_file():
        if (file.parent / "pytorch_model.bin").is_file():
            raise CheckpointError(f"{file.parent}: weights only in pytorch_model.bin, a pickle that is never opened; "
                                  "write safetensors once: python -c \"from sentence_transformers import "
                                  f"SentenceTransformer; SentenceTransformer('{directory}').save('NEW_DIR')\"")
        raise CheckpointError(f"{file}: no such file, and modules.json names the module; fetch it into its folder")
    opened = SafetensorsFile(file)
    expected = {STORED_NAMES[name]: shape for name, shape in settings.shapes.items()}
    stored = {name: entry.shape for name, entry in opened.entries.items()}
    if stored != expected:
        opened.close()
        raise CheckpointError(f"{file}: holds {_described(stored)}, but config.json beside it says "
                              f"{_described(expected)}; use the config.json that belongs to these weights")
    return opened


def _described(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))[:200] or "nothing"


class DenseWeights:
    """The weights of a directory's module by their names in the file; a context manager."""

    def __init__(self, directory: Path, settings: DenseSettings) -> None:
        """Raises CheckpointError, see `open_dense`."""
        self.path = directory / settings.path
        self._file = open_dense(directory, settings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file.entries)

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        return self._file.entries[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._file.read(name)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim`."""
        return self._file.read_slice(name, dim, start, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._file.close()


def read_dense(directory: Path, settings: DenseSettings) -> dict[str, Tensor]:
    """The tensors of a directory's module by our names, in the dtype of the file."""
    with DenseWeights(directory, settings) as opened:
        return {name: opened.read(STORED_NAMES[name]) for name in settings.shapes}


def write_dense(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write FOLDER/model.safetensors; `tensors` by our names."""
    folder.mkdir(exist_ok=True)
    declared = [(STORED_NAMES[name], tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(folder / WEIGHTS_FILE, declared) as writer:
        for name, tensor in tensors.items():
            writer.write(STORED_NAMES[name], tensor)


def holds_dense(reader: DcpReader) -> bool:
    """Whether a checkpoint's tensors include those of Dense modules, as those of a run that trained some do."""
    return any(key.startswith(DENSE_KEYS) for key in reader.keys())  # noqa: SIM118  a reader is not a mapping


def trained_dense(reader: DcpReader, dense: Sequence[DenseSettings], path: Path) -> list[dict[str, Tensor]]:
    """The tensors of a checkpoint's Dense modules by our names; none where the checkpoint holds none.

    Args:
        dense: the modules that the checkpoint's hf/ names.
        path: the checkpoint, for messages.
    Raises:
        CheckpointError: hf/ names other modules than there are.
    """
    if not holds_dense(reader):
        return []
    expected = {f"{DENSE_KEYS}{index}.{name}": shape for index, settings in enumerate(dense)
                for name, shape in settings.shapes.items()}
    stored = {key: tuple(reader.shape(key)) for key in reader.keys() if key.startswith(DENSE_KEYS)}  # noqa: SIM118
    if stored != expected:
        raise CheckpointError(f"{path}: holds {_described(stored)}, but hf/modules.json and its config.json files say "
                              f"{_described(expected)}; take another checkpoint")
    return [{name: reader.read(f"{DENSE_KEYS}{index}.{name}") for name in settings.shapes}
            for index, settings in enumerate(dense)]


def write_trained_dense(reader: DcpReader, dense: Sequence[DenseSettings], path: Path, directory: Path,
                        dtype: torch.dtype | None = None) -> None:
    """Write the Dense modules that a checkpoint trained into the folders of `directory`; see `trained_dense`.

    `dtype`: that they are rounded to; None: unchanged.
    """
    for settings, tensors in zip(dense, trained_dense(reader, dense, path), strict=False):
        write_dense(directory / settings.path,
                    {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()})


def write_trained_heads(reader: DcpReader, hf: Path, path: Path, directory: Path,
                        dtype: torch.dtype | None = None) -> None:
    """Write the Dense modules, or a joint model's heads, that a checkpoint trained; see `write_trained_dense`.

    `hf`: the checkpoint's.
    """
    dense, heads = read_saved_settings(hf).dense, find_joint_heads(hf)
    if dense or heads is None:
        write_trained_dense(reader, dense, path, directory, dtype)
        return
    joint = JointFormat(hidden_size=reader.shape(f"{DENSE_KEYS}0.weight")[1], token_dim=heads.dim)
    (tensors,) = trained_dense(reader, (joint_projection(joint),), path)
    write_joint_heads(directory, {name: tensor if dtype is None else tensor.to(dtype)
                                  for name, tensor in tensors.items()})


def take_dense(directory: Path, dense: Sequence[DenseSettings]) -> list[dict[str, Tensor]]:
    """The tensors of a directory's Dense modules by our names, whose folders are removed; empty for one without."""
    tensors = []
    for settings in dense:
        file = directory / settings.path / WEIGHTS_FILE
        tensors.append(read_dense(directory, settings) if settings.path and file.is_file() else {})
    for settings in dense:
        if settings.path:
            shutil.rmtree(directory / settings.path, ignore_errors=True)
    return tensors
