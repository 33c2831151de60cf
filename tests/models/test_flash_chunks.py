"""Flash attention of a rank's chunks: the calls of all ranks together, and on ranks with their communication, against a
softmax of one process in float64. The kernels are the pretend device's reference, in float64."""

import dataclasses
import itertools

import pytest
import torch

from megatron_embed.models import attention
from megatron_embed.models.attention import PackedSequences
from megatron_embed.models.flash_chunks import flash_calls
from megatron_embed.models.segments import attention_window, context_chunks
from megatron_embed.platform.compat import get_cuda_rng_tracker
from megatron_embed.platform.flash_attention import ALL_TOKENS, CAUSAL, flash_forward
from tests.helpers.context_attention import (
    Bin,
    assembled,
    module_of,
    on_rank,
    one_process,
    packed_of,
    reference_kernels,
)
from tests.helpers.ranks import run_on_ranks

CPU = torch.device("cpu")
MASKS = [(causal, window) for causal in (True, False) for window in (None, 1, 9)]
LENGTHS = ((70,), (3, 50, 1, 1, 20), (33, 33), (1,) * 9, (2,))
"""One over all chunks; ends in several; one that ends at no chunk's end; short ones; one beside padding alone."""


def cases(cp_size):
    unit = 2 * cp_size
    return [Bin(lengths=lengths, tokens=-(-(sum(lengths) + extra) // unit) * unit, causal=causal, sliding_window=window)
            for lengths, extra in zip(LENGTHS, (0, 5, 0, 13, 20), strict=True) for causal, window in MASKS]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_calls_of_all_ranks_are_one_softmax(cp_size):
    for case in cases(cp_size):
        query, key, value, _ = case.inputs()
        output, computed = torch.zeros_like(query), torch.zeros(case.tokens, dtype=torch.int64)
        for rank in range(cp_size):
            chunks = context_chunks(case.tokens, rank, cp_size)
            held = torch.cat([torch.arange(*chunk) for chunk in chunks])
            for call in flash_calls(case.bounds, chunks, case.causal, case.window):
                tokens = held[slice(*call.queries)]
                with reference_kernels():
                    output[tokens], _ = flash_forward(query[held], key, value, call, scale=case.head_dim**-0.5,
                                                      dropout=0.0)
                computed[tokens] += 1
        assert computed.tolist() == [1] * sum(case.lengths) + [0] * (case.tokens - sum(case.lengths)), case
        torch.testing.assert_close(output.flatten(1), one_process(case)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal, sliding_window", MASKS)
def test_a_chunk_is_one_call_with_the_keys_that_its_mask_shows(causal, sliding_window):
    """Two where the last sequence goes on behind it and a window looks there."""
    bounds, window = torch.tensor((0, 50, 53, 100, 120), dtype=torch.int32), attention_window(sliding_window, causal)
    for first, stop in ((0, 20), (40, 60), (60, 100), (100, 120)):
        calls = flash_calls(bounds, ((first, stop),), causal, window)
        span = window or (CAUSAL if causal else ALL_TOKENS)
        assert calls[0].queries[0] == 0 and calls[-1].queries[1] == stop - first
        looks_behind = not causal and sliding_window is not None and stop in (20, 60)
        assert [call.window == span for call in calls] == [True] * (len(calls) - looks_behind) + [False] * looks_behind
        assert len(calls) == (2 if looks_behind and first == 40 else 1)
        starts = next(start for start, end in itertools.pairwise(bounds.tolist()) if end > first)
        ends = [end for start, end in itertools.pairwise(bounds.tolist()) if start < stop][-1]
        if window is not None:
            starts, ends = max(starts, first - window[0]), min(ends, stop + window[1])
        assert (calls[0].keys[0], calls[-1].keys[1]) == (starts, stop if causal else ends)


@pytest.mark.parametrize("cp_comm_type", ["all_gather", "a2a"])
@pytest.mark.parametrize("cp_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_values_and_gradients_of_one_process(cp_size, cp_comm_type):
    chosen = [dataclasses.replace(case, groups=max(case.groups, cp_size)) for case in cases(cp_size)]
    per_rank = run_on_ranks(on_rank, cp_size, chosen, torch.float64, cp_comm_type)
    for index, case in enumerate(chosen):
        ours, expected = assembled([results[index] for results in per_rank], case.tokens), one_process(case)
        # A token that sees itself alone has no gradient but that of its value.
        assert all(float(right.abs().max()) > 0.1 for right in (expected if case == chosen[0] else expected[::3]))
        for result, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, right, rtol=0, atol=1e-12, msg=lambda text, case=case: f"{case}: {text}")


def test_only_own_keys_and_values_are_kept_for_the_backward_pass():
    """Not those of the bin, which would take the memory of one rank on every rank."""
    kept = run_on_ranks(kept_tokens, 2, cases(2)[0])
    assert kept == [{"query": 36, "key": 36, "value": 36, "output": 36}] * 2


def kept_tokens(case):
    """Tokens of each tensor that autograd keeps."""
    import torch.distributed as dist

    chunks = context_chunks(case.tokens, dist.get_rank(), 2)
    inputs = [torch.cat([tensor[first:stop] for first, stop in chunks]).requires_grad_()
              for tensor in case.inputs()[:3]]
    kept = []
    with reference_kernels(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        module_of(case, dist.group.WORLD)(*(tensor[:, None] for tensor in inputs), None,
                                          packed_seq_params=packed_of(case, chunks, CPU))
    states = [tensor for tensor in kept if tensor.ndim == 3]
    return dict(zip(("query", "key", "value", "output"), map(len, states), strict=True))


DROPOUT = Bin(lengths=(30, 1, 9), tokens=44, causal=True)


@pytest.fixture
def attend(monkeypatch):
    """Output and gradients of DROPOUT under dropout, from the random numbers of this tensor-parallel rank."""
    tracker = type(get_cuda_rng_tracker())()
    tracker.add("model-parallel-rng", 3)
    states = tracker.get_states()
    monkeypatch.setattr(attention, "get_cuda_rng_tracker", lambda: tracker)

    def run(rate=0.2, grad=True, scale=1.0):
        tracker.set_states(dict(states))
        *inputs, weights = DROPOUT.inputs()
        inputs[2] *= scale
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with reference_kernels(), torch.set_grad_enabled(grad):
            output = module_of(DROPOUT, dropout=rate)(*(tensor[:, None] for tensor in inputs), None,
                                                      packed_seq_params=packed_of(DROPOUT, ((0, 44),), CPU))[:, 0]
            return output, *(torch.autograd.grad(output, inputs, weights) if grad else ()), inputs[2], weights

    return run


def test_dropout_is_replayed_by_the_second_pass(attend):
    first = attend(grad=False)[0]
    torch.rand(7)  # of another generator state
    second, without = attend()[0], attend(rate=0.0)[0]
    assert torch.equal(first, second) and not torch.equal(first, without)
    assert not first[40:].any() and first[:40].any()


def test_backward_drops_what_the_forward_dropped(attend):
    """The output is linear in the values: <gradient of the values, values> = <weights, output>, for one mask only."""
    output, _, _, d_value, value, weights = attend()
    assert float((d_value * value).detach().sum()) == pytest.approx(float((weights * output).detach().sum()), rel=1e-12)
    assert torch.equal(attend(scale=2.0)[0], 2 * output)


def test_a_bin_prepared_for_another_kernel_is_not_computed():
    case = dataclasses.replace(DROPOUT, lengths=(44,))
    packed = PackedSequences(cu_seqlens=case.bounds, max_seqlen=44, num_tokens=44)
    with pytest.raises(AssertionError, match="prepared for another kernel"):
        module_of(case)(*(tensor[:, None] for tensor in case.inputs()[:3]), None, packed_seq_params=packed)
