"""Attention for the CPU whose score matrices fit into the processor's cache, over a bin of packed sequences.

torch's flash kernel for CPUs is made for few and long sequences: forward and backward of 64 sequences of 20 tokens take
it 24 ms in bfloat16, the products below 2.3 ms (12 heads of 32, two Zen 5 cores, one layer).
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 19
"""Scores computed at once: 2 MiB of float32."""
LONGEST = 1024
"""Tokens up to which blocks beat torch's kernel in bfloat16; a bin with a longer sequence goes there."""
ALONE_FROM = 64
"""Tokens from which a sequence is a block of its own; shorter ones of similar length share one, padded."""
MAX_PADDING = 1.15
"""Slots over real tokens of a shared block."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Sequences that are computed together."""

    count: int
    length: int
    """Tokens of the longest."""
    first: int | None
    """First token of the only sequence; null where several share the block."""
    tokens: Tensor | None
    """[count * length] int64, the bin's token of each slot (padding slots repeat token 0); null for one sequence."""
    slots: Tensor | None
    """[real tokens] int64, the slots that are no padding; null for one sequence."""
    padding: Tensor | None
    """[padding slots] int64, the others; null for one sequence."""
    targets: Tensor | None
    """[real tokens] int64, the bin's tokens of `slots`; null for one sequence."""
    hidden: Tensor | None
    """[count, 1, length] or [1 or count, length, length] bool, true where a query does not see a key; null: all seen"""


def sequence_blocks(cu_seqlens: Tensor, causal: bool) -> tuple[Block, ...]:
    """Blocks of a bin: long sequences alone, short ones by similar length. `cu_seqlens`: [sequences + 1], on the
    CPU."""
    bounds = cu_seqlens.tolist()
    sequences = sorted(((last - first, first) for first, last in itertools.pairwise(bounds)), reverse=True)
    long = [(length, first) for length, first in sequences if length >= ALONE_FROM]
    triangles: dict[int, Tensor] = {}
    blocks = []
    for length, first in long:
        if causal and length not in triangles:
            triangles[length] = torch.ones(1, length, length, dtype=torch.bool).triu_(1)
        blocks.append(Block(count=1, length=length, first=first, tokens=None, slots=None, padding=None, targets=None,
                            hidden=triangles.get(length)))
    short = sequences[len(long):]
    while short:
        count = real = 0
        for length, _ in short:
            if (count + 1) * short[0][0] > MAX_PADDING * (real + length):
                break
            count, real = count + 1, real + length
        blocks.append(_shared_block(torch.tensor(short[:count]), causal))
        short = short[count:]
    return tuple(blocks)


def _shared_block(sequences: Tensor, causal: bool) -> Block:
    """`sequences`: [count, 2], length and first token, longest first."""
    lengths, firsts = sequences[:, :1], sequences[:, 1:]
    length = int(lengths[0])
    steps = torch.arange(length)
    real = steps < lengths
    tokens = torch.where(real, firsts + steps, 0).flatten()
    slots, padding = real.flatten().nonzero().flatten(), (~real).flatten().nonzero().flatten()
    hidden = None if bool(real.all()) else ~real[:, None, :]
    if causal:  # padding comes last, so no real query looks at it
        hidden = torch.ones(1, length, length, dtype=torch.bool).triu_(1)
    return Block(count=len(sequences), length=length, first=None, tokens=tokens, slots=slots, padding=padding,
                 targets=tokens[slots], hidden=hidden)


