"""The rules of a weight table: each makes one Megatron parameter of one or more Hugging Face tensors, and back.

A transform is pure. It reads slices through a function, so that a tensor-parallel rank reads only its shard's bytes.
`*` in a name stands for the layer, `#` for the expert. Shapes are written in the words of `CONFIG_KEYS`:
"ffn_hidden_size hidden_size".
"""

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape

ReadSlice = Callable[[str, int, int, int], Tensor]
"""(full Hugging Face name, dim, start, stop) -> indices `start` to `stop` of `dim`; reads no other bytes."""
CONFIG_KEYS: Mapping[str, str] = {
    "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size", "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings", "type_vocab_size": "type_vocab_size", "head_dim": "head_dim",
    "query_size": "num_attention_heads * head_dim", "key_value_size": "num_key_value_heads * head_dim",
    "moe_ffn_hidden_size": "moe_intermediate_size", "num_experts": "num_experts",
    "qkv_size": "(num_attention_heads + 2 * num_key_value_heads) * head_dim",
    "gate_up_size": "2 * intermediate_size",
    "num_attention_heads": "num_attention_heads", "relative_buckets": "relative_attention_num_buckets",
    "relative_rows": "2 * position_buckets"}
"""Words for the sizes of a shape -> the `config.json` keys that determine them."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The model, layer and expert that a rule is applied to."""

    shape: ModelShape
    layer: int | None = None
    """Layer that `*` stands for, counted from 0 over the whole model; None outside the layers."""
    expert: int | None = None
    """Expert that `#` stands for, counted from 0 over the whole layer; None outside the experts."""
    padded_vocab_size: int | None = None
    """Rows of our word embeddings, padding included; None: no padding."""

    def size(self, word: str) -> int:
        """Size that one word of `CONFIG_KEYS` stands for."""
        query, key = (heads * self.shape.head_dim
                      for heads in (self.shape.num_attention_heads, self.shape.num_query_groups))
        derived = {"query_size": query, "key_value_size": key, "qkv_size": query + 2 * key,
                   "gate_up_size": 2 * self.shape.ffn_hidden_size}
        if self.shape.relative_positions is not None:
            derived["relative_buckets"] = self.shape.relative_positions.num_buckets
        if self.shape.disentangled_positions is not None:
            derived["relative_rows"] = 2 * self.shape.disentangled_positions.span
        sizes = {"hidden_size": self.shape.hidden_size, "ffn_hidden_size": self.shape.ffn_hidden_size,
                 "vocab_size": self.shape.vocab_size, "max_position_embeddings": self.shape.max_position_embeddings,
                 "type_vocab_size": self.shape.type_vocab_size, "head_dim": self.shape.head_dim,
                 "moe_ffn_hidden_size": self.shape.ffn_hidden_size, "num_experts": self.shape.num_experts,
                 "num_attention_heads": self.shape.num_attention_heads, **derived}
        return sizes[word]

    def sizes(self, words: str) -> tuple[int, ...]:
        """Shape that words separated by spaces stand for."""
        return tuple(self.size(word) for word in words.split())

    def name(self, pattern: str) -> str:
        """`pattern` with the layer and the expert in place of `*` and `#`."""
        return pattern.replace("*", str(self.layer)).replace("#", str(self.expert))


def expand_braces(pattern: str) -> tuple[str, ...]:
    """`a.{q,k}_proj` -> (`a.q_proj`, `a.k_proj`)."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    # Only every second part stood inside braces; a comma outside does not separate alternatives.
    assert all(len(part) == 1 for part in parts[::2]), pattern
    return tuple("".join(choice) for choice in itertools.product(*parts))


def per_rank(total: int, what: str, tp_size: int) -> int:
    """`total / tp_size`. Raises CheckpointError if it does not divide."""
    if total % tp_size:
        raise CheckpointError(f"{what} = {total} cannot be split over parallel.tensor_model_parallel_size = {tp_size}; "
                              f"choose a size that divides {total}")
    return total // tp_size


@dataclass(frozen=True)
class RowRange:
    """Matrix rows that are contiguous on both sides. A row of a bias is one element."""

    part: int
    """Index of the Hugging Face tensor among those of the rule."""
    hf_start: int
    """First row in that tensor."""
    our_start: int
    """First row in our parameter, or in a rank's shard of it."""
    rows: int


