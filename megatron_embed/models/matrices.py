"""The matrices of a model's layers, part by part as the Hugging Face model has them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.models.families import ModelShape

_LINEAR = re.compile(r"decoder\.layers\..*\.linear_(qkv|proj|fc1|fc2)\.weight")


@dataclass(frozen=True, kw_only=True)
class LayerMatrix:
    """A linear weight of a layer, or a tensor-parallel rank's share of one."""

    parameter: torch.nn.Parameter
    parts: list[Tensor]
    """Row numbers of each Hugging Face matrix in it: queries, keys and values of all heads; gate and up; the whole of
    any other."""
    split_dim: int
    """Dimension of a Hugging Face matrix that tensor parallelism splits, in the order of ranks."""
    is_expert: bool
    """Whether expert-tensor parallelism splits it instead."""


def layer_matrices(model: torch.nn.Module, shape: ModelShape) -> Iterator[LayerMatrix]:
    """Every linear weight of the layers of a rank's model."""
    for name, parameter in model.named_parameters():
        match = _LINEAR.fullmatch(name)
        if match is not None:
            rows = torch.arange(parameter.shape[0], device=parameter.device)
            yield LayerMatrix(parameter=parameter, parts=list(_parts(match[1], rows, shape)),
                              split_dim=0 if match[1] in ("qkv", "fc1") else 1, is_expert=".experts." in name)


def _parts(kind: str, rows: Tensor, shape: ModelShape) -> Iterator[Tensor]:
    if kind == "qkv":
        heads, dim = shape.num_attention_heads // shape.num_query_groups, shape.head_dim
        by_group = rows.view(-1, (heads + 2) * dim)
        yield from (part.flatten() for part in by_group.split([heads * dim, dim, dim], dim=1))
    elif kind == "fc1" and shape.gated:
        yield from rows.chunk(2)
    else:
        yield rows
