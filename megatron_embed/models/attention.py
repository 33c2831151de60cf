"""Attention over packed sequences: torch's own kernels, on CPU and GPU, causal or bidirectional, grouped queries.

A micro-batch is one row of tokens with the sequences back to back. Nothing larger than one group of similarly long
sequences is formed, so the cost per token does not grow with the bin.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.flash_chunks import FlashCall, FlashSettings, flash_attention, gather_bin
from megatron_embed.models.relative_bias import RelativeBias
from megatron_embed.platform.compat import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    get_cuda_rng_tracker,
)

MAX_GROUP_PADDING = 1.02
"""A group's members are padded to its longest; the next joins while padded / real tokens stays below this. A group
without padding needs no mask: 128 texts of 13 to 175 tokens in 23 groups take 0.85 of their time in 6 (1.15)."""


@dataclass(frozen=True, kw_only=True)
class SegmentGroup:
    """Segments of queries, each with the keys of its sequence, computed together and padded to one size.

    Without context parallelism a segment is a whole sequence. With it, a rank holds two chunks of the bin, and a
    segment is the part of a sequence that lies in one of them.
    """

    queries: Tensor
    """[segments * query_length] int64, local token of each query slot (padding slots repeat token 0)."""
    keys: Tensor
    """[segments * key_length] int64, bin token of each key slot (padding slots repeat token 0)."""
    slots: Tensor | None
    """[real queries] int64, the query slots that hold real tokens; None if all do."""
    targets: Tensor
    """[real queries] int64, the local tokens of those slots."""
    mask: Tensor | None
    """[segments, 1, 1 or query_length, key_length] bool, true where a query sees a key; None: see `is_causal`."""
    is_causal: bool
    """The kernel's own triangular mask suffices: causal, and every query segment starts where its sequence starts."""
    count: int
    query_length: int
    key_length: int
    offsets: Tensor | None = None
    """[segments] int64, position of a segment's first query in its sequence; None: 0."""

    def distance(self) -> Tensor:
        """[segments or 1, query_length, key_length] int64: key position minus query position."""
        device = self.queries.device
        ahead = (torch.arange(self.key_length, device=device)
                 - torch.arange(self.query_length, device=device)[:, None])[None]
        return ahead if self.offsets is None else ahead - self.offsets[:, None, None]


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequence bounds of one micro-batch, passed through Megatron's layers to the attention.

    `qkv_format` stays None: Megatron then applies rotary embeddings elementwise, with the per-token angles we give it,
    instead of splitting the bin into one call per sequence.
    """

    cu_seqlens: Tensor | None = None
    """[sequences + 1] int32, from 0, on the device."""
    max_seqlen: int = 0
    num_tokens: int = 0
    """Real tokens; the bin's padding comes after them."""
    groups: tuple[SegmentGroup, ...] = field(default_factory=tuple)
    """Groups of the SDPA path; empty for the other kernels."""
    calls: tuple[FlashCall, ...] | None = None
    """Calls of the flash kernels, none on a rank of padding; None for the other kernels."""
    to_queries: "PermuteIndex | None" = None
    """Local tokens to the query slots of all groups, back to back."""
    to_keys: "PermuteIndex | None" = None
    """Local tokens to the key slots of all groups; None if a token has a slot in two segments (context parallelism),
    see `key_index`."""
    key_index: Tensor | None = None
    """[key slots of all groups] int64, the groups' `keys` back to back."""
    window: tuple[int, int] | None = None
    """The attention window that groups or calls were made for, see `attention_window`."""
    bias: RelativeBias | None = None
    """Added to the attention scores, of the SDPA path alone."""
    local: "PackedSequences | None" = None
    """The same bin for the layers that have a window, if the others have none."""

    def of_window(self, window: tuple[int, int] | None) -> "PackedSequences":
        """The bin as it was prepared for layers with this window."""
        packed = self if self.local is None or self.window == window else self.local
        assert packed.window == window, "the bin was prepared for another attention window"
        return packed

    def index_groups(self, groups: tuple[SegmentGroup, ...], local_tokens: int, *, keys_are_local: bool) -> None:
        """Set the SDPA path's tensors: one gather per layer and tensor instead of one per group.

        `keys_are_local`: without context parallelism every token is a key of one segment.
        """
        self.groups = groups
        queries, slot_of, first = torch.cat([group.queries for group in groups]), [], 0
        for group in groups:
            real = torch.arange(group.queries.numel(), device=queries.device) if group.slots is None else group.slots
            slot_of.append(first + real)
            first += group.queries.numel()
        slots, targets = torch.cat(slot_of), torch.cat([group.targets for group in groups])
        self.to_queries = PermuteIndex.from_slots(queries, local_tokens, slots, targets)
        self.key_index = torch.cat([group.keys for group in groups])
        if keys_are_local:
            # The segments of queries are those of keys: slots and tokens are the same, padding included.
            self.to_keys = self.to_queries


