"""Read a checkpoint with LoRA adapters as one without: W + scale * B A in place of W."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.convert.lora_names import adapter_tensors
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.models.families import ModelShape
from megatron_embed.models.lora_settings import AdapterSettings, is_adapter

CheckpointKey = tuple[str, int | None]
"""Key in a checkpoint, and index along that tensor's axis of experts."""


class MergedReader(DcpReader):
    """Reads whole tensors of a checkpoint with the adapters merged, in float32, then rounded once to the stored dtype.

    Memory holds one tensor and its LoRA update in float32.
    """

    def __init__(self, directory: Path, family: Family, shape: ModelShape, settings: AdapterSettings) -> None:
        super().__init__(directory)
        self._scale = settings.scale
        self._adapters: dict[str, dict[str, list[CheckpointKey]]] = {}
        """Hugging Face module -> keys of the parts of its matrices A and B."""
        for tensor in adapter_tensors(family, shape, settings.modules, settings.rank):
            parts = self._adapters.setdefault(tensor.module, {}).setdefault(tensor.matrix, [])
            parts.append(family.checkpoint_key(tensor.ours))
        self._adapted: dict[CheckpointKey, tuple[Transform, Context]] = {}
        """Parameters with adapters, and the rules that make them."""
        for rule, context in family.applied_rules(shape):
            if any(name.removesuffix(".weight") in self._adapters for name in rule.hf_names(context)):
                self._adapted[family.checkpoint_key(context.name(rule.ours))] = (rule, context)

    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors except the adapters."""
        return tuple(key for key in super().keys() if not is_adapter(key))  # noqa: SIM118  a reader is not a dictionary

    def byte_ranges(self, key: str, index: int | None = None) -> list[ByteRange] | None:
        """The ranges in the files; None also for linear layers with adapters, which `read` computes."""
        return None if (key, index) in self._adapted else super().byte_ranges(key, index)

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The tensor `key`, or its slice `index`; linear layers have their adapters merged."""
        weight = super().read(key, index)
        if (key, index) not in self._adapted:
            return weight
        return (weight.float() + self.update_of(*self._adapted[key, index])).to(weight.dtype)

    def update_of(self, rule: Transform, context: Context) -> Tensor:
        """The adapters' update of the parameter that `rule` makes, in float32."""
        updates = {name: self._update(name, context.sizes(words))
                   for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True)}

        def read_slice(name: str, dim: int, start: int, stop: int) -> Tensor:
            return updates[name].narrow(dim, start, stop - start)

        # The rule fuses updates as it fuses weights.
        return rule.to_ours(read_slice, context)

    def _update(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """scale * B A of a Hugging Face weight in float32; zero if it has no adapter."""
        keys = self._adapters.get(name.removesuffix(".weight"))
        if keys is None:
            return torch.zeros(shape)
        matrix_a, matrix_b = (torch.cat([DcpReader.read(self, *key).float() for key in keys[matrix]])
                              for matrix in "AB")
        return (matrix_b @ matrix_a) * self._scale