class BlockedAttention(torch.autograd.Function):
    """softmax(scale * query @ key.T) @ value per sequence and head; scores are computed again in the backward pass.

    Memory beyond inputs and outputs is a block, and of its scores one tile. Scores and weights are rounded to the
    inputs' dtype, as in Transformers' eager attention; sums and exponentials run in at least float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        """
        Args:
            query: [tokens, heads, head_dim].
            key, value: [tokens, groups, head_dim]; heads is a multiple of groups.
            blocks: of the bin; tokens of none are padding and get 0.
            scale: multiplies the scores.
        Returns:
            [tokens, heads, head_dim]. No communication.
        """
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        groups, output = key.shape[1], _unfilled(query, blocks)
        for block in blocks:
            q, k, v = _take(query, block, groups), _take(key, block, groups), _take(value, block, groups)
            result = torch.empty_like(q)
            for part, hidden in _tiles(block, q):
                weights = _weights(part(q), part(k), hidden, block.length, scale)
                torch.bmm(weights, part(v), out=part(result))
            _put(output, result, block)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        groups, grads = key.shape[1], [_unfilled(x, ctx.blocks) for x in (query, key, value)]
        for block in ctx.blocks:
            q, k, v = _take(query, block, groups), _take(key, block, groups), _take(value, block, groups)
            grad = _take(grad_output, block, groups, padding=0.0)
            results = [torch.empty_like(x) for x in (q, k, v)]
            for part, hidden in _tiles(block, q):
                tile_q, tile_k, tile_grad = part(q), part(k), part(grad)
                weights = _weights(tile_q, tile_k, hidden, block.length, ctx.scale)
                torch.bmm(weights.transpose(1, 2), tile_grad, out=part(results[2]))
                grad_weights = torch.bmm(tile_grad, part(v).transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                _scaled_product(grad_scores, tile_k, ctx.scale, out=part(results[0]))
                _scaled_product(grad_scores.transpose(1, 2), tile_q, ctx.scale, out=part(results[1]))
            for whole, result in zip(grads, results, strict=True):
                _put(whole, result, block)
        return (*grads, None, None)


def _take(tensor: Tensor, block: Block, groups: int, padding: float | None = None) -> Tensor:
    """[tokens, heads, head_dim] -> the block's [count * groups, heads / groups * length, head_dim].

    `padding` is put into the padding slots; null leaves what `tokens` says there.
    """
    heads, head_dim = tensor.shape[1:]
    if block.tokens is None:
        rows = tensor[block.first : block.first + block.length]  # type: ignore[operator]
    else:
        rows = tensor.index_select(0, block.tokens)
        if padding is not None:
            rows.index_fill_(0, block.padding, padding)
    rows = rows.view(block.count, block.length, heads, head_dim).transpose(1, 2)
    return rows.reshape(block.count * groups, heads // groups * block.length, head_dim).contiguous()


def _put(tensor: Tensor, result: Tensor, block: Block) -> None:
    """Writes what `_take` would have taken into its place in `tensor`."""
    heads, head_dim = tensor.shape[1:]
    rows = result.view(block.count, heads, block.length, head_dim).transpose(1, 2)
    if block.tokens is None:
        tensor[block.first : block.first + block.length] = rows[0]  # type: ignore[operator]
    else:
        tensor.index_copy_(0, block.targets, rows.reshape(-1, heads, head_dim).index_select(0, block.slots))


def _weights(query: Tensor, key: Tensor, hidden: Tensor | None, length: int, scale: float) -> Tensor:
    """[batch, queries, length] softmax, computed in at least float32 and rounded to the inputs' dtype."""
    scores = _scaled_product(query, key.transpose(1, 2), scale)
    if hidden is not None:
        scores.view(hidden.shape[0], -1, length, length).masked_fill_(hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * left @ right, per batch entry, scaled before it is rounded."""
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=scale, out=out)


def _tiles(block: Block, query: Tensor) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor | None]]:
    """Functions that take a stretch of a block's batch, with its mask; whole sequences where each has its own."""
    batch, hidden = query.shape[0], block.hidden
    whole = batch // block.count if hidden is not None and hidden.shape[0] > 1 else 1
    step = max(1, TILE_ELEMENTS // (query.shape[1] * block.length * whole)) * whole
    if step >= batch:
        yield lambda tensor: tensor, hidden
        return
    for first in range(0, batch, step):
        mask = hidden if hidden is None or len(hidden) == 1 else hidden[first // whole : (first + step) // whole]
        yield operator.itemgetter(slice(first, min(first + step, batch))), mask


def _unfilled(tensor: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Of a tensor's shape, to be filled by the blocks; zero behind their last token, where the bin is padding."""
    filled = torch.empty_like(tensor)
    last = max(block.first + block.length if block.first is not None else int(block.targets.max()) + 1
               for block in blocks)
    filled[last:] = 0
    return filled
