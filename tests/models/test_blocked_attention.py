"""Blocked attention against a plain softmax of each sequence, values and gradients."""

import pytest
import torch

from megatron_embed.models import blocked_attention
from megatron_embed.models.blocked_attention import ALONE_FROM, BlockedAttention, sequence_blocks

LENGTHS = (3, ALONE_FROM, 17, 1, 100, 16, 15, ALONE_FROM - 1, 17, 16, 15, 16)
PADDING = 5


def plain(query, key, value, causal, scale):
    """One sequence at a time, one head at a time, by the formula."""
    repeat = query.shape[1] // key.shape[1]
    outputs, first = [], 0
    for length in LENGTHS:
        part = slice(first, first + length)
        heads = []
        for head in range(query.shape[1]):
            scores = scale * query[part, head] @ key[part, head // repeat].T
            if causal:
                scores = scores + torch.full_like(scores, float("-inf")).triu(1)
            heads.append(torch.softmax(scores, dim=-1) @ value[part, head // repeat])
        outputs.append(torch.stack(heads, dim=1))
        first += length
    return torch.cat([*outputs, query.new_zeros(PADDING, *query.shape[1:])])


def bounds():
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("tile", [1 << 8, 1 << 10, 1 << 19])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1), (1, 1)])
def test_equals_a_plain_softmax(monkeypatch, heads, groups, causal, tile):
    monkeypatch.setattr(blocked_attention, "TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(3)
    tokens = sum(LENGTHS) + PADDING
    query, key, value, grad = (torch.randn(tokens, count, 8, dtype=torch.float64, generator=generator)
                               for count in (heads, groups, groups, heads))
    results = []
    for attention in (lambda *x: BlockedAttention.apply(*x, sequence_blocks(bounds(), causal), 0.3),
                      lambda *x: plain(*x, causal, 0.3)):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = attention(*inputs)
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.norm() > 1
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_long_sequences_are_alone_and_short_ones_share():
    blocks = sequence_blocks(bounds(), causal=False)
    assert [(block.count, block.length) for block in blocks] == [(1, 100), (1, 64), (1, 63), (7, 17), (1, 3), (1, 1)]
    assert all((block.first is None) == (block.length < ALONE_FROM) for block in blocks)


def test_bfloat16_is_as_near_as_torchs_kernel():
    generator = torch.Generator().manual_seed(4)
    tokens = sum(LENGTHS) + PADDING
    exact = [torch.randn(tokens, 4, 32, generator=generator).bfloat16().double() for _ in range(4)]

    def gradients(attention, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in exact[:3]]
        output = attention(*inputs)
        return [output, *torch.autograd.grad(output, inputs, exact[3].to(dtype))]

    truth = gradients(lambda *x: plain(*x, False, 32**-0.5), torch.float64)
    ours = gradients(lambda *x: BlockedAttention.apply(*x, sequence_blocks(bounds(), False), 32**-0.5), torch.bfloat16)
    for found, right in zip(ours, truth, strict=True):
        assert ((found.double() - right).norm() / right.norm()) < 1e-2
