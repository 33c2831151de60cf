"""Groups of packed segments: what they cover, what they pad; the attention over them against a plain softmax."""

import math

import pytest
import torch

from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.segments import MAX_GROUP_PADDING, attention_window, context_chunks, group_segments
from megatron_embed.platform.compat import AttnMaskType, TransformerConfig

CPU = torch.device("cpu")


def random_bin(seed, cp_size):
    """(sequence bounds, bin tokens): ragged lengths with some very long, and padding up to the alignment."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40, (), generator=generator))
    lengths = torch.exp(torch.rand(count, generator=generator) * 4.6).to(torch.int64) + 1
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    extra = int(torch.randint(0, 30, (), generator=generator))
    unit = 2 * cp_size
    return bounds, -(-(int(bounds[-1]) + extra) // unit) * unit


def seen_keys(group, row):
    """Key slots that the query slot `row` of every segment sees: [segments, key_length] bool."""
    if group.is_causal:
        assert group.mask is None
        return (torch.arange(group.key_length) <= row).expand(group.count, -1)
    if group.mask is None:
        return torch.ones(group.count, group.key_length, dtype=torch.bool)
    return group.mask.expand(group.count, 1, group.query_length, group.key_length)[:, 0, row]


def attended(groups, held):
    """Bin token of each real query -> bin tokens it sees, in order of the slots."""
    seen = {}
    for group in groups:
        keys = group.keys.view(group.count, group.key_length)
        slots = torch.arange(group.count * group.query_length) if group.slots is None else group.slots
        assert torch.equal(group.queries[slots], group.targets)
        real = {int(slot): int(target) for slot, target in zip(slots, group.targets, strict=True)}
        for row in range(group.query_length):
            visible = seen_keys(group, row)
            assert visible.any(dim=1).all(), "a slot that sees nothing becomes NaN"
            for segment in range(group.count):
                slot = segment * group.query_length + row
                if slot in real:
                    token = int(held[real[slot]])
                    assert token not in seen, "computed twice"
                    seen[token] = keys[segment][visible[segment]].tolist()
    return seen


@pytest.mark.parametrize("sliding_window", [None, 1, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_every_token_sees_its_own_sequence_and_nothing_else(cp_size, causal, sliding_window):
    window = attention_window(sliding_window, causal)
    for seed in range(12 if window is None else 4):
        bounds, tokens = random_bin(seed, cp_size)
        seen = {}
        for cp_rank in range(cp_size):
            chunks = context_chunks(tokens, cp_rank, cp_size)
            held = torch.cat([torch.arange(*chunk) for chunk in chunks])
            part = attended(group_segments(bounds, chunks, causal, CPU, window), held)
            assert not seen.keys() & part.keys()
            seen |= part
        expected = {}
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            for token in range(start, end):
                last = token + 1 if causal else end
                if sliding_window is None:
                    expected[token] = list(range(start, last))
                elif causal:  # Transformers: key > query - window
                    expected[token] = list(range(max(start, token - sliding_window + 1), last))
                else:  # Transformers: |key - query| <= window
                    expected[token] = list(range(max(start, token - sliding_window),
                                                 min(end, token + sliding_window + 1)))
        assert seen == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_padding_within_groups_is_bounded(cp_size, causal):
    groups_seen = 0
    for seed in range(40):
        bounds, tokens = random_bin(seed, cp_size)
        for cp_rank in range(cp_size):
            chunks = context_chunks(tokens, cp_rank, cp_size)
            for group in group_segments(bounds, chunks, causal, CPU):
                groups_seen += 1
                assert group.count * group.query_length <= MAX_GROUP_PADDING * len(group.targets)
                keys = group.keys.view(group.count, group.key_length)
                # Real key slots ascend by one from the first; padding repeats token 0.
                real = (keys == keys[:, :1] + torch.arange(group.key_length)).sum()
                assert group.count * group.key_length <= MAX_GROUP_PADDING * int(real)
    assert groups_seen > 200


def test_equal_lengths_are_one_group_without_padding_or_mask():
    bounds = torch.arange(0, 65, 8, dtype=torch.int32)
    (group,) = group_segments(bounds, context_chunks(64, 0, 1), causal=False, device=CPU)
    assert (group.count, group.query_length, group.mask, group.slots) == (8, 8, None, None)
    (group,) = group_segments(bounds, context_chunks(64, 0, 1), causal=True, device=CPU)
    assert group.is_causal
    assert group.mask is None


def test_zigzag_chunks_share_the_bin_and_the_causal_work():
    held = [context_chunks(48, rank, 3) for rank in range(3)]
    assert held == [((0, 8), (40, 48)), ((8, 16), (32, 40)), ((16, 24), (24, 32))]
    assert len({sum(sum(range(*chunk)) for chunk in chunks) for chunks in held}) == 1


def attention_module(causal, heads, groups, head_dim):
    config = TransformerConfig(num_layers=1, hidden_size=heads * head_dim, num_attention_heads=heads,
                               num_query_groups=groups, kv_channels=head_dim, attention_dropout=0.0)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return PackedAttention(config, 1, mask, "self")


def naive(query, key, value, bounds, causal):
    """[tokens, heads * head_dim] by one softmax per sequence and head."""
    heads, groups, head_dim = query.shape[1], key.shape[1], query.shape[2]
    output = torch.zeros(query.shape[0], heads, head_dim, dtype=query.dtype)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for head in range(heads):
            other = head * groups // heads
            scores = query[start:end, head] @ key[start:end, other].T / math.sqrt(head_dim)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
            output[start:end, head] = scores.softmax(dim=1) @ value[start:end, other]
    return output.flatten(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_a_plain_softmax(causal, groups):
    bounds, tokens = random_bin(5, 1)
    tokens += 7
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(tokens, count, 8, generator=generator, dtype=torch.float64, requires_grad=True)
                         for count in (4, groups, groups))
    packed = PackedSequences(cu_seqlens=bounds, max_seqlen=int(bounds.diff().max()), num_tokens=int(bounds[-1]))
    packed.index_groups(group_segments(bounds, context_chunks(tokens, 0, 1), causal, CPU), tokens, keys_are_local=True)
    module = attention_module(causal, 4, groups, 8)
    output = module(query[:, None], key[:, None], value[:, None], None, packed_seq_params=packed)[:, 0]
    expected = naive(query, key, value, bounds, causal)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert not output[int(bounds[-1]):].any()
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), (query, key, value)),
                                strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_the_plain_softmax_rounded_once(causal):
    bounds, tokens = random_bin(5, 1)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(tokens, count, 8, generator=generator).bfloat16().double() for count in (4, 2, 2)]
    packed = PackedSequences(cu_seqlens=bounds, max_seqlen=int(bounds.diff().max()), num_tokens=int(bounds[-1]))
    packed.index_groups(group_segments(bounds, context_chunks(tokens, 0, 1), causal, CPU), tokens, keys_are_local=True)
    module, weights = attention_module(causal, 4, 2, 8), torch.randn(tokens, 32, generator=generator).bfloat16()

    def gradients(attention, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        output = attention(*inputs)
        return [output, *torch.autograd.grad(output, inputs, weights.to(dtype))]

    computed = gradients(lambda *inputs: module(*(tensor[:, None] for tensor in inputs), None,
                                             packed_seq_params=packed)[:, 0], torch.bfloat16)
    expected = gradients(lambda *inputs: naive(*inputs, bounds, causal), torch.float64)
    for ours, truth in zip(computed, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert truth.abs().max() > 0.1
        # 2^-9 is the rounding of one number; scores and weights in bfloat16 would cost several times that.
        assert (ours.double() - truth).norm() / truth.norm() < 2**-9


@pytest.mark.parametrize("causal", [False, True])
def test_rank_whose_share_is_padding_computes_zeros_and_a_zero_gradient(causal):
    bounds, tokens, cp_size = torch.tensor([0, 3], dtype=torch.int32), 16, 2
    chunks = context_chunks(tokens, 1, cp_size)
    assert min(start for start, _ in chunks) >= 3
    packed = PackedSequences(cu_seqlens=bounds, num_tokens=3, max_seqlen=3)
    packed.index_groups(group_segments(bounds, chunks, causal, CPU), tokens // cp_size, keys_are_local=False)
    query = torch.randn(tokens // cp_size, 1, 2, 4, requires_grad=True)
    key, value = (torch.randn(tokens, 1, 2, 4, requires_grad=True) for _ in range(2))
    output = attention_module(causal, 2, 2, 4)(query, key, value, None, packed_seq_params=packed)
    assert output.shape == (tokens // cp_size, 1, 8)
    assert not output.any()
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_a_bin_prepared_for_another_window_is_not_computed():
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    packed = PackedSequences(cu_seqlens=bounds, num_tokens=5, max_seqlen=5, window=attention_window(4, True))
    packed.index_groups(group_segments(bounds, context_chunks(5, 0, 1), True, CPU), 5, keys_are_local=True)
    states = torch.randn(5, 1, 2, 4)
    with pytest.raises(AssertionError, match="prepared for another attention window"):
        attention_module(True, 2, 2, 4)(states, states, states, None, packed_seq_params=packed)
