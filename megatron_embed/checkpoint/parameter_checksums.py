"""Checksums of a model's parameters: the same under every layout, and for each rank's copy, so that a drifted one is
named."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.checkpoint.load import model_state
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.parallel.collectives import gather_objects, sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import (
    MOMENTS,
    DistributedOptimizer,
    MegatronOptimizer,
    ShardedBase,
    is_main_replica,
)

_SAMPLED = 64
"""Elements of each tensor, about, in the sample of every step."""
_FIXED_POINT = 2.0**32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
REPLICATED_NORM = 1e-6
"""Relative difference of the norms above which tensor-parallel ranks' copies count as different: they need not be equal
to the last bit."""


@dataclass(frozen=True, kw_only=True)
class ParameterChecksum:
    """All parameters of the model, each counted once."""

    bits: int
    """Sum of the parameters' bits, read as integers, modulo 2^64: exact."""
    norm: float
    """L2 norm, in float64, without biases: comparable between layouts, whose parameters differ by rounding. The bias of
    a key has no gradient but rounding, by which AdamW moves it at random."""
    drifted: Mapping[int, float]
    """Ranks whose copy of the same parameters is not equal -> norm of the copy; empty if all are."""
    own_norm: float
    """L2 norm of this rank's copy, of all that it holds."""


class ParameterChecksums:
    """Measures the parameters that this rank holds. Made and called by all ranks, once the model is in its buffers.

    Attributes:
        has_norm_weights: whether the weights of the model's norms are trained.
    """

    def __init__(self, models: Sequence[EmbeddingModel], topology: Topology) -> None:
        self._topology = topology
        counted = list(_counted_once(models))
        self._once = [tensor for _, tensor in counted]
        self._normed = [tensor for key, tensor in counted if not key.endswith(".bias")]
        parameters = [parameter.detach() for model in models for parameter in model.parameters()]
        self._device = parameters[0].device
        experts = {id(parameter) for model in models for parameter in model.parameters()
                   if not vars(parameter).get("allreduce", True)}
        marked = [parameter for model in models for parameter in model.parameters()]
        self._dense = [data for data, parameter in zip(parameters, marked, strict=True) if id(parameter) not in experts]
        self._experts = [data for data, parameter in zip(parameters, marked, strict=True) if id(parameter) in experts]
        self._replicated = [data for data, parameter in zip(parameters, marked, strict=True)
                            if id(parameter) not in experts and not vars(parameter).get("tensor_model_parallel")]
        self._samples = _samples(self._dense), _samples(self._experts)
        self._norm_weights = [tensor for key, tensor in counted if key.endswith("norm.weight") or "norm_weight" in key]
        leaders = torch.zeros(topology.world_size, 2, dtype=torch.int64)
        leaders[topology.rank] = torch.tensor([min(dist.get_process_group_ranks(group))
                                               for group in (topology.groups.dp_cp, topology.groups.expt_dp)])
        self._leaders = sum_over(leaders, dist.group.WORLD).unbind(dim=1)
        self.has_norm_weights = any(parameter.requires_grad for model in models
                                    for name, parameter in model.named_parameters() if "norm" in name)

    def __call__(self) -> ParameterChecksum:
        """One all-reduce, over the world, of seven numbers for each rank."""
        groups, world, rank = self._topology.groups, self._topology.world_size, self._topology.rank
        squares = [_square(tensors) for tensors in (self._normed, self._dense + self._experts, self._replicated)]
        own = torch.cat([torch.tensor([_bits(self._once), _bits(self._dense), _bits(self._experts),
                                       *(min(dist.get_process_group_ranks(group))
                                         for group in (groups.dp_cp, groups.expt_dp, groups.tp))]),
                         torch.tensor(squares, dtype=torch.float64).view(torch.int64)])
        table = torch.zeros(world, len(own), dtype=torch.int64)
        table[rank] = own
        table = sum_over(table, dist.group.WORLD)
        once, copies, replicated = table[:, 6:].contiguous().view(torch.float64).unbind(dim=1)
        drifted = _minorities(table[:, 3], table[:, 1]) | _minorities(table[:, 4], table[:, 2])
        for leader in table[:, 5].unique():
            values = replicated[table[:, 5] == leader]
            if float(values.max() - values.min()) > 2 * REPLICATED_NORM * float(values.max()):
                drifted |= set((table[:, 5] == leader).nonzero()[:, 0].tolist())
        return ParameterChecksum(bits=int(table[:, 0].sum()), norm=math.sqrt(float(once.sum())),
                                 own_norm=math.sqrt(squares[1]),
                                 drifted={rank: math.sqrt(float(copies[rank])) for rank in sorted(drifted)})

    def sample(self) -> list[int]:
        """[1 + 2 world] integers that ranks add up, for `of_sample`: some elements of each of this rank's parameters,
        and the weights of the model's norms, of which every layer has some. No communication. The host waits once."""
        world, rank = self._topology.world_size, self._topology.rank
        values = [0] * (1 + 2 * world)
        bits = [_sum_of_bits([torch.cat(views) for views in sample], self._device) for sample in self._samples]
        square = _sum_of_squares(self._norm_weights, self._device)
        *sums, square_bits = torch.stack([*bits, square.view(torch.int64)]).cpu()
        values[0] = round(float(square_bits.view(torch.float64)) * _FIXED_POINT)
        for index, total in enumerate(sums):
            values[1 + index * world + rank] = int(total)
        return values

    def of_sample(self, values: Sequence[int]) -> tuple[float, list[int]]:
        """(L2 norm of the weights of all norms, the ranks whose sample is not equal to its copies')."""
        world, drifted = self._topology.world_size, set[int]()
        bits = torch.tensor(values[1:]).view(2, world)
        for index, leaders in enumerate(self._leaders):
            drifted |= _minorities(leaders, bits[index])
        return math.sqrt(values[0] / _FIXED_POINT), sorted(drifted)


