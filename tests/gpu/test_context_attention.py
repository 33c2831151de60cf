"""Flash attention on context-parallel GPUs, in bfloat16, against a softmax of one process in float64."""

import dataclasses

import pytest
import torch

from tests.helpers.context_attention import Bin, assembled, on_rank, one_process
from tests.helpers.ranks import run_on_ranks

BOUND = 2**-6
"""Relative, of the kernel in bfloat16, as in test_attention_kernels.py; a wrong key or a lost gradient costs more."""
LENGTHS = ((150,), (5, 64, 1, 37, 90, 16))
BINS = [Bin(lengths=lengths, tokens=-(-sum(lengths) // 8) * 8 + 16, causal=causal, sliding_window=window, head_dim=64)
        for lengths in LENGTHS for causal in (True, False) for window in (None, 9)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("cp_comm_type, cp_size", [
    ("all_gather", 2), ("a2a", 2), *(pytest.param(way, 4, marks=pytest.mark.slow) for way in ("all_gather", "a2a"))])
def test_values_and_gradients_are_those_of_one_process(cp_comm_type, cp_size):
    if torch.cuda.device_count() < cp_size:
        pytest.skip(f"needs {cp_size} CUDA devices")
    # By heads, every rank has at least one head of keys.
    bins = [dataclasses.replace(case, groups=max(case.groups, cp_size)) for case in BINS]
    per_rank = run_on_ranks(on_rank, cp_size, bins, torch.bfloat16, cp_comm_type)
    for index, case in enumerate(bins):
        ours = assembled([results[index] for results in per_rank], case.tokens)
        for name, result, right in zip(("output", "query", "key", "value"), ours, one_process(case), strict=True):
            error = float((result.double() - right).norm() / right.norm())
            assert result.dtype == torch.bfloat16 and right.abs().max() > 0.1
            assert error < BOUND, f"{case}: {name}"
            assert not result[sum(case.lengths):].any()
