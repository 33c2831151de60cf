"""Attention of packed sequences by the flash kernels on context-parallel ranks, against one process.

On GPUs, pretended or real, by their kernels; on the CPU by the pretend device's reference of them, in any dtype.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.flash_chunks import flash_calls
from megatron_embed.models.segments import attention_window, context_chunks
from megatron_embed.parallel.device_copy import copy_to_device
from megatron_embed.platform import flash_attention
from megatron_embed.platform.compat import AttnMaskType, TransformerConfig
from tests.pretend_cuda import flash

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""(output [tokens, heads * head_dim], gradients of queries, keys and values)."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bin of sequences and the attention over it."""

    lengths: tuple[int, ...]
    tokens: int
    """Padding included; a multiple of twice the ranks."""
    causal: bool
    sliding_window: int | None = None
    heads: int = 4
    groups: int = 2
    head_dim: int = 8

    @property
    def bounds(self) -> torch.Tensor:
        return torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)

    @property
    def window(self) -> tuple[int, int] | None:
        return attention_window(self.sliding_window, self.causal)

    def inputs(self) -> list[torch.Tensor]:
        """Queries, keys, values, and the output's gradient; values of bfloat16 in float64."""
        generator = torch.Generator().manual_seed(self.tokens)
        shapes = [(self.tokens, heads, self.head_dim) for heads in (self.heads, self.groups, self.groups)]
        shapes.append((self.tokens, self.heads * self.head_dim))
        return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


def one_process(case: Bin) -> Results:
    """A softmax in float64 and its gradients, sequence by sequence."""
    *inputs, weights = case.inputs()
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    output = torch.zeros_like(query)
    for first, last in itertools.pairwise(case.bounds.tolist()):
        k, v = (tensor[first:last].repeat_interleave(case.heads // case.groups, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[first:last], k) / math.sqrt(case.head_dim)
        ahead = torch.arange(last - first)[None] - torch.arange(last - first)[:, None]
        hidden = ahead > 0 if case.causal else torch.zeros_like(ahead, dtype=torch.bool)
        if case.window is not None:
            hidden |= (ahead < -case.window[0]) | (ahead > case.window[1])
        output[first:last] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    gradients = torch.autograd.grad((output.flatten(1) * weights).sum(), (query, key, value))
    return output.flatten(1).detach(), *gradients


def reference_kernels() -> contextlib.AbstractContextManager[Any]:
    """The pretend device's reference in place of torch's operators, on host tensors."""
    return mock.patch.multiple(flash_attention, forward_operator=lambda: flash.attend,
                               backward_operator=lambda: flash.attend_backward)


def module_of(case: Bin, group: Any = None, dropout: float = 0.0, cp_comm_type: str | None = None) -> PackedAttention:
    config = TransformerConfig(num_layers=1, hidden_size=case.heads * case.head_dim, num_attention_heads=case.heads,
                               num_query_groups=case.groups, kv_channels=case.head_dim, attention_dropout=dropout)
    groups: Any = None if group is None else SimpleNamespace(cp=group)
    return PackedAttention(config, 1, AttnMaskType.causal if case.causal else AttnMaskType.no_mask, "self",
                           pg_collection=groups, window=case.window, cp_comm_type=cp_comm_type)


def packed_of(case: Bin, chunks: tuple[tuple[int, int], ...], device: torch.device) -> PackedSequences:
    packed = PackedSequences(cu_seqlens=case.bounds, max_seqlen=max(case.lengths), num_tokens=sum(case.lengths),
                             window=case.window, calls=flash_calls(case.bounds, chunks, case.causal, case.window))
    return copy_to_device(packed, device)


def on_rank(cases: Sequence[Bin], dtype: torch.dtype, cp_comm_type: str = "all_gather") -> list[Results]:
    """This rank's chunks of every case; called by all ranks, which are one context-parallel group."""
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.nullcontext() if device.type == "cuda" else reference_kernels():
        return [_on_rank(case, dtype, device, cp_comm_type) for case in cases]


def _on_rank(case: Bin, dtype: torch.dtype, device: torch.device, cp_comm_type: str) -> Results:
    chunks = context_chunks(case.tokens, dist.get_rank(), dist.get_world_size())
    parts = [torch.cat([tensor[first:stop] for first, stop in chunks]).to(device, dtype) for tensor in case.inputs()]
    inputs = [tensor.requires_grad_() for tensor in parts[:3]]
    module = module_of(case, dist.group.WORLD, cp_comm_type=cp_comm_type)
    # By heads a rank attends over the whole bin.
    packed = packed_of(case, ((0, case.tokens),) if cp_comm_type == "a2a" else chunks, device)
    output = module(*(tensor[:, None] for tensor in inputs), None, packed_seq_params=packed)
    gradients = torch.autograd.grad(output[:, 0], inputs, parts[3])
    query, key, value = (tensor.cpu() for tensor in gradients)
    return output[:, 0].detach().cpu(), query, key, value


def assembled(ranks: Sequence[Results], tokens: int) -> Results:
    """Results of all ranks in the bin's order."""
    whole = [torch.zeros(tokens, *part.shape[1:], dtype=part.dtype) for part in ranks[0]]
    for rank, parts in enumerate(ranks):
        chunks = context_chunks(tokens, rank, len(ranks))
        for target, part in zip(whole, parts, strict=True):
            first, second = part.chunk(2)
            target[slice(*chunks[0])], target[slice(*chunks[1])] = first, second
    output, query, key, value = whole
    return output, query, key, value
