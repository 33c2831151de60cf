"""Flash attention over packed sequences written out in float64, with the checks of torch's CUDA kernel.

Dropout draws a seed from the device's generator, as the CUDA kernel draws seed and offset, and the backward pass drops
by that seed.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
HEAD_DIM_UNIT = 8
"""What the CUDA kernel takes. tools/exactness.py allows float32, to compare all that is around the kernel exactly."""

_library = torch.library.Library("aten", "IMPL")


def install(to_host_alias: Any, to_device_alias: Any) -> None:
    """Registers forward and backward for the device; its tensors and the host's share memory by these functions."""

    def forward(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int,
                max_key: int, dropout: float, is_causal: bool, return_debug_mask: bool, **options: Any
                ) -> tuple[Tensor, ...]:
        _check(query, key, value, cu_query, cu_key)
        results = attend(*(to_host_alias(tensor) for tensor in (query, key, value, cu_query, cu_key)), max_query,
                         max_key, dropout, is_causal, return_debug_mask, **options)
        return tuple(map(to_device_alias, results))

    def backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                 cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int, dropout: float, is_causal: bool,
                 rng_state: Tensor, unused: Tensor, **options: Any) -> tuple[Tensor, ...]:
        _check(query, key, value, cu_query, cu_key)
        tensors = (gradient, query, key, value, output, logsumexp, cu_query, cu_key)
        return tuple(map(to_device_alias, attend_backward(
            *map(to_host_alias, tensors), max_query, max_key, dropout, is_causal, to_host_alias(rng_state), unused,
            **options)))

    _library.impl("_flash_attention_forward", forward, "CUDA")
    _library.impl("_flash_attention_backward", backward, "CUDA")


def attend(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int,
           dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
           window_size_left: int | None = None, window_size_right: int | None = None,
           **others: Any) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward` on host tensors."""
    assert not return_debug_mask and not any(other is not None for other in others.values())
    q, k, v = (tensor.double() for tensor in (query, key, value))
    output, logsumexp = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
    seed = int(torch.randint(2**62, (), generator=_generator())) if dropout else 0
    kept = _Kept(seed, dropout)
    for rows, columns in _sequences(cu_query, cu_key, max_query, max_key):
        scores = _scores(q[rows], _all_heads(k[columns], q), scale, is_causal, window_size_left, window_size_right)
        logsumexp[:, rows] = scores.logsumexp(-1)
        weights = kept(scores.softmax(-1))
        output[rows] = torch.einsum("hqk,khd->qhd", weights, _all_heads(v[columns], q))
    return (output.to(query.dtype), logsumexp.float(), torch.tensor([seed, 0], dtype=torch.uint64), torch.zeros(()),
            torch.zeros(0))


def attend_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                    cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int, dropout: float, is_causal: bool,
                    rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
                    window_size_left: int | None = None,
                    window_size_right: int | None = None) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward` on host tensors."""
    assert logsumexp.shape == (query.shape[1], query.shape[0])
    q, k, v, o, do = (tensor.double() for tensor in (query, key, value, output, gradient))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kept = _Kept(int(rng_state[0]) if dropout else 0, dropout)
    for rows, columns in _sequences(cu_query, cu_key, max_query, max_key):
        keys, values = _all_heads(k[columns], q), _all_heads(v[columns], q)
        weights = _scores(q[rows], keys, scale, is_causal, window_size_left, window_size_right).softmax(-1)
        dropped = kept(weights)
        d_dropped = torch.einsum("qhd,khd->hqk", do[rows], values)
        d_scores = (dropped * d_dropped - weights * (do[rows] * o[rows]).sum(-1).T[:, :, None]) * factor
        dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, keys)
        dk[columns] = _shared_heads(torch.einsum("hqk,qhd->khd", d_scores, q[rows]), k)
        dv[columns] = _shared_heads(torch.einsum("hqk,qhd->khd", dropped, do[rows]), v)
    return tuple(made.to(query.dtype) for made in (dq, dk, dv))


class _Kept:
    """Attention weights after dropout: zero, or divided by the share that is kept; the same for the same seed."""

    def __init__(self, seed: int, dropout: float) -> None:
        self.generator, self.dropout = torch.Generator().manual_seed(seed), dropout

    def __call__(self, weights: Tensor) -> Tensor:
        if not self.dropout:
            return weights
        drawn = torch.rand(weights.shape, generator=self.generator, dtype=torch.float64)
        return weights * (drawn >= self.dropout) / (1 - self.dropout)


def _generator() -> torch.Generator:
    """The device's; the host's where there is none."""
    return torch.cuda.default_generators[0] if torch.cuda.is_available() else torch.default_generator


def _check(query: Tensor, key: Tensor, value: Tensor, *bounds: Tensor) -> None:
    """What the CUDA kernel refuses."""
    for tensor in (query, key, value):
        if tensor.device.type != "cuda" or tensor.dtype not in DTYPES:
            raise RuntimeError(f"FlashAttention only supports fp16 and bf16 on CUDA: {tensor.dtype}, {tensor.device}")
        if tensor.stride(-1) != 1 or tensor.shape[-1] % HEAD_DIM_UNIT or tensor.shape[-1] > 256:
            raise RuntimeError(f"FlashAttention: head dimension {tensor.shape[-1]}, stride {tensor.stride()}")
    for bound in bounds:
        if bound.device.type != "cuda" or bound.dtype != torch.int32 or not bound.is_contiguous():
            raise RuntimeError(f"FlashAttention: cu_seqlens must be int32 on CUDA: {bound.dtype}, {bound.device}")


def _sequences(cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each sequence; what is longer than said to be would be left out by the CUDA kernel."""
    assert cu_query.shape == cu_key.shape
    assert int(cu_query.diff().max()) <= max_query and int(cu_key.diff().max()) <= max_key
    ends = zip(cu_query.tolist(), cu_query.tolist()[1:], cu_key.tolist(), cu_key.tolist()[1:], strict=False)
    return [(slice(first, last), slice(first_key, last_key)) for first, last, first_key, last_key in ends]


def _all_heads(shared: Tensor, query: Tensor) -> Tensor:
    """[keys, groups, head_dim] -> [keys, heads, head_dim]."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


def _shared_heads(gradient: Tensor, shared: Tensor) -> Tensor:
    """The sum over the heads that share a group: [keys, heads, head_dim] -> [keys, groups, head_dim]."""
    return gradient.view(gradient.shape[0], shared.shape[1], -1, gradient.shape[2]).sum(2)


def _scores(query: Tensor, key: Tensor, scale: float | None, is_causal: bool, before: int | None,
            after: int | None) -> Tensor:
    """[heads, queries, keys], -inf where a query does not see a key."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    num_queries, num_keys = scores.shape[1:]
    ahead = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        hidden |= ahead > 0
    if before is not None and before >= 0:
        hidden |= ahead < -before
    if after is not None and after >= 0:
        hidden |= ahead > after
    return scores.masked_fill(hidden, float("-inf"))
