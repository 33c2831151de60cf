"""Relative position bias of T5 (Raffel et al. 2020, arXiv:1910.10683): a number per head, added to the score of a query
and a key, for each bucket of their distance.

All layers share it. Every pipeline stage has a copy: gradients of the copies are summed over the pipeline before they
are reduced over data-parallel ranks (`sum_over_copies`), so the copies stay equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.models.families import ModelShape, RelativePositions
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import make_tp_sharded_tensor_for_checkpoint, tensor_parallel


def distance_buckets(distance: Tensor, positions: RelativePositions) -> Tensor:
    """[...] int64 key position minus query position -> its bucket, int64.

    Half of the buckets are for keys behind the query. Of either half, the first half holds one distance each, the rest
    logarithmically more, the last all from `max_distance` on.
    """
    half = positions.num_buckets // 2
    exact = half // 2
    steps = distance.abs()
    # In float32 and in this order as in Transformers: at the border of two buckets rounding decides.
    growth = torch.log(steps.float() / exact) / math.log(positions.max_distance / exact) * (half - exact)
    # Of distance 0 the logarithm is not finite; it is among the exact ones.
    larger = (exact + growth.clamp(min=0.0).to(torch.int64)).clamp(max=half - 1)
    return torch.where(steps < exact, steps, larger) + half * (distance > 0)


@dataclass(frozen=True, kw_only=True)
class HeadBias:
    """The bias of some heads."""

    positions: RelativePositions
    weight: Tensor
    """[buckets, heads]"""

    def share_of(self, group: dist.ProcessGroup) -> "HeadBias":
        return HeadBias(positions=self.positions, weight=self.weight.chunk(group.size(), dim=1)[group.rank()])

    def scores(self, distance: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """[segments, queries, keys] int64 key position minus query position -> [segments, heads, queries, keys],
        whatever queries and keys are."""
        buckets = distance_buckets(distance, self.positions)
        return torch.nn.functional.embedding(buckets, self.weight).permute(0, 3, 1, 2)


class RelativeBias(torch.nn.Module):
    """weight [buckets, heads/tp]: every tensor-parallel rank has the columns of its heads; uninitialized."""

    def __init__(self, shape: ModelShape, topology: Topology, *, copy: int) -> None:
        """`copy`: 0 on the first pipeline stage, another number on each further one."""
        super().__init__()
        assert shape.relative_positions is not None
        self.positions, self.group, self.copy = shape.relative_positions, topology.groups.tp, copy
        self.weight = torch.nn.Parameter(torch.empty(self.positions.num_buckets,
                                                     shape.num_attention_heads // topology.tp_size))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        self.weight.shared = copy > 0  # type: ignore[attr-defined]  # counted once in the gradient norm

    def share_of(self, group: dist.ProcessGroup) -> "HeadBias":
        """The bias of this rank's share of the heads."""
        return HeadBias(positions=self.positions, weight=self.weight).share_of(group)

    def scores(self, distance: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """See HeadBias."""
        return HeadBias(positions=self.positions, weight=self.weight).scores(distance, query, key)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; of several copies the first stage's is saved."""
        assert metadata is not None
        key = f"{prefix}weight"
        return {key: make_tp_sharded_tensor_for_checkpoint(
            self.weight, key, 1, prepend_offsets=sharded_offsets, tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"], replica_id=(self.copy, 0, metadata["dp_cp_group"].rank()))}


class PositionBias(Protocol):
    """What is added to attention scores."""

    def share_of(self, group: dist.ProcessGroup) -> "PositionBias":
        """That of this rank's share of the heads, which the ranks of `group` divide."""

    def scores(self, distance: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """[segments or 1, heads/tp, queries, keys].

        Args:
            distance: [segments or 1, queries, keys] int64, key position minus query position.
            query: [segments, heads/tp, queries, head_dim], as `key` with its keys.
        """


def sum_over_copies(copies: Sequence[torch.nn.Module], pipeline: dist.ProcessGroup) -> None:
    """Give the parameters of each copy the sum of all copies' gradients. Called by all ranks after a step's backward
    passes.

    An all-reduce of each parameter's float32 gradient over the pipeline.

    Args:
        copies: those of this rank's model chunks.
    """
    for parameters in zip(*(copy.parameters() for copy in copies), strict=True):
        gradients: list[Tensor] = [vars(parameter)["main_grad"] for parameter in parameters]
        total = torch.stack(gradients).sum(dim=0)
        if pipeline.size() > 1:
            dist.all_reduce(total, group=pipeline)
        for gradient in gradients:
            gradient.copy_(total)
