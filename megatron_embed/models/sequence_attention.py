"""Attention over packed sequences on a CPU, one sequence at a time, with its heads as the batch of matrix products.

Queries, keys and values are read where the projection has written them: nothing is gathered, padded or masked as for
torch's kernels over several sequences. The scores of a short sequence stay in the processor's cache, and its
probabilities are kept for the backward pass, which then needs no exponentials; longer sequences take torch's flash
kernel, whose blocks are filled by them.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_embed.names import SHORT_SEQUENCE

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sequence_attention(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], *, causal: bool,
                       scale: float) -> Tensor:
    """[tokens, heads, head_dim] attention of each token within its sequence, with gradients; 0 for tokens behind the
    last sequence. No dropout, no communication.

    Args:
        query: [tokens, heads, head_dim] float32, of any strides whose last is 1.
        key, value: [tokens, groups, head_dim] likewise; `groups` divides `heads`.
        bounds: the tokens at which sequences begin, from 0 on, and at which the last one ends; no sequence is empty.
        causal: a token sees itself and those before it, not all.
        scale: factor of the dot products.
    """
    has_graph = torch.is_grad_enabled() and any(tokens.requires_grad for tokens in (query, key, value))
    output: Tensor = _SequenceAttention.apply(query, key, value, bounds, causal, scale, has_graph)
    return output


class _SequenceAttention(torch.autograd.Function):
    """Keeps its inputs and output and, for each sequence, its probabilities or the log-sum-exp of its scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], causal: bool,
                scale: float, has_graph: bool) -> Tensor:
        output = query.new_empty(query.shape)
        kept = []
        for first, stop in pairwise(bounds):
            q, k, v, out = (tokens[first:stop].transpose(0, 1) for tokens in (query, key, value, output))
            if stop - first > SHORT_SEQUENCE:
                result, numbers = flash_forward(q[None], *_repeated(q, k, v), 0.0, causal, scale=scale)
            else:
                numbers = _probabilities(_by_group(q, k), k, causal, scale)
                result = torch.bmm(numbers, v)
            out.copy_(result.view(out.shape))
            kept += [numbers] if has_graph else []
        output[bounds[-1]:] = 0.0
        if has_graph:
            ctx.save_for_backward(query, key, value, output, *kept)
            ctx.settings = bounds, causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, *kept = ctx.saved_tensors
        bounds, causal, scale = ctx.settings
        gradients = tuple(tokens.new_empty(tokens.shape) for tokens in (query, key, value))
        for (first, stop), numbers in zip(pairwise(bounds), kept, strict=True):
            q, k, v, out, grad = (tokens[first:stop].transpose(0, 1)
                                  for tokens in (query, key, value, output, gradient))
            if stop - first > SHORT_SEQUENCE:
                parts = flash_backward(grad[None], q[None], *_repeated(q, k, v), out[None], numbers, 0.0, causal,
                                       scale=scale)
                parts = parts[0], *(part.view(len(k), -1, *part.shape[2:]).sum(dim=1) for part in parts[1:])
            else:
                parts = _short_backward(numbers, _by_group(q, k), k, v, _by_group(grad, k), scale)
            for target, part in zip(gradients, parts, strict=True):
                own = target[first:stop].transpose(0, 1)
                own.copy_(part.view(own.shape))
        for target in gradients:
            target[bounds[-1]:] = 0.0
        return *gradients, None, None, None, None


def _by_group(queries: Tensor, keys: Tensor) -> Tensor:
    """[heads, length, dim] -> [groups, heads/groups * length, dim]: the queries that share keys, one after another."""
    return queries.reshape(len(keys), -1, queries.shape[-1])


def _repeated(queries: Tensor, *keys: Tensor) -> list[Tensor]:
    """[groups, length, dim] each -> [1, heads, length, dim]."""
    return [part.repeat_interleave(len(queries) // len(part), dim=0)[None] for part in keys]


def _probabilities(queries: Tensor, keys: Tensor, causal: bool, scale: float) -> Tensor:
    """[groups, queries, length] softmax of the scores of one sequence."""
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    if causal:
        length = keys.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
        scores.view(len(scores), -1, length, length).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1, out=scores)


def _short_backward(weights: Tensor, queries: Tensor, keys: Tensor, values: Tensor, gradient: Tensor,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, shaped as these, from the probabilities."""
    nothing = queries.new_empty(())
    of_scores = torch._softmax_backward_data(torch.bmm(gradient, values.transpose(1, 2)), weights, -1, weights.dtype)
    return (torch.baddbmm(nothing, of_scores, keys, beta=0, alpha=scale),
            torch.baddbmm(nothing, of_scores.transpose(1, 2), queries, beta=0, alpha=scale),
            torch.bmm(weights.transpose(1, 2), gradient))
