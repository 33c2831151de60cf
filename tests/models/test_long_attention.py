"""Long segments on a CPU: the same attention without a mask of all pairs."""

import itertools
from unittest import mock

import pytest
import torch

from megatron_embed.models import long_attention, segments
from megatron_embed.models.segments import LongSegment, attention_window, context_chunks, group_segments

CASES = [(segment, queries, keys) for segment, queries, keys in (
    (LongSegment(offset=31, causal=True, window=None), 19, 50), (LongSegment(offset=0, causal=True, window=None), 8, 8),
    (LongSegment(offset=31, causal=True, window=attention_window(5, True)), 19, 50),
    (LongSegment(offset=12, causal=False, window=attention_window(5, False)), 23, 50),
    (LongSegment(offset=0, causal=False, window=attention_window(60, False)), 50, 50))]


def softmax_attention(query, key, value, mask, scale):
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize("segment, queries, keys", CASES)
def test_parts_equal_a_softmax_with_gradients(segment, queries, keys):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, 3, count, 8, generator=generator, dtype=torch.float64, requires_grad=True)
               for count in (queries, keys, keys)]
    weights = torch.randn(1, 3, queries, 8, generator=generator, dtype=torch.float64)
    results = []
    for compute in (lambda: softmax_attention(*tensors, segment.mask(queries, keys, torch.device("cpu")), 0.3),
                    lambda: long_attention.long_attention(*tensors, segment, 0.3)):
        with mock.patch.object(long_attention, "BLOCK", 7):
            output = compute()
            results.append((output, *torch.autograd.grad((output * weights).sum(), tensors)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal, sliding_window", [*itertools.product((True, False), (None, 9))])
def test_long_segments_stand_alone_and_see_the_same_keys(monkeypatch, causal, sliding_window):
    """A mask is kept for short segments only; `visible` makes that of a long one."""
    bounds, window = torch.tensor((0, 3, 60, 118, 128), dtype=torch.int32), attention_window(sliding_window, causal)
    for rank in range(2):
        chunks = context_chunks(128, rank, 2)
        whole = group_segments(bounds, chunks, causal, torch.device("cpu"), window)
        with monkeypatch.context() as patch:
            patch.setattr(segments, "LARGEST_MASK", 200)
            alone = group_segments(bounds, chunks, causal, torch.device("cpu"), window)
        long = [group for group in alone if group.long is not None]
        assert bool(long) == (causal or window is not None)
        assert all(group.mask is None and group.count == 1 and group.slots is None for group in long)
        assert all(group.mask is None or group.mask[0].numel() <= 200 for group in alone)
        assert visible_pairs(alone) == visible_pairs(whole)


def visible_pairs(groups):
    """(local token, key token) of all that attention sees."""
    pairs = set()
    for group in groups:
        mask = group.visible()
        if mask is None:
            mask = torch.ones(group.query_length, group.key_length, dtype=torch.bool)
            mask = mask.tril() if group.is_causal else mask
        mask = mask.expand(group.count, 1, group.query_length, group.key_length)[:, 0]
        queries, keys = group.queries.view(group.count, -1), group.keys.view(group.count, -1)
        real = torch.zeros(group.queries.numel(), dtype=torch.bool)
        real[torch.arange(len(real)) if group.slots is None else group.slots] = True
        for segment, row, column in mask.nonzero().tolist():
            if real[segment * group.query_length + row]:
                pairs.add((int(queries[segment, row]), int(keys[segment, column])))
    return pairs
