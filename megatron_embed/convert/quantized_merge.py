"""Read adapters over quantized weights as one model without either: restored W + scale * B A."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.lora_merge import CheckpointKey, MergedReader
from megatron_embed.convert.lora_names import linear_rules
from megatron_embed.convert.quantized_shards import quantized_tensor, share
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.models.lora_settings import AdapterSettings
from megatron_embed.models.quantization import QuantizedBase
from megatron_embed.models.quantized_weight import QuantizedWeight


class QuantizedReader(MergedReader):
    """Reads whole tensors of the model that was trained: the base directory's, those of linears as their quantized
    weights stand for, with the adapters merged in float32, then rounded once to the dtype of the base's file.

    A reranker's head comes from the checkpoint. Memory holds one tensor, quantized, restored and its LoRA update.
    """

    def __init__(self, directory: Path, settings: AdapterSettings, base: QuantizedBase, source: HFDirectory) -> None:
        """`source`: the base directory, open; closed with the reader."""
        super().__init__(directory, source.family, source.shape, settings)
        self._base, self._source = base, source
        linears = set(linear_rules(source.family).values())
        self._rules: dict[CheckpointKey, tuple[Transform, Context]] = {}
        self._quantized: set[CheckpointKey] = set()
        for rule, context in source.family.applied_rules(source.shape):
            key = source.family.checkpoint_key(context.name(rule.ours))
            self._rules[key] = (rule, context)
            if rule in linears:
                self._quantized.add(key)
        self._by_key = {key: rule for (key, _), rule in self._rules.items()}

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        super().__exit__(kind, *details)
        self._source.close()

    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors, without the adapters."""
        return (*super().keys(), *self._by_key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor, without vocabulary padding."""
        if key not in self._by_key:
            return super().shape(key)
        rule, context = self._by_key[key]
        shape = rule.ours_shape(context)
        return shape if context.expert is None else (context.shape.num_experts, *shape)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor in the base's file."""
        if key not in self._by_key:
            return super().dtype(key)
        rule, context = self._by_key[key]
        return self._source.entry(rule.hf_names(context)[0]).dtype

    def byte_ranges(self, key: str, index: int | None = None) -> list[ByteRange] | None:
        """The ranges in the files of what the checkpoint holds; None for what `read` takes from the base."""
        return None if (key, index) in self._rules else DcpReader.byte_ranges(self, key, index)

    def read(self, key: str, index: int | None = None) -> Tensor:
        """The tensor `key`, or its slice `index`."""
        if (key, index) not in self._rules:
            return DcpReader.read(self, key, index)
        rule, context = self._rules[key, index]
        if (key, index) not in self._quantized:
            return rule.to_ours(self._source.read_slice, context)
        parts = [quantized_tensor(self._source, name, self._base.quantization, double=self._base.double_quantization)
                 for name in rule.hf_names(context)]
        shape: Any = rule.ours_shape(context)
        weight = QuantizedWeight(shape, allreduce=True)
        weight.fill(*share(rule, context, parts, 0, 1))
        restored = weight.restored(torch.float32)
        if (key, index) in self._adapted:
            restored += self.update_of(rule, context)
        return restored.to(self.dtype(key))
