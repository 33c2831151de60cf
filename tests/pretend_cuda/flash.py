"""Flash attention over packed sequences written out in float64, with the checks of torch's CUDA kernel."""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")


def install(to_host_alias: Any, to_device_alias: Any) -> None:
    """Registers forward and backward for the device; its tensors and the host's share memory by these functions."""

    def forward(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int,
                max_key: int, dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
                window_size_left: int | None = None, window_size_right: int | None = None,
                **others: Any) -> tuple[Tensor, ...]:
        _check(query, key, value, cu_query, cu_key)
        assert dropout == 0.0 and not any(other is not None for other in others.values())
        q, k, v = (to_host_alias(tensor).double() for tensor in (query, key, value))
        output, logsumexp = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        for rows, columns in _sequences(to_host_alias(cu_query), to_host_alias(cu_key)):
            scores = _scores(q[rows], _all_heads(k[columns], q), scale, is_causal, window_size_left, window_size_right)
            logsumexp[:, rows] = scores.logsumexp(-1)
            output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _all_heads(v[columns], q))
        results = (output.to(query.dtype), logsumexp.float(), torch.zeros(2, dtype=torch.uint64), torch.zeros(()),
                   torch.zeros(0))
        return tuple(map(to_device_alias, results))

    def backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                 cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int, dropout: float, is_causal: bool,
                 rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
                 window_size_right: int | None = None) -> tuple[Tensor, ...]:
        _check(query, key, value, cu_query, cu_key)
        q, k, v, o, do = (to_host_alias(tensor).double() for tensor in (query, key, value, output, gradient))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns in _sequences(to_host_alias(cu_query), to_host_alias(cu_key)):
            keys, values = _all_heads(k[columns], q), _all_heads(v[columns], q)
            weights = _scores(q[rows], keys, scale, is_causal, window_size_left, window_size_right).softmax(-1)
            d_weights = torch.einsum("qhd,khd->hqk", do[rows], values)
            d_scores = weights * (d_weights - (do[rows] * o[rows]).sum(-1).T[:, :, None]) * factor
            dq[rows] = torch.einsum("hqk,khd->qhd", d_scores, keys)
            dk[columns] = _shared_heads(torch.einsum("hqk,qhd->khd", d_scores, q[rows]), k)
            dv[columns] = _shared_heads(torch.einsum("hqk,qhd->khd", weights, do[rows]), v)
        return tuple(to_device_alias(made.to(query.dtype)) for made in (dq, dk, dv))

    _library.impl("_flash_attention_forward", forward, "CUDA")
    _library.impl("_flash_attention_backward", backward, "CUDA")


def _check(query: Tensor, key: Tensor, value: Tensor, *bounds: Tensor) -> None:
    """What the CUDA kernel refuses."""
    for tensor in (query, key, value):
        if tensor.device.type != "cuda" or tensor.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"FlashAttention only supports fp16 and bf16 on CUDA: {tensor.dtype}, {tensor.device}")
        if tensor.stride(-1) != 1 or tensor.shape[-1] % 8 or tensor.shape[-1] > 256:
            raise RuntimeError(f"FlashAttention: head dimension {tensor.shape[-1]}, stride {tensor.stride()}")
    for bound in bounds:
        if bound.device.type != "cuda" or bound.dtype != torch.int32 or not bound.is_contiguous():
            raise RuntimeError(f"FlashAttention: cu_seqlens must be int32 on CUDA: {bound.dtype}, {bound.device}")


def _sequences(cu_query: Tensor, cu_key: Tensor) -> list[tuple[slice, slice]]:
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