@dataclass(frozen=True)
class Transform(ABC):
    """One rule of a weight table. Subclasses define how the tensors of `hf` make up the parameter `ours`."""

    ours: str
    """Our parameter's name."""
    hf: str
    """Hugging Face name(s), `{a,b}` for alternatives."""

    @property
    def stacked(self) -> tuple[str, ...]:
        """Rows, in words, of each of several projections that are one Hugging Face tensor; empty: it is one."""
        return ()

    @property
    def is_expert(self) -> bool:
        """Whether the parameter belongs to one expert: split over expert-tensor-parallel ranks, if at all."""
        return "#" in self.ours

    def hf_names(self, context: Context) -> tuple[str, ...]:
        """Hugging Face tensors that this rule reads and writes, in order."""
        return tuple(context.name(name) for name in expand_braces(self.hf))

    @abstractmethod
    def hf_shapes(self) -> tuple[str, ...]:
        """Shape of each of `hf_names`, in words."""

    @abstractmethod
    def ours_shape(self, context: Context) -> tuple[int, ...]:
        """Shape of the whole parameter."""

    @abstractmethod
    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        """The row ranges of the shard of tensor-parallel rank `tp_rank` (expert-tensor-parallel for an expert).

        In the order of our rows.

        Raises:
            CheckpointError: the parameter cannot be split over `tp_size` ranks.
        """

    def shard(self, read_slice: ReadSlice, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        """The shard of tensor-parallel rank `tp_rank`, in the dtype of the file; reads only the slices it needs.

        Raises:
            CheckpointError: the parameter cannot be split over `tp_size` ranks.
        """
        names = self.hf_names(context)
        slices = [read_slice(names[part.part], 0, part.hf_start, part.hf_start + part.rows)
                  for part in self.row_ranges(context, tp_rank, tp_size)]
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def to_ours(self, read_slice: ReadSlice, context: Context) -> Tensor:
        """The whole parameter, in the dtype of the file."""
        return self.shard(read_slice, context, 0, 1)


@dataclass(frozen=True)
class Rename(Transform):
    """The same tensor under another name, split along `shard_dim` (None: replicated on every rank)."""

    shape: str
    shard_dim: int | None = None

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape,)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        return context.sizes(self.shape)

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        rows = context.size(self.shape.split()[0])
        if self.shard_dim != 0 or tp_size == 1:
            return (RowRange(0, 0, 0, rows),)
        rows = self._width(context, tp_size)
        return (RowRange(0, tp_rank * rows, 0, rows),)

    def shard(self, read_slice: ReadSlice, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        if self.shard_dim != 1 or tp_size == 1:
            return super().shard(read_slice, context, tp_rank, tp_size)
        (name,), width = self.hf_names(context), self._width(context, tp_size)
        return read_slice(name, 1, tp_rank * width, (tp_rank + 1) * width)

    def _width(self, context: Context, tp_size: int) -> int:
        """Size of one rank's shard along `shard_dim`."""
        assert self.shard_dim is not None
        word = self.shape.split()[self.shard_dim]
        return per_rank(context.size(word), CONFIG_KEYS[word], tp_size)


@dataclass(frozen=True)
class FuseQKV(Transform):
    """Query, key and value projections as one; per query group g its query heads, its key head, its value head.

    Ranks hold whole groups, so a rank's shard is the same layout over fewer groups.
    """

    columns: str
    """Words for the dimensions behind the first; empty for a bias."""

    def hf_shapes(self) -> tuple[str, ...]:
        return (f"query_size {self.columns}", f"key_value_size {self.columns}", f"key_value_size {self.columns}")

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        return (context.size("query_size") + 2 * context.size("key_value_size"), *context.sizes(self.columns))

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        shape = context.shape
        groups = per_rank(shape.num_query_groups, "config.json: num_key_value_heads", tp_size)
        heads = shape.num_attention_heads // shape.num_query_groups
        ranges = []
        position = 0
        for group in range(tp_rank * groups, (tp_rank + 1) * groups):
            for part, rows in enumerate((heads * shape.head_dim, shape.head_dim, shape.head_dim)):
                ranges.append(RowRange(part, group * rows, position, rows))
                position += rows
        return tuple(ranges)


@dataclass(frozen=True)
class UnstackQKV(FuseQKV):
    """The same of one Hugging Face tensor, whose rows are all queries, then all keys, then all values."""

    @property
    def stacked(self) -> tuple[str, ...]:
        return ("query_size", "key_value_size", "key_value_size")

    def hf_shapes(self) -> tuple[str, ...]:
        return (f"qkv_size {self.columns}",)

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        return _of_one_tensor(super().row_ranges(context, tp_rank, tp_size), self.stacked, context)


@dataclass(frozen=True)
class FuseGateUp(Transform):
    """Gate and up projections of a gated MLP as one: [gate; up]. A rank's shard is [its gate rows; its up rows]."""

    shape: str

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape, self.shape)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        rows, *columns = context.sizes(self.shape)
        return (2 * rows, *columns)

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        word = self.shape.split()[0]
        rows = per_rank(context.size(word), f"config.json: {CONFIG_KEYS[word]}", tp_size)
        return tuple(RowRange(half, tp_rank * rows, half * rows, rows) for half in range(2))


