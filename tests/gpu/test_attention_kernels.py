"""Attention on a GPU, by torch's flash kernel and by its general one, against a softmax written out in float64.

NEVER RUN on a GPU so far; on a CPU the same body runs with the general kernel.
"""

import math

import pytest
import torch

from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.flash_chunks import flash_calls
from megatron_embed.models.segments import attention_window, context_chunks, group_segments
from megatron_embed.parallel.device_copy import copy_to_device
from megatron_embed.platform import flash_attention
from megatron_embed.platform.compat import AttnMaskType, TransformerConfig

HEADS, HEAD_DIM = 4, 64
LENGTHS = (5, 64, 1, 37, 130, 16)
CUDA = pytest.mark.gpu


def softmax_attention(query, key, value, causal, window):
    """[tokens, heads * head_dim] of sequences of LENGTHS; rows behind them are zero."""
    output, start = torch.zeros_like(query), 0
    shared = query.shape[1] // key.shape[1]
    for length in LENGTHS:
        part = slice(start, start + length)
        k, v = (tensor[part].repeat_interleave(shared, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[part], k) / math.sqrt(HEAD_DIM)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        hidden = torch.zeros(length, length, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance.abs() >= window + (not causal)
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
        output[part] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v)
        start += length
    return output.flatten(1)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("device, kernel", [
    pytest.param("cuda", "flash", marks=CUDA), pytest.param("cuda", "sdpa", marks=CUDA), ("cpu", "sdpa")])
def test_values_and_gradients_are_a_softmaxs(device, kernel, groups, causal, window):
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    real, tokens = int(bounds[-1]), int(bounds[-1]) + 11
    generator = torch.Generator().manual_seed(groups)
    exact = [torch.randn(tokens, count, HEAD_DIM, generator=generator).bfloat16().double()
             for count in (HEADS, groups, groups)]
    weights = torch.randn(tokens, HEADS * HEAD_DIM, generator=generator).bfloat16()
    span = attention_window(window, causal)
    packed = PackedSequences(cu_seqlens=bounds, max_seqlen=max(LENGTHS), num_tokens=real, window=span)
    chunks = context_chunks(tokens, 0, 1)
    if kernel == "sdpa":
        packed.index_groups(group_segments(bounds, chunks, causal, torch.device("cpu"), span), tokens,
                            keys_are_local=True)
    else:
        packed.calls = flash_calls(bounds, chunks, causal, span)
    packed = copy_to_device(packed, torch.device(device))
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS,
                               num_query_groups=groups, kv_channels=HEAD_DIM, attention_dropout=0.0)
    module = PackedAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self", window=span)

    inputs = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in exact]
    output = module(*(tensor[:, None] for tensor in inputs), None, packed_seq_params=packed)[:, 0]
    results = [output, *torch.autograd.grad(output, inputs, weights.to(device))]
    truth = [tensor.requires_grad_() for tensor in exact]
    expected = softmax_attention(*truth, causal, window)
    wanted = [expected, *torch.autograd.grad(expected, truth, weights.double())]
    assert not output[real:].any()
    for ours, right in zip(results, wanted, strict=True):
        assert ours.dtype == torch.bfloat16 and right.abs().max() > 0.1
        # Scores and weights in bfloat16 cost some roundings of 2^-9; a wrong mask or head costs far more.
        assert (ours.cpu().double() - right).norm() / right.norm() < 2**-6


@pytest.mark.gpu
def test_the_call_that_tries_another_version_of_flash_attention():
    tensors = flash_attention._small_call()
    assert [tuple(tensor.shape) for tensor in tensors] == [(40, 2, 64), (40, 2, 64), (70, 1, 64), (70, 1, 64)]
    assert all(0.1 < float(tensor.abs().max()) < 100 for tensor in tensors)
