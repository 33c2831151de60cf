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

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim`, reading no other bytes."""


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
class Piece:
    """Rows that lie together on both sides. A bias has rows of one number."""

    part: int
    """Which of the row's Hugging Face tensors, counted from 0."""
    theirs: int
    """First row in that tensor."""
    ours: int
    """First row in our parameter, or in a rank's share of it."""
    rows: int


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
    def pieces(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[Piece, ...]:
        """What the share of tensor-parallel rank `tp_rank` (of an expert: expert-tensor-parallel) consists of.

        In the order of our rows; each Hugging Face tensor's rows come in its own order, too.

        Raises:
            CheckpointError: the parameter cannot be split over `tp_size` ranks.
        """

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        """The share of tensor-parallel rank `tp_rank`, as `pieces` says, in the dtype of the file.

        Reads only the slices it needs.

        Raises:
            CheckpointError: the parameter cannot be split over `tp_size` ranks.
        """
        names, pieces = self.hf_names(context), self.pieces(context, tp_rank, tp_size)
        read = [reader.read_slice(names[piece.part], 0, piece.theirs, piece.theirs + piece.rows) for piece in pieces]
        return read[0] if len(read) == 1 else torch.cat(read)

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

    def pieces(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[Piece, ...]:
        rows = context.size(self.shape.split()[0])
        if self.shard_dim != 0 or tp_size == 1:
            return (Piece(0, 0, 0, rows),)
        rows = self._width(context, tp_size)
        return (Piece(0, tp_rank * rows, 0, rows),)

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        if self.shard_dim != 1 or tp_size == 1:
            return super().shard(reader, context, tp_rank, tp_size)
        (name,), width = self.hf_names(context), self._width(context, tp_size)
        return reader.read_slice(name, 1, tp_rank * width, (tp_rank + 1) * width)

    def _width(self, context: Context, tp_size: int) -> int:
        """Of one rank's share along `shard_dim`."""
        assert self.shard_dim is not None
        word = self.shape.split()[self.shard_dim]
        return per_rank(context.size(word), CONFIG_KEYS[word], tp_size)


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

    def pieces(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[Piece, ...]:
        shape = context.shape
        groups = per_rank(shape.num_query_groups, "config.json: num_key_value_heads", tp_size)
        heads = shape.num_attention_heads // shape.num_query_groups
        pieces = []
        position = 0
        for group in range(tp_rank * groups, (tp_rank + 1) * groups):
            for part, rows in enumerate((heads * shape.head_dim, shape.head_dim, shape.head_dim)):
                pieces.append(Piece(part, group * rows, position, rows))
                position += rows
        return tuple(pieces)


@dataclass(frozen=True)
class FuseGateUp(Transform):
    """Gate and up projections of a gated MLP as one: [gate; up]. A rank's shard is [its gate rows; its up rows]."""

    shape: str

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape, self.shape)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        rows, *columns = context.sizes(self.shape)
        return (2 * rows, *columns)

    def pieces(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[Piece, ...]:
        word = self.shape.split()[0]
        rows = per_rank(context.size(word), f"config.json: {CONFIG_KEYS[word]}", tp_size)
        return tuple(Piece(half, tp_rank * rows, half * rows, rows) for half in range(2))


@dataclass(frozen=True)
class PadVocabulary(Transform):
    """Word embeddings: zero rows behind the vocabulary up to `padded_vocab_size`, split by rows."""

    shape: str = "vocab_size hidden_size"

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape,)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        vocabulary, *columns = context.sizes(self.shape)
        return (max(vocabulary, context.padded_vocab_size or 0), *columns)

    def pieces(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[Piece, ...]:
        vocabulary, rows = context.size(self.shape.split()[0]), self._rows(context, tp_size)
        start = min(tp_rank * rows, vocabulary)
        return (Piece(0, start, 0, min(start + rows, vocabulary) - start),)

    def shard(self, reader: TensorReader, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        part = super().shard(reader, context, tp_rank, tp_size)
        missing = self._rows(context, tp_size) - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part

    def _rows(self, context: Context, tp_size: int) -> int:
        """Of one rank, padding included."""
        return per_rank(self.ours_shape(context)[0], "padded_vocab_size", tp_size)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize
