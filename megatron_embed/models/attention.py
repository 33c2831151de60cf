"""Attention over packed sequences: torch's own kernels, on CPU and GPU, causal or bidirectional, grouped queries.

A micro-batch is one row of tokens with the sequences back to back. Nothing larger than one group of similarly long
sequences is formed, so the cost per token does not grow with the bin.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.platform.compat import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    get_cuda_rng_tracker,
)

MAX_GROUP_PADDING = 1.15
"""A group's sequences are padded to its longest; the next sequence joins while padded / real tokens stays below this."""


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """Sequences computed together, each padded to `length` tokens."""

    tokens: Tensor
    """[sequences * length] int64, position of each padded slot's token in the bin (padding slots repeat token 0)."""
    slots: Tensor
    """[real tokens] int64, the padded slots that hold real tokens."""
    sources: Tensor
    """[real tokens] int64, the bin positions those slots came from."""
    mask: Tensor | None
    """[sequences, 1, 1, length] bool, true where a key is real; null if no slot is padding."""
    count: int
    length: int


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequence bounds of one micro-batch, as it travels through Megatron's layers to the attention.

    `qkv_format` stays null: Megatron then applies rotary embeddings elementwise, with the per-token angles we hand it,
    instead of splitting the bin into one call per sequence.
    """

    cu_seqlens: Tensor | None = None
    """[sequences + 1] int32, from 0, on the device."""
    max_seqlen: int = 0
    num_tokens: int = 0
    """Real tokens; the bin's padding comes after them."""
    groups: tuple[SequenceGroup, ...] = field(default_factory=tuple)
    """For the grouped path; empty on the flash path."""


def group_sequences(cu_seqlens: Tensor, device: torch.device) -> tuple[SequenceGroup, ...]:
    """Sorts the sequences of a bin by length and cuts them into groups of little padding.

    Args:
        cu_seqlens: [sequences + 1] int32 on the CPU.
    """
    bounds = cu_seqlens.to(torch.int64)
    starts, lengths = bounds[:-1], bounds.diff()
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    sizes = lengths.tolist()
    groups: list[SequenceGroup] = []
    first = 0
    while first < len(order):
        longest, real, last = sizes[order[first]], 0, first
        while last < len(order):
            real += sizes[order[last]]
            if longest * (last + 1 - first) > MAX_GROUP_PADDING * real:
                break
            last += 1
        groups.append(_sequence_group(starts[order[first:last]], lengths[order[first:last]], longest, device))
        first = last
    return tuple(groups)


def _sequence_group(starts: Tensor, lengths: Tensor, longest: int, device: torch.device) -> SequenceGroup:
    offsets = torch.arange(longest)
    real = offsets < lengths[:, None]
    tokens = torch.where(real, starts[:, None] + offsets, torch.zeros((), dtype=torch.int64))
    slots = real.flatten().nonzero().flatten()
    tokens = tokens.flatten()
    mask = None if bool(real.all()) else real[:, None, None, :].to(device)
    return SequenceGroup(tokens=tokens.to(device), slots=slots.to(device), sources=tokens[slots].to(device), mask=mask,
                         count=len(lengths), length=longest)


class PackedAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention over `PackedSequences` (no weights, no communication).

    Padding tokens of the bin get output 0.
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
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
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
        """[tokens, 1, heads/tp, head_dim] queries and [tokens, 1, groups/tp, head_dim] keys and values ->
        [tokens, 1, heads/tp * head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.cu_seqlens is not None
        dropout = self.dropout if self.training else 0.0
        inputs = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
        if packed_seq_params.groups:
            output = self._grouped(*inputs, packed_seq_params, dropout)
        else:
            output = self._flash(*inputs, packed_seq_params)
        return output.reshape(output.shape[0], 1, -1)

    def _grouped(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences, dropout: float) -> Tensor:
        heads, groups, head_dim = query.shape[1], key.shape[1], query.shape[2]
        if heads != groups:
            key = key.repeat_interleave(heads // groups, dim=1)
            value = value.repeat_interleave(heads // groups, dim=1)
        outputs, positions = [], []
        for group in packed.groups:
            shape = (group.count, group.length, heads, head_dim)
            q, k, v = (x.index_select(0, group.tokens).view(shape).transpose(1, 2) for x in (query, key, value))
            # Causal rows never see the padding behind them, so the mask is needed only without causality.
            mask = None if self.causal else group.mask
            if dropout:
                with get_cuda_rng_tracker().fork():
                    out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal, scale=self.scale)
            else:
                out = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, self.causal, scale=self.scale)
            out = out.transpose(1, 2).reshape(group.count * group.length, heads * head_dim)
            outputs.append(out if group.mask is None else out.index_select(0, group.slots))
            positions.append(group.sources)
        result = query.new_zeros(query.shape[0], heads * head_dim)
        return result.index_copy(0, torch.cat(positions), torch.cat(outputs))

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        real, longest = packed.num_tokens, packed.max_seqlen
        output = varlen_attn(query[:real], key[:real], value[:real], packed.cu_seqlens, packed.cu_seqlens, longest, longest,
                             scale=self.scale, window_size=(-1, 0) if self.causal else (-1, -1),
                             enable_gqa=query.shape[1] != key.shape[1])
        return functional.pad(output.flatten(1), (0, 0, 0, query.shape[0] - real))