def _samples(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of some elements of each tensor, those of a dtype together."""
    views: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        views.setdefault(tensor.dtype, []).append(tensor.flatten()[:: max(1, tensor.numel() // _SAMPLED)])
    return list(views.values())


def checksums_by_name(models: Sequence[EmbeddingModel]) -> dict[str, tuple[int, float]]:
    """(sum of bits, L2 norm) of every tensor of the model by its key in checkpoints, on every rank. Called by all
    ranks; one all-gather of objects over the world."""
    totals: dict[str, tuple[int, float]] = {}
    own = {key: (_bits([tensor]), _square([tensor])) for key, tensor in _counted_once(models)}
    for part in gather_objects(own, dist.group.WORLD):
        for key, (bits, square) in part.items():
            known = totals.get(key, (0, 0.0))
            totals[key] = (known[0] + bits, known[1] + square)
    return {key: (_signed(bits), math.sqrt(square)) for key, (bits, square) in sorted(totals.items())}


def optimizer_bits(optimizer: MegatronOptimizer, topology: Topology) -> int:
    """Sum of the bits of all moments, modulo 2^64: equal under layouts that divide no tensor. Called by all ranks; one
    all-reduce of a number over the world."""
    total = 0
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) or topology.groups.dp_cp.rank() == 0:
            total += _bits([value for values in part.optimizer.state.values() for name, value in values.items()
                            if name in MOMENTS])
    return int(sum_over(torch.tensor([_signed(total)]), dist.group.WORLD))


def _counted_once(models: Sequence[EmbeddingModel]) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors of checkpoints, of several copies the first."""
    for chunk in model_state(models).values():
        for value in chunk.values():
            if isinstance(value, ShardedBase) and isinstance(value.data, Tensor) and is_main_replica(value.replica_id):
                yield value.key, value.data.detach()


def _bits(tensors: Sequence[Tensor]) -> int:
    """The sum of bits of tensors, modulo 2^64. The host waits once."""
    return int(_sum_of_bits(tensors, tensors[0].device)) if tensors else 0


def _sum_of_bits(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """As `_bits`, in an int64 on the tensors' device, for which the host does not wait."""
    sums = [tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=device)


def _signed(value: int) -> int:
    """The int64 that is equal modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _square(tensors: Sequence[Tensor]) -> float:
    """The sum of squares of tensors. The host waits once."""
    return float(_sum_of_squares(tensors, tensors[0].device)) if tensors else 0.0


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """As `_square`, in a float64 on the tensors' device, for which the host does not wait."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def _minorities(leaders: Tensor, bits: Tensor) -> set[int]:
    """The ranks whose bits are not those of most copies; where no copy is in the majority, all of them."""
    different: set[int] = set()
    for leader in leaders.unique():
        ranks = (leaders == leader).nonzero()[:, 0].tolist()
        values = Counter(bits[ranks].tolist())
        if len(values) > 1:
            common, count = values.most_common(1)[0]
            different |= {rank for rank in ranks if 2 * count <= len(ranks) or int(bits[rank]) != common}
    return different
