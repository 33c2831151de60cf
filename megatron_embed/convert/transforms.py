"""What a row of a weight table can do: one parameter of ours from one or more Hugging Face tensors, and back.

A transform is pure. It reads through a `TensorReader`, so that a tensor-parallel rank touches only its shard's bytes.
`*` in a name stands for the layer number, `#` for an expert's. Shapes are written in words, `CONFIG_KEYS`:
"ffn_hidden_size hidden_size".
"""

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape


class TensorReader(Protocol):
    """Where the tensors of a Hugging Face model come from, by their full names (with the family's prefix)."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        ...

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim`, reading no other bytes."""
        ...


CONFIG_KEYS: Mapping[str, str] = {
    "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size", "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings", "type_vocab_size": "type_vocab_size", "head_dim": "head_dim",
    "query_size": "num_attention_heads * head_dim", "key_value_size": "num_key_value_heads * head_dim",
    "moe_ffn_hidden_size": "moe_intermediate_size", "num_experts": "num_experts"}
"""The words that shapes are written in, and the `config.json` keys that decide them."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a transform must know besides the tensors."""

    shape: ModelShape
    layer: int | None = None
    """Number that `*` stands for, from 0 over the whole model; null outside the layers."""
    expert: int | None = None
    """Number that `#` stands for, from 0 over the whole layer; null outside the experts."""
    padded_vocab_size: int | None = None
    """Rows of our word embeddings, padding included; null: no padding."""

    def size(self, word: str) -> int:
        """Number that one word of `CONFIG_KEYS` stands for."""
        derived = {"query_size": self.shape.num_attention_heads * self.shape.head_dim,
                   "key_value_size": self.shape.num_query_groups * self.shape.head_dim}
        sizes = {"hidden_size": self.shape.hidden_size, "ffn_hidden_size": self.shape.ffn_hidden_size,
                 "vocab_size": self.shape.vocab_size, "max_position_embeddings": self.shape.max_position_embeddings,
                 "type_vocab_size": self.shape.type_vocab_size, "head_dim": self.shape.head_dim,
                 "moe_ffn_hidden_size": self.shape.ffn_hidden_size, "num_experts": self.shape.num_experts, **derived}
        return sizes[word]

    def sizes(self, words: str) -> tuple[int, ...]:
        """Shape that words separated by spaces stand for."""
        return tuple(self.size(word) for word in words.split())

    def name(self, pattern: str) -> str:
        """`pattern` with the layer's and the expert's number in place of `*` and `#`."""
        return pattern.replace("*", str(self.layer)).replace("#", str(self.expert))


def expand_braces(pattern: str) -> tuple[str, ...]:
    """`a.{q,k}_proj` -> (`a.q_proj`, `a.k_proj`)."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", pattern)]
    # Only every second piece stood inside braces; a comma outside would be no alternative.
    assert all(len(piece) == 1 for piece in pieces[::2]), pattern
    return tuple("".join(choice) for choice in itertools.product(*pieces))


def per_rank(total: int, what: str, tp_size: int) -> int:
    """`total / tp_size`. Raises CheckpointError if it does not divide."""
    if total % tp_size:
        raise CheckpointError(f"{what} = {total} cannot be split over parallel.tensor_model_parallel_size = {tp_size}; "
                              f"choose a size that divides {total}")
    return total // tp_size


@dataclass(frozen=True)
class Transform(ABC):
    """One row of a table. Subclasses say how the tensors of `hf` make up the parameter `ours`, and back."""

    ours: str
    """Our parameter's name."""
    hf: str
    """Hugging Face name(s), `{a,b}` for alternatives."""

    @property
    def is_expert(self) -> bool:
        """Whether the parameter belongs to one expert: split over expert-tensor-parallel ranks, if at all."""
        return "#" in self.ours

    def hf_names(self, context: Context) -> tuple[str, ...]:
        """Hugging Face tensors that this row reads and writes, in order."""
        return tuple(context.name(name) for name in expand_braces(self.hf))

    @abstractmethod
    def hf_shapes(self) -> tuple[str, ...]:
        """Shape of each of `hf_names`, in words."""

    @abstractmethod
    def ours_shape(self, context: Context) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    @abstractmethod
    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        """The share of tensor-parallel rank `tp_rank` (of an expert: expert-tensor-parallel), in the dtype of the file.

        Reads only the slices it needs.

        Raises:
            CheckpointError: the parameter cannot be split over `tp_size` ranks.
        """

    @abstractmethod
    def to_hf(self, tensor: Tensor, context: Context) -> dict[str, Tensor]:
        """Hugging Face tensors of the whole parameter; views of it where possible."""

    def to_ours(self, reader: TensorReader, context: Context) -> Tensor:
        """The whole parameter, in the dtype of the file."""
        return self.shard(reader, context, 0, 1)