@dataclass(frozen=True)
class UnstackGateUp(FuseGateUp):
    """The same of one Hugging Face tensor: `shape` is that of one half."""

    @property
    def stacked(self) -> tuple[str, ...]:
        return ("ffn_hidden_size", "ffn_hidden_size")

    def hf_shapes(self) -> tuple[str, ...]:
        return (" ".join(("gate_up_size", *self.shape.split()[1:])),)

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        return _of_one_tensor(super().row_ranges(context, tp_rank, tp_size), self.stacked, context)


def _of_one_tensor(ranges: tuple[RowRange, ...], words: tuple[str, ...], context: Context) -> tuple[RowRange, ...]:
    """Ranges in several tensors as ranges in one that holds them one after the other."""
    sizes = context.sizes(" ".join(words))
    return tuple(RowRange(0, sum(sizes[:rows.part]) + rows.hf_start, rows.our_start, rows.rows) for rows in ranges)


@dataclass(frozen=True)
class PadVocabulary(Transform):
    """Word embeddings, padded with zero rows to `padded_vocab_size` and split by rows."""

    shape: str = "vocab_size hidden_size"

    def hf_shapes(self) -> tuple[str, ...]:
        return (self.shape,)

    def ours_shape(self, context: Context) -> tuple[int, ...]:
        vocabulary, *columns = context.sizes(self.shape)
        return (max(vocabulary, context.padded_vocab_size or 0), *columns)

    def row_ranges(self, context: Context, tp_rank: int = 0, tp_size: int = 1) -> tuple[RowRange, ...]:
        vocabulary, rows = context.size(self.shape.split()[0]), self._rows(context, tp_size)
        start = min(tp_rank * rows, vocabulary)
        return (RowRange(0, start, 0, min(start + rows, vocabulary) - start),)

    def shard(self, read_slice: ReadSlice, context: Context, tp_rank: int, tp_size: int) -> Tensor:
        part = super().shard(read_slice, context, tp_rank, tp_size)
        missing = self._rows(context, tp_size) - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part

    def _rows(self, context: Context, tp_size: int) -> int:
        """Rows of one rank, padding included."""
        return per_rank(self.ours_shape(context)[0], "padded_vocab_size", tp_size)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


def weight_and_bias(ours: str, hf: str) -> tuple[Transform, ...]:
    """Weight and bias of a norm."""
    return tuple(Rename(f"{ours}.{part}", f"{hf}.{part}", "hidden_size") for part in ("weight", "bias"))
