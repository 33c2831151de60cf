"""Pooling of token states: each rank pools the tokens it holds, so that only `[rows, hidden]` is communicated."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import MicroBatch
from megatron_embed.names import JOINT_POOLINGS, ModelPooling
from megatron_embed.platform.compat import tensor_parallel


@dataclass(frozen=True, kw_only=True)
class PoolingPlan:
    """The tokens and weights of each pooled row. Tokens with weight 0 are absent."""

    tokens: Tensor
    """[pooled tokens] int64, ascending positions in the bin."""
    sequences: Tensor
    """[pooled tokens] int64, the sequence each belongs to, ascending."""
    weights: Tensor
    """[pooled tokens] float32; each sequence's weights sum to 1."""
    num_sequences: int
    one_token: bool
    """Every row is one token, with weight 1: the last or the first."""
    parts: int = 1
    """Sequences in a row that make up one text's vector, one behind the other."""
    places: Tensor | None = None
    """[pooled tokens] int64, of a sparse model: each one's position in the whole bin."""
    pieces: tuple[tuple[int, int, int], ...] | None = None
    """Sparse models: (sequence, first pooled token, one after the last) of neighbouring tokens of a sequence."""


def pooling_plan(micro_batch: MicroBatch, pooling: ModelPooling) -> PoolingPlan:
    """Weights of `pooling` for one bin, on the CPU. Sentence Transformers' definitions; `weightedmean` is Muennighoff
    2022 (SGPT, arXiv:2202.08904): weight position + 1; `tokens`: a row for every token that gives a vector, also of a
    joint model, see `text_plan`."""
    if pooling in JOINT_POOLINGS.values():
        pooling = "tokens"
    if pooling == "tokens":
        assert micro_batch.vectors is not None, "a multi-vector model needs a tokenizer that says which tokens count"
        tokens = (micro_batch.vectors >= 0).nonzero()[:, 0]
        return PoolingPlan(tokens=tokens, sequences=torch.arange(len(tokens)), weights=torch.ones(len(tokens)),
                           num_sequences=len(tokens), one_token=True)
    assert micro_batch.vectors is None, "a model of one vector per text takes texts without vectors of tokens"
    bounds = micro_batch.cu_seqlens.to(torch.int64)
    starts, lengths = bounds[:-1], bounds.diff()
    count = lengths.numel()
    if pooling == "cls+mean":
        return _cls_and_mean(starts, lengths)
    if pooling == "splade":
        sequences = torch.repeat_interleave(torch.arange(count), lengths)
        tokens = torch.arange(sequences.numel())
        return PoolingPlan(tokens=tokens, sequences=sequences, weights=torch.ones(tokens.numel()), num_sequences=count,
                           one_token=False, places=tokens)
    if pooling in ("lasttoken", "cls"):
        tokens = bounds[1:] - 1 if pooling == "lasttoken" else starts
        sequences, weights = torch.arange(count), torch.ones(count)
    else:
        sequences = torch.repeat_interleave(torch.arange(count), lengths)
        tokens = torch.arange(sequences.numel())
        offsets = tokens - starts[sequences]
        weights = offsets.float() + 1.0 if pooling == "weightedmean" else torch.ones(tokens.numel())
        weights = weights / torch.zeros(count).index_add(0, sequences, weights)[sequences]
    return PoolingPlan(tokens=tokens, sequences=sequences, weights=weights, num_sequences=count,
                       one_token=pooling in ("lasttoken", "cls"))


def text_plan(micro_batch: MicroBatch, pooling: ModelPooling) -> PoolingPlan | None:
    """The plan of a joint model's vectors of whole texts; None of another model."""
    own = next((own for own, joint in JOINT_POOLINGS.items() if joint == pooling), None)
    return None if own is None else pooling_plan(replace(micro_batch, vectors=None, joint=None), own)


def _cls_and_mean(starts: Tensor, lengths: Tensor) -> PoolingPlan:
    """The first token, then the mean, of each text: sequences 2 i and 2 i + 1 of text i."""
    count = lengths.numel()
    texts = torch.repeat_interleave(torch.arange(count), lengths + 1)
    firsts = starts + torch.arange(count)  # where the first token of each text stands among the pooled ones
    is_first = torch.zeros(texts.numel(), dtype=torch.bool).index_fill(0, firsts, True)
    tokens = torch.arange(texts.numel()) - texts - (~is_first).to(torch.int64)
    weights = torch.where(is_first, 1.0, 1.0 / lengths[texts].float())
    return PoolingPlan(tokens=tokens, sequences=2 * texts + (~is_first).to(torch.int64), weights=weights,
                       num_sequences=2 * count, one_token=False, parts=2)


def local_plan(plan: PoolingPlan, chunks: tuple[tuple[int, int], ...]) -> PoolingPlan:
    """The part of a plan, on the CPU, over the tokens [start, stop) of `chunks`, reindexed from 0 in the order of the
    chunks."""
    tokens, sequences, weights, places = [], [], [], []
    local = 0
    for start, stop in chunks:
        low, high = torch.searchsorted(plan.tokens, torch.tensor([start, stop])).tolist()
        tokens.append(plan.tokens[low:high] - start + local)
        sequences.append(plan.sequences[low:high])
        weights.append(plan.weights[low:high])
        places.append(plan.tokens[low:high])
        local += stop - start
    local_sequences, is_sparse = torch.cat(sequences), plan.places is not None
    return PoolingPlan(tokens=torch.cat(tokens), sequences=local_sequences, weights=torch.cat(weights),
                       num_sequences=plan.num_sequences, one_token=plan.one_token, parts=plan.parts,
                       places=torch.cat(places) if is_sparse else None,
                       pieces=pieces_of(local_sequences) if is_sparse else None)


def pieces_of(sequences: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal values: (value, first, one after the last).

    Args:
        sequences: [tokens] int64 on the CPU.
    """
    if not len(sequences):
        return ()
    values, counts = torch.unique_consecutive(sequences, return_counts=True)
    ends = counts.cumsum(0)
    return tuple(zip(values.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))


def pool(hidden: Tensor, plan: PoolingPlan, groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    """Pooled rows, equal on every rank of `groups`.

    Args:
        hidden: [tokens held by this rank, hidden].
        plan: over those tokens.
        groups: groups whose ranks hold different tokens of the same bin. One all-reduce of [rows, hidden] over each,
            with identity backward: every rank's loss gradient is already complete.
    Returns:
        [rows, parts * hidden] float32.
    """
    if plan.one_token:
        rows = hidden.new_zeros(plan.num_sequences, hidden.shape[1], dtype=torch.float32)
        rows = rows.index_copy(0, plan.sequences, hidden.index_select(0, plan.tokens).float())
    else:
        # A weighted sum of rows per bag: half the time and a third of the memory of select, multiply and index_add.
        starts = torch.searchsorted(plan.sequences, torch.arange(plan.num_sequences, device=plan.sequences.device))
        rows = functional.embedding_bag(plan.tokens, hidden.float(), starts, mode="sum",
                                        per_sample_weights=plan.weights)
    for group in groups:
        rows = tensor_parallel.reduce_from_tensor_model_parallel_region(rows, group=group)
    return rows if plan.parts == 1 else rows.view(-1, plan.parts * rows.shape[1])