@dataclass(frozen=True, kw_only=True)
class PermuteIndex:
    """Index from tokens to slots and back, so that both directions are gathers.

    The gradient of a plain gather is a zeroed tensor and a sum into it, four times the memory traffic.
    """

    token_of: Tensor
    """[slots] int64, token of each slot; any token for padding slots."""
    slot_of: Tensor
    """[tokens] int64, slot of each token; any slot for padding tokens."""
    empty_slots: Tensor
    """[padding slots] int64."""
    padding_tokens: Tensor
    """[tokens without a slot] int64."""

    @classmethod
    def from_slots(cls, token_of: Tensor, tokens: int, slots: Tensor, targets: Tensor) -> "PermuteIndex":
        """The index in which slots `slots` [real] int64 hold the tokens `targets` [real] int64."""
        slot_of = token_of.new_zeros(tokens)
        slot_of[targets] = slots
        unused, empty = torch.ones_like(slot_of, dtype=torch.bool), torch.ones_like(token_of, dtype=torch.bool)
        unused[targets], empty[slots] = False, False
        return cls(token_of=token_of, slot_of=slot_of, empty_slots=empty.nonzero().flatten(),
                   padding_tokens=unused.nonzero().flatten())

    def to_slots(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [slots, ...]; the contents of padding slots affect no output."""
        moved: Tensor = _Gather.apply(tokens, self.token_of, None, self.slot_of, self.padding_tokens)
        return moved

    def to_tokens(self, slots: Tensor) -> Tensor:
        """[slots, ...] -> [tokens, ...], 0 for padding tokens."""
        moved: Tensor = _Gather.apply(slots, self.slot_of, self.padding_tokens, self.token_of, self.empty_slots)
        return moved


class _Gather(torch.autograd.Function):
    """Gather of rows whose backward gathers by the inverse index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, zero: Tensor | None, inverse: Tensor,
                zero_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, zero_gradient)
        moved = rows.contiguous().index_select(0, index)
        return moved if zero is None or not zero.numel() else moved.index_fill_(0, zero, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inverse, zero = ctx.saved_tensors
        moved = gradient.contiguous().index_select(0, inverse)
        return moved.index_fill_(0, zero, 0.0) if zero.numel() else moved, None, None, None, None


def context_chunks(tokens: int, cp_rank: int, cp_size: int) -> tuple[tuple[int, int], ...]:
    """Bin tokens [start, stop) that a context-parallel rank holds, in its local order.

    The bin is split into 2*cp_size chunks; rank r holds chunks r and 2*cp_size-1-r, so that causal attention costs
    every rank the same (zigzag). The whole bin without context parallelism.
    """
    if cp_size == 1:
        return ((0, tokens),)
    chunk = tokens // (2 * cp_size)
    return tuple((index * chunk, (index + 1) * chunk) for index in (cp_rank, 2 * cp_size - 1 - cp_rank))


def attention_window(sliding_window: int | None, causal: bool) -> tuple[int, int] | None:
    """(tokens before, tokens after) that a token sees besides itself, as in Transformers; None: all.

    Transformers' causal `sliding_window` counts the token itself, its bidirectional one does not.
    """
    if sliding_window is None:
        return None
    return (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)


def group_segments(cu_seqlens: Tensor, chunks: tuple[tuple[int, int], ...], causal: bool, device: torch.device,
                   window: tuple[int, int] | None = None, *,
                   key_lengths: Tensor | None = None) -> tuple[SegmentGroup, ...]:
    """Sort the segments of this rank's chunks by length and split them into groups with little padding.

    Args:
        cu_seqlens: [sequences + 1] int32 on the CPU.
        chunks: bin tokens held by this rank, in local order.
        causal: keys after a segment's last query are left out.
        window: see `attention_window`.
        key_lengths: [sequences] int32, see MicroBatch.
    """
    bounds = cu_seqlens.to(torch.int64)
    starts, ends = bounds[:-1], bounds[1:]
    seen = ends if key_lengths is None else starts + key_lengths
    parts = []
    for local, (first, last) in zip(_local_starts(chunks), chunks, strict=True):
        query_start, query_end = starts.clamp(min=first), ends.clamp(max=last)
        held = query_end > query_start
        key_end = torch.minimum(query_end, seen) if causal else seen
        # Columns: first local query, first query in its sequence, queries, first key, keys.
        parts.append(torch.stack([query_start - first + local, query_start - starts, query_end - query_start, starts,
                                  key_end - starts], dim=1)[held])
    segments = torch.cat(parts)
    if not len(segments):
        return (_no_segments(device),)
    area = segments[:, 2] * (segments[:, 4].max() + 1) + segments[:, 4]
    segments = segments[torch.argsort(area, descending=True, stable=True)]
    sizes = segments[:, [2, 4]].tolist()
    groups: list[SegmentGroup] = []
    first = 0
    while first < len(sizes):
        longest, widest, real_queries, real_keys, last = 0, 0, 0, 0, first
        while last < len(sizes):
            queries, keys = sizes[last]
            longest, widest = max(longest, queries), max(widest, keys)
            real_queries, real_keys, count = real_queries + queries, real_keys + keys, last + 1 - first
            if longest * count > MAX_GROUP_PADDING * real_queries or widest * count > MAX_GROUP_PADDING * real_keys:
                break
            last += 1
        groups.append(_segment_group(segments[first:last], causal, window, device))
        first = last
    return tuple(groups)


def _local_starts(chunks: tuple[tuple[int, int], ...]) -> list[int]:
    return [sum(stop - start for start, stop in chunks[:index]) for index in range(len(chunks))]


def _no_segments(device: torch.device) -> SegmentGroup:
    """A query slot that no token reads, for a rank that holds only padding but must take part in the collectives of
    keys and values, forward and backward."""
    first, empty = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return SegmentGroup(queries=first, keys=first, slots=empty, targets=empty, mask=None, is_causal=False, count=1,
                        query_length=1, key_length=1)


def _segment_group(segments: Tensor, causal: bool, window: tuple[int, int] | None,
                   device: torch.device) -> SegmentGroup:
    local, offset, num_queries, key_start, num_keys = (segments[:, [column]] for column in range(5))
    query_length, key_length = int(num_queries.max()), int(num_keys.max())
    query_steps, key_steps = torch.arange(query_length), torch.arange(key_length)
    real_queries, real_keys = query_steps < num_queries, key_steps < num_keys
    zero = torch.zeros((), dtype=torch.int64)
    queries = torch.where(real_queries, local + query_steps, zero).flatten()
    keys = torch.where(real_keys, key_start + key_steps, zero).flatten()
    windowed = window is not None and key_length > window[0] + 1  # otherwise all tokens are within the window
    hidden = bool((num_keys < offset + num_queries).any()) if causal else False  # keys that no query sees
    kernel_mask = causal and not windowed and not hidden and not bool(offset.any())
    mask = None
    if windowed or (causal and not kernel_mask):
        ahead = (key_steps - (offset + query_steps)[:, :, None])[:, None]  # key position minus query position
        mask = real_keys[:, None, None, :] & (ahead <= 0) if causal else real_keys[:, None, None, :]
        if windowed:
            mask = mask & (ahead >= -window[0]) & (ahead <= window[1])
        mask = mask | ~real_queries[:, None, :, None]  # padding queries see everything: a row without keys is NaN
    elif not causal and not bool(real_keys.all()):
        mask = real_keys[:, None, None, :]
    slots = None if bool(real_queries.all()) else real_queries.flatten().nonzero().flatten()
    return SegmentGroup(
        queries=queries.to(device), keys=keys.to(device), slots=None if slots is None else slots.to(device),
        targets=(queries if slots is None else queries[slots]).to(device),
        mask=None if mask is None else mask.to(device),
        is_causal=kernel_mask, count=len(segments), query_length=query_length, key_length=key_length,
        offsets=offset[:, 0].to(device) if bool(offset.any()) else None)


class PackedAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention over `PackedSequences`; no weights.

    With context parallelism each rank keeps its queries and gathers the keys and values of the bin over that group (one
    all-gather forward, one reduce-scatter backward, by the flash kernels another all-gather). Padding tokens of the bin
    get output 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(config=config)
        self.window, self.softcap = window, softcap
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """[tokens/cp, 1, heads/tp, head_dim] queries and [tokens/cp, 1, groups/tp, head_dim] keys and values ->
        [tokens/cp, 1, heads/tp * head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.cu_seqlens is not None
        packed = packed_seq_params.of_window(self.window)
        dropout = self.dropout if self.training else 0.0
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        group = self.cp_group if self.cp_group is not None and self.cp_group.size() > 1 else None
        if packed.groups:
            output = self._sdpa(query, *gather_bin(key, value, group), packed, dropout)
        else:
            assert packed.calls is not None and self.softcap is None, "the bin was prepared for another kernel"
            settings = FlashSettings(scale=self.scale, dropout=dropout, cp_group=group)
            with self._fork(dropout):
                output = flash_attention(query, key, value, packed.calls, settings)
        return output.reshape(output.shape[0], 1, -1)

    def _fork(self, dropout: float) -> AbstractContextManager[None]:
        """Random numbers of this tensor-parallel rank: heads are split, so each rank draws its own.

        With sequence parallelism the whole block runs in a fork; a second fork inside it would draw other numbers when
        a layer is recomputed for its backward pass.
        """
        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, dropout: float) -> Tensor:
        heads, groups, head_dim, dtype = query.shape[1], key.shape[1], query.shape[2], query.dtype
        assert packed.to_queries is not None and packed.key_index is not None
        # Gathered once for all groups.
        query = packed.to_queries.to_slots(query)
        if packed.to_keys is not None:
            key, value = packed.to_keys.to_slots(key), packed.to_keys.to_slots(value)
        else:
            key, value = key.index_select(0, packed.key_index), value.index_select(0, packed.key_index)
        if query.device.type == "cpu" and dtype == torch.bfloat16:
            # torch 2.13's kernel for CPUs takes 14 times as long in bfloat16 as in float32 (forward and backward of 48
            # sequences of 13 to 228 tokens, 12 heads of 32, two Zen 4 cores: 1.6 s against 0.12 s).
            query, key, value = query.float(), key.float(), value.float()
        if heads != groups:
            key = key.repeat_interleave(heads // groups, dim=1)
            value = value.repeat_interleave(heads // groups, dim=1)
        parts = zip(packed.groups, query.split([group.queries.numel() for group in packed.groups]),
                    key.split([group.keys.numel() for group in packed.groups]),
                    value.split([group.keys.numel() for group in packed.groups]), strict=True)
        outputs = []
        for group, *tensors in parts:
            q, k, v = (x.view(group.count, -1, heads, head_dim).transpose(1, 2) for x in tensors)
            mask = group.mask if packed.bias is None else _biased(packed.bias, group, q.dtype)
            with self._fork(dropout):
                if self.softcap is None:
                    out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, group.is_causal,
                                                                  scale=self.scale)
                else:
                    out = _capped_attention(q, k, v, group, dropout, self.scale, self.softcap)
            outputs.append(out.transpose(1, 2).reshape(group.count * group.query_length, heads * head_dim).to(dtype))
        return packed.to_queries.to_tokens(torch.cat(outputs))


def _biased(bias: RelativeBias, group: SegmentGroup, dtype: torch.dtype) -> Tensor:
    """[segments or 1, heads/tp, queries, keys]: what is added to a group's scores, -inf where a query sees no key."""
    assert not group.is_causal, "a family with a bias is bidirectional"
    scores = bias.scores(group.distance()).to(dtype)
    return scores if group.mask is None else scores.masked_fill(~group.mask, -math.inf)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup, dropout: float, scale: float,
                      softcap: float) -> Tensor:
    """[segments, heads, length, head_dim] attention whose scores s become softcap * tanh(s / softcap) (Gemma 2,
    arXiv:2408.00118). Keeps matrices of [queries, keys]."""
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * (scale / softcap)) * softcap
    mask = group.mask
    if group.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(functional.dropout(weights, dropout, training=dropout > 0), v)
