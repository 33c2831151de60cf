"""Attention over packed sequences: torch's own kernels, on CPU and GPU, causal or bidirectional, grouped queries.

A micro-batch is one row of tokens with the sequences back to back, see `segments.py`.
"""

import contextlib
import dataclasses
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.models.flash_chunks import FlashCall, FlashSettings, flash_attention, gather_bin
from megatron_embed.models.head_exchange import join_heads, split_heads
from megatron_embed.models.long_attention import long_attention
from megatron_embed.models.relative_bias import PositionBias
from megatron_embed.models.segments import SegmentGroup
from megatron_embed.models.sequence_attention import sequence_attention
from megatron_embed.platform.compat import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    get_cuda_rng_tracker,
)


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
    bounds: tuple[int, ...] | None = None
    """`cu_seqlens` on the host, for attention text by text on a CPU; None where texts are short, for groups of them are
    faster, and where a token sees neither all tokens of its text nor all before it (windows, context parallelism)."""
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
    bias: PositionBias | None = None
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


class PackedAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention over `PackedSequences`; no weights.

    With context parallelism each rank keeps its queries and gathers the keys and values of the bin over that group (one
    all-gather forward, one reduce-scatter backward, by the flash kernels another all-gather), or exchanges tokens for
    heads (`head_exchange.py`). Padding tokens of the bin get output 0.
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
        self.by_heads = cp_comm_type == "a2a"
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
        exchange = group if self.by_heads else None
        if exchange is not None:
            # What follows is attention without context parallelism, over the whole bin and a share of the heads.
            group, bias = None, packed.bias
            packed = packed if bias is None else dataclasses.replace(packed, bias=bias.share_of(exchange))
            query, key, value = split_heads(query, key, value, exchange)
        if self._takes_sequences(query, packed, dropout):
            output = self._by_sequence(query, key, value, packed)
        elif packed.groups:
            output = self._sdpa(query, *gather_bin(key, value, group), packed, dropout)
        else:
            assert packed.calls is not None and self.softcap is None, "the bin was prepared for another kernel"
            settings = FlashSettings(scale=self.scale, dropout=dropout, cp_group=group)
            with self._fork(dropout):
                output = flash_attention(query, key, value, packed.calls, settings)
        output = output.reshape(output.shape[0], -1)
        return (output if exchange is None else join_heads(output, exchange))[:, None]

    def _fork(self, dropout: float) -> AbstractContextManager[None]:
        """Random numbers of this tensor-parallel rank: heads are split, so each rank draws its own.

        With sequence parallelism the whole block runs in a fork; a second fork inside it would draw other numbers when
        a layer is recomputed for its backward pass.
        """
        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork

    def _takes_sequences(self, query: Tensor, packed: PackedSequences, dropout: float) -> bool:
        return (query.device.type == "cpu" and packed.bounds is not None and packed.bias is None
                and self.softcap is None and not dropout)

    def _by_sequence(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        assert packed.bounds is not None
        output = sequence_attention(query.float(), key.float(), value.float(), packed.bounds, causal=self.causal,
                                    scale=self.scale)
        return output.to(query.dtype)

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
            with self._fork(dropout):
                out = self._attend(q, k, v, group, packed.bias, dropout)
            outputs.append(out.transpose(1, 2).reshape(group.count * group.query_length, heads * head_dim).to(dtype))
        return packed.to_queries.to_tokens(torch.cat(outputs))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup, bias: PositionBias | None,
                dropout: float) -> Tensor:
        """[segments, heads, length, head_dim] attention of a group."""
        if self.softcap is not None:
            return _capped_attention(q, k, v, group, dropout, self.scale, self.softcap)
        if group.long is not None and bias is None and not dropout and q.device.type == "cpu":
            return long_attention(q, k, v, group.long, self.scale)
        mask = group.visible() if bias is None else _biased(bias, group, q, k)
        return functional.scaled_dot_product_attention(q, k, v, mask, dropout, group.is_causal, scale=self.scale)


def _biased(bias: PositionBias, group: SegmentGroup, q: Tensor, k: Tensor) -> Tensor:
    """[segments or 1, heads/tp, queries, keys]: what is added to a group's scores, -inf where a query sees no key."""
    assert not group.is_causal, "a family with a bias is bidirectional"
    scores = bias.scores(group.distance(), q, k).to(q.dtype)
    mask = group.visible()
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, group: SegmentGroup, dropout: float, scale: float,
                      softcap: float) -> Tensor:
    """[segments, heads, length, head_dim] attention whose scores s become softcap * tanh(s / softcap) (Gemma 2,
    arXiv:2408.00118). Keeps matrices of [queries, keys]."""
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * (scale / softcap)) * softcap
    mask = group.visible()
    if group.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(functional.dropout(weights, dropout, training=dropout > 0), v)
