"""A checkpoint with adapters read as one without: W + scale * B A in place of W."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.convert.adapter_names import adapter_tensors
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.models.adapters import AdapterSettings, is_adapter
from megatron_embed.models.families import ModelShape

Place = tuple[str, int | None]
"""Key in a checkpoint, and index along that tensor's axis of experts."""


class MergedReader(DcpReader):
    """Reads whole tensors of a checkpoint, adapters merged: computed in float32 and rounded once, in the dtype stored.

    Memory holds one tensor and its change in float32.
    """

    def __init__(self, directory: Path, family: Family, shape: ModelShape, settings: AdapterSettings) -> None:
        super().__init__(directory)
        self._scale = settings.scale
        self._pairs: dict[str, dict[str, Place]] = {}
        for tensor in adapter_tensors(family, shape, settings.modules, settings.rank):
            self._pairs.setdefault(tensor.module, {})[tensor.matrix] = family.checkpoint_key(tensor.ours)
        self._rows: dict[Place, tuple[Transform, Context]] = {}
        for rule, context in family.applied_rules(shape):
            if any(name.removesuffix(".weight") in self._pairs for name in rule.hf_names(context)):
                self._rows[family.checkpoint_key(context.name(rule.ours))] = (rule, context)

    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors, without the adapters'."""
        every = super().keys()
        return tuple(key for key in every if not is_adapter(key))

    def byte_ranges(self, key: str, index: int | None = None) -> list[ByteRange] | None:
        """As in the files; null also for linears with adapters, which `read` computes."""
        return None if (key, index) in self._rows else super().byte_ranges(key, index)

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The tensor `key`, or that `index` of it; linears with their adapters merged."""
        weight = super().read(key, index)
        if (key, index) not in self._rows:
            return weight
        rule, context = self._rows[key, index]
        changes = {name: self._change(name, context.sizes(words))
                   for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True)}
        return (weight.float() + rule.to_ours(_Tensors(changes), context)).to(weight.dtype)

    def _change(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """scale * B A of a Hugging Face weight in float32, zero if it has no adapter."""
        places = self._pairs.get(name.removesuffix(".weight"))
        if places is None:
            return torch.zeros(shape)
        first, second = (DcpReader.read(self, *places[matrix]).float() for matrix in "AB")
        return (second @ first) * self._scale


@dataclass(frozen=True)
class _Tensors:
    """Tensors in memory as a `TensorReader`, so that a table row fuses changes as it fuses weights."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)
