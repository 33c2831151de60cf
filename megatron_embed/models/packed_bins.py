"""The sequence bounds of a micro-batch, prepared for a model's attention kernel and attention windows."""

import dataclasses

import torch
from torch import Tensor

from megatron_embed.batch import MicroBatch
from megatron_embed.models.attention import PackedSequences
from megatron_embed.models.families import ModelShape
from megatron_embed.models.flash_chunks import flash_calls
from megatron_embed.models.segments import attention_window, group_segments

LEAST_AVERAGE = 32
"""Tokens of a bin's average text from which CPU ranks compute attention text by text: 955 texts of 6 to 20 tokens take
86 ms so, 62 ms in groups of like length (forward, two Zen 3 cores); 269 of 30 to 60 take 47 and 55."""


def packed_sequences(micro_batch: MicroBatch, chunks: tuple[tuple[int, int], ...], kernel: str, causal: bool,
                     shape: ModelShape | None) -> PackedSequences:
    """The sequence bounds of a micro-batch, prepared on the CPU for the attention windows of the model's layers."""
    window = None if shape is None else attention_window(shape.sliding_window, causal)
    packed = _packed_for(micro_batch, chunks, kernel, causal, window)
    if shape is None or not shape.full_attention_layers:
        return packed
    if window is None or packed.max_seqlen <= window[0] + 1:  # no text is longer than the window
        return dataclasses.replace(packed, window=None, local=packed)
    return dataclasses.replace(_packed_for(micro_batch, chunks, kernel, causal, None), local=packed)


def _packed_for(micro_batch: MicroBatch, chunks: tuple[tuple[int, int], ...], kernel: str, causal: bool,
                window: tuple[int, int] | None) -> PackedSequences:
    """The sequence bounds, prepared for layers with this window."""
    packed = PackedSequences(cu_seqlens=micro_batch.cu_seqlens, num_tokens=micro_batch.num_tokens,
                             max_seqlen=int(micro_batch.cu_seqlens.diff().max()), window=window)
    if kernel == "sdpa":
        groups = group_segments(micro_batch.cu_seqlens, chunks, causal, torch.device("cpu"), window,
                                key_lengths=micro_batch.key_lengths)
        whole = len(chunks) == 1 and micro_batch.key_lengths is None
        packed.index_groups(groups, sum(stop - start for start, stop in chunks), keys_are_local=whole)
        long_enough = packed.num_tokens >= LEAST_AVERAGE * micro_batch.num_sequences
        if whole and long_enough and (window is None or packed.max_seqlen <= window[0] + 1):
            packed.bounds = tuple(micro_batch.cu_seqlens.tolist())
        return packed
    assert micro_batch.key_lengths is None, "only sdpa attends to a part of a text"
    if kernel == "flash":
        packed.calls = flash_calls(micro_batch.cu_seqlens, chunks, causal, window)
    return packed


def text_positions(micro_batch: MicroBatch, first: int) -> Tensor:
    """[tokens] int64: positions of a bin's tokens in their texts, counted from `first`.

    In RoBERTa, padding tokens, which a text may contain literally, are not counted: they all have position `first - 1`,
    as in Transformers.
    """
    if not first:
        return micro_batch.position_ids
    counted = (micro_batch.token_ids != first - 1).to(torch.int64)
    running = counted.cumsum(0)
    starts = torch.arange(counted.numel()) - micro_batch.position_ids
    return (running - running[starts] + counted[starts]) * counted + first - 1