@dataclass(frozen=True)
class Rename(Transform):
    """The same tensor under another name, split along `shard_dim` (null: every rank holds all of it)."""

    shape: str
    shard_dim: int | None = None

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape,)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        return context.sizes(self.shape)

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        (name,) = self.hf_names(context)
        if self.shard_dim is None or tp_size == 1:
            return reader.read(name)
        word = self.shape.split()[self.shard_dim]
        size = per_rank(context.size(word), CONFIG_KEYS[word], tp_size)
        return reader.read_slice(name, self.shard_dim, tp_rank * size, (tp_rank + 1) * size)

    def to_hf(self, tensor: Tensor, context: Context) -> dict[str, Tensor]:
        (name,) = self.hf_names(context)
        return {name: tensor}


@dataclass(frozen=True)
class FuseQKV(Transform):
    """Query, key and value projections as one; per query group g its query heads, its key head, its value head.

    Ranks hold whole groups, so a rank's shard is the same layout over fewer groups.
    """

    columns: str
    """Words for the dimensions after the rows; empty for a bias."""

    def hf_shapes(self) -> tuple[str, ...]:
        return (f"query_size {self.columns}", f"key_value_size {self.columns}", f"key_value_size {self.columns}")

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        return (context.size("query_size") + 2 * context.size("key_value_size"), *context.sizes(self.columns))

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        shape = context.shape
        groups = per_rank(shape.num_query_groups, "config.json: num_key_value_heads", tp_size)
        heads = shape.num_attention_heads // shape.num_query_groups
        fused: Tensor | None = None
        position = 0
        for name, per_group in zip(self.hf_names(context), (heads, 1, 1), strict=True):
            rows = groups * per_group * shape.head_dim
            part = reader.read_slice(name, 0, tp_rank * rows, (tp_rank + 1) * rows)
            if fused is None:
                fused = part.new_empty(groups, heads + 2, shape.head_dim, *part.shape[1:])
            fused[:, position:position + per_group] = part.view(groups, per_group, shape.head_dim, *part.shape[1:])
            position += per_group
        assert fused is not None
        return fused.flatten(0, 2)

    def to_hf(self, tensor: Tensor, context: Context) -> dict[str, Tensor]:
        shape = context.shape
        heads = shape.num_attention_heads // shape.num_query_groups
        grouped = tensor.view(shape.num_query_groups, heads + 2, shape.head_dim, *tensor.shape[1:])
        parts = torch.split(grouped, [heads, 1, 1], dim=1)
        return {name: part.flatten(0, 2) for name, part in zip(self.hf_names(context), parts, strict=True)}


@dataclass(frozen=True)
class FuseGateUp(Transform):
    """Gate and up projections of a gated MLP as one: [gate; up]. A rank's shard is [its gate rows; its up rows]."""

    shape: str

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape, self.shape)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        rows, *columns = context.sizes(self.shape)
        return (2 * rows, *columns)

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        word = self.shape.split()[0]
        rows = per_rank(context.size(word), f"config.json: {CONFIG_KEYS[word]}", tp_size)
        fused: Tensor | None = None
        for half, name in enumerate(self.hf_names(context)):
            part = reader.read_slice(name, 0, tp_rank * rows, (tp_rank + 1) * rows)
            if fused is None:
                fused = part.new_empty(2 * rows, *part.shape[1:])
            fused[half * rows:(half + 1) * rows] = part
        assert fused is not None
        return fused

    def to_hf(self, tensor: Tensor, context: Context) -> dict[str, Tensor]:
        return dict(zip(self.hf_names(context), tensor.chunk(2, dim=0), strict=True))


@dataclass(frozen=True)
class PadVocabulary(Transform):
    """Word embeddings: zero rows behind the vocabulary up to `padded_vocab_size`, split by rows."""

    shape: str = "vocab_size hidden_size"

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape,)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        vocabulary, *columns = context.sizes(self.shape)
        return (max(vocabulary, context.padded_vocab_size or 0), *columns)

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        (name,) = self.hf_names(context)
        vocabulary, *columns = context.sizes(self.shape)
        rows = per_rank(self.ours_shape(context)[0], "padded_vocab_size", tp_size)
        start = min(tp_rank * rows, vocabulary)
        part = reader.read_slice(name, 0, start, min(start + rows, vocabulary))
        missing = rows - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, *columns)]) if missing else part

    def to_hf(self, tensor: Tensor, context: Context) -> dict[str, Tensor]:
        (name,) = self.hf_names(context)
        return {name: tensor[:context.shape.vocab_size]}


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize
