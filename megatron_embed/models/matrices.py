"""The matrices of a model's layers, part by part as the Hugging Face model has them."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_embed.models.families import ModelShape

_LINEAR = re.compile(r"decoder\.layers\..*\.linear_(qkv|proj|fc1|fc2)\.weight")


def layer_matrices(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[torch.nn.Parameter, list[Tensor]]]:
    """Every linear weight of the layers of a model that tensor parallelism does not split, with the row numbers of its
    parts: queries, keys and values of all heads; gate and up; the whole of any other."""
    for name, parameter in model.named_parameters():
        match = _LINEAR.fullmatch(name)
        if match is not None:
            rows = torch.arange(parameter.shape[0], device=parameter.device)
            yield parameter, list(_parts(match[1], rows, shape))


def _parts(kind: str, rows: Tensor, shape: ModelShape) -> Iterator[Tensor]:
    if kind == "qkv":
        heads, dim = shape.num_attention_heads // shape.num_query_groups, shape.head_dim
        by_group = rows.view(shape.num_query_groups, (heads + 2) * dim)
        yield from (part.flatten() for part in by_group.split([heads * dim, dim, dim], dim=1))
    elif kind == "fc1" and shape.gated:
        yield from rows.chunk(2)
    else:
        yield rows
