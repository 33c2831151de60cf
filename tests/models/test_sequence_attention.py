"""Attention by sequence on CPUs: values and gradients of torch's attention over each sequence alone, in float64."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as functional

from megatron_embed.data.packing import pack
from megatron_embed.models import sequence_attention as module
from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.packed_bins import _packed_for
from megatron_embed.models.sequence_attention import sequence_attention
from megatron_embed.names import SHORT_SEQUENCE as SHORT

HEAD_DIM = 8
SCALE = 0.4


def projected(tokens, heads, groups, dtype=torch.float32):
    """(queries, keys, values) as views of one projection, as Megatron-Core splits it."""
    torch.manual_seed(tokens + heads)
    mixed = torch.randn(tokens, groups, heads // groups + 2, HEAD_DIM, dtype=torch.float64)
    leaf = mixed.to(dtype).requires_grad_()
    query, key, value = leaf.split([heads // groups, 1, 1], dim=2)
    return leaf, query.reshape(tokens, heads, HEAD_DIM), key.squeeze(2), value.squeeze(2)


def expected(query, key, value, bounds, causal):
    """torch's attention of every sequence, and zeros behind the last."""
    outputs = []
    for first, stop in itertools.pairwise(bounds):
        q, k, v = (part[first:stop].transpose(0, 1)[None] for part in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat([*outputs, torch.zeros_like(query[bounds[-1]:])])


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("lengths", "padding"), [
    ([1], 0), ([5, 1, 17, 5], 3), ([SHORT, SHORT + 1, 2], 5), ([SHORT + 60], 0)],
    ids=["one token", "short", "short and long", "long"])
def test_values_and_gradients(lengths, padding, heads, groups, causal):
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    tokens = bounds[-1] + padding
    leaf, *inputs = projected(tokens, heads, groups)
    exact_leaf, *exact_inputs = projected(tokens, heads, groups, torch.float64)
    output = sequence_attention(*inputs, bounds, causal=causal, scale=SCALE)
    exact = expected(*exact_inputs, bounds, causal)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=2e-6)
    assert not output[bounds[-1]:].any()
    weight = torch.randn(tokens, heads, HEAD_DIM, dtype=torch.float64)
    (output * weight.float()).sum().backward()
    (exact * weight).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=1e-5, atol=2e-5)
    assert leaf.grad[: bounds[-1]].any() and not leaf.grad[bounds[-1]:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_double_precision_to_the_last_digits(causal):
    bounds = (0, 9, SHORT + 20)
    leaf, *inputs = projected(SHORT + 22, 6, 2, torch.float64)
    exact_leaf, *exact_inputs = projected(SHORT + 22, 6, 2, torch.float64)
    sequence_attention(*inputs, bounds, causal=causal, scale=SCALE).square().sum().backward()
    expected(*exact_inputs, bounds, causal).square().sum().backward()
    torch.testing.assert_close(leaf.grad, exact_leaf.grad, rtol=1e-12, atol=1e-12)


def test_kept_numbers_are_those_of_short_sequences():
    """Probabilities of the short sequence, one number per query and head of the long one."""
    kept = []
    _, *inputs = projected(SHORT + 20, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        sequence_attention(*inputs, (0, 10, SHORT + 20), causal=False, scale=SCALE)
    assert sum(tensor.shape == (4, 10, 10) for tensor in kept) == 1
    assert max(tensor.numel() for tensor in kept) == (SHORT + 20) * 4 * HEAD_DIM


def test_nothing_is_kept_without_gradients(monkeypatch):
    """The probabilities of one sequence at a time are in memory; with gradients those of all."""
    original, made, most = module._probabilities, [], []

    def recorded(*arguments):
        result = original(*arguments)
        made.append(weakref.ref(result))
        most.append(sum(reference() is not None for reference in made))
        return result

    monkeypatch.setattr(module, "_probabilities", recorded)
    _, *inputs = projected(40, 4, 4)
    with torch.no_grad():
        without = sequence_attention(*inputs, (0, 10, 20, 30, 40), causal=False, scale=SCALE)
    assert max(most) <= 2
    assert torch.equal(sequence_attention(*inputs, (0, 10, 20, 30, 40), causal=False, scale=SCALE), without)
    assert max(most) == 4


def prepared(**fields):
    return PackedSequences(cu_seqlens=torch.tensor([0, 3]), num_tokens=3, max_seqlen=3, bounds=(0, 3), **fields)


@pytest.mark.parametrize(("packed", "softcap", "dropout", "takes"), [
    (prepared(), None, 0.0, True), (prepared(), None, 0.1, False), (prepared(), 30.0, 0.0, False),
    (prepared(bias=object()), None, 0.0, False),
    (PackedSequences(cu_seqlens=torch.tensor([0, 3]), num_tokens=3, max_seqlen=3), None, 0.0, False)])
def test_what_it_cannot_do_is_left_to_the_groups(packed, softcap, dropout, takes):
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.softcap = softcap
    assert attention._takes_sequences(torch.zeros(3, 1, 8), packed, dropout) is takes
    assert not attention._takes_sequences(torch.zeros(3, 1, 8, device="meta"), packed, dropout)


@pytest.mark.parametrize(("lengths", "window", "by_sequence"), [
    ([31, 33], None, True), ([31, 32], None, False), ([8] * 20, None, False), ([8, 60], None, True),
    ([40, 50], 50, True), ([40, 50], 49, True), ([40, 50], 48, False)])
def test_bins_of_short_texts_and_windows_stay_in_groups(lengths, window, by_sequence):
    micro_batch = pack([[1] * length for length in lengths], list(range(len(lengths))), tokens=None, alignment=1,
                       pad_token_id=0)
    packed = _packed_for(micro_batch, ((0, sum(lengths)),), "sdpa", False, None if window is None else (window, window))
    assert packed.groups
    assert packed.bounds == ((0, *itertools.accumulate(lengths)) if by_sequence else None)
