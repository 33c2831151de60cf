"""The distributed optimizer's state as parts of whole tensors: each rank saves and loads only the part that it owns.

Megatron's distributed optimizer (ZeRO-1, Rajbhandari et al. 2020, arXiv:1910.02054) gives a data-parallel rank a range
of elements of each parameter, in row-major order. Such a range is cut here into at most `2 * dimensions - 1` boxes (the
end of a row, whole rows, the beginning of a row), and each box is declared with its place in the whole tensor, which
torch's checkpoint reader can map to any other division. So a save gathers nothing and a load reads only what it needs,
and what lies on the disk has the keys and shapes of Megatron's `fully_reshardable` checkpoints, which gather: either
reads the other's.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_embed.platform.adamw_8bit import AdamW8bit
from megatron_embed.platform.compat import (
    MOMENTS,
    DistributedOptimizer,
    HybridDeviceOptimizer,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
    nested_values,
)

PREFIX = "optimizer.state"
"""Beginning of the keys, before the name of a state and the parameter's own key."""
MAIN = "param"
"""Megatron's name of the main parameter, in float32."""
STATES = (MAIN, *MOMENTS)
"""Megatron's names of what the optimizer holds of a parameter."""

Declarations = Mapping[int, ShardedBase]
"""The model's sharded tensors by the `id` of the parameter."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The elements of a parameter, in row-major order, whose state this rank has."""

    parameter: Tensor
    start: int
    stop: int


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that together are the elements `start` to `stop` of a row-major tensor, in order."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        first = last = start // row  # the range lies within this row
        edges = [(first, start, stop)]
    else:
        edges = [(first - 1, start, first * row), (last, last * row, stop)]
    for index, (at, low, high) in enumerate(edges):
        if index == 1 and first < last:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
        if low < high:
            for offsets, sizes in boxes(shape[1:], low - at * row, high - at * row):
                yield (at, *offsets), (1, *sizes)


def owned_slices(optimizer: DistributedOptimizer) -> Iterator[Slice]:
    """The slices of this rank, in the order of Megatron's buffers."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield Slice(parameter=parameter, start=ranges["param"].start, stop=ranges["param"].end)


def slices_to_save(optimizer: DistributedOptimizer, declared: Declarations) -> list[ShardedTensor]:
    """The state of this rank's slices, without those that a tensor- or pipeline-parallel rank before it also has.

    The tensors are views of the state itself. What the state holds in another dtype is copied to host memory, each part
    to a storage of its own: Megatron's writer copies a part of a storage once more. No communication.
    """
    copied = _in_another_dtype(optimizer)
    tensors = []
    for owned in owned_slices(optimizer):
        values = _states_of(optimizer, owned.parameter)
        for name in STATES:
            for tensor in _placed(name, owned, values[name].detach(), declared):
                if is_main_replica(tensor.replica_id):
                    if name in copied:
                        tensor.data = tensor.data.to("cpu", copy=True)
                    tensors.append(tensor)
    return tensors


class SliceRestore:
    """The state of this rank's slices on its way from a checkpoint: loaded to host memory, then given to the optimizer.

    Attributes:
        tensors: to load.
    """

    def __init__(self, optimizer: DistributedOptimizer, declared: Declarations) -> None:
        self._optimizer = optimizer
        self._values: list[tuple[Slice, dict[str, Tensor]]] = []
        self.tensors: list[ShardedTensor] = []
        for owned in owned_slices(optimizer):
            values = {name: torch.empty(owned.stop - owned.start) for name in STATES}
            self._values.append((owned, values))
            for name, value in values.items():
                self.tensors += _placed(name, owned, value, declared)

    def take_main_parameters_from_model(self) -> None:
        """Load none, because the checkpoint has none: it is of a model in float32."""
        self.tensors = [tensor for tensor in self.tensors if not tensor.key.startswith(f"{PREFIX}.{MAIN}.")]
        for _, values in self._values:
            del values[MAIN]

    def load(self) -> None:
        """Give the optimizer what was loaded, once the model has its parameters. No communication."""
        with torch.no_grad():
            for owned, values in self._values:
                own = owned.parameter.detach().view(-1)[owned.start:owned.stop].float()
                self._optimizer._set_main_param_and_optimizer_states(owned.parameter, {MAIN: own, **values})
                if isinstance(self._optimizer.optimizer, AdamW8bit):
                    main = self._optimizer._get_main_param_and_optimizer_states(owned.parameter)[MAIN]
                    self._optimizer.optimizer.load_moments(main, values)
        if isinstance(self._optimizer.optimizer, HybridDeviceOptimizer):
            self._optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _in_another_dtype(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    """The STATES that `_states_of` converts to float32, instead of returning the state itself."""
    if isinstance(optimizer.optimizer, AdamW8bit):
        return MOMENTS
    is_aware = (optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                and not isinstance(optimizer.optimizer, HybridDeviceOptimizer))
    return STATES if is_aware else ()


def _states_of(optimizer: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Main parameter and moments of this rank's slice of a parameter, flat, by STATES."""
    values: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    if isinstance(optimizer.optimizer, AdamW8bit):
        return {MAIN: values[MAIN], **optimizer.optimizer.moments(values[MAIN])}
    return values


def _placed(name: str, owned: Slice, values: Tensor, declared: Declarations) -> list[ShardedTensor]:
    """A state `[stop - start]` of a slice as boxes with their places in the whole tensors of the checkpoint."""
    tensors = []
    for part, first in _parts(declared[id(owned.parameter)]):
        low = max(owned.start, first)
        high = max(low, min(owned.stop, first + math.prod(part.local_shape)))
        stacked, outer = (1,) * part.prepend_axis_num, part.prepend_axis_num
        for offsets, sizes in boxes(part.local_shape, low - first, high - first) if low < high else ():
            count = math.prod(sizes)
            global_offset = (*part.global_offset[:outer],
                     *(base + offset for base, offset in zip(part.global_offset[outer:], offsets, strict=True)))
            tensors.append(ShardedTensor(
                key=f"{PREFIX}.{name}.{part.key}",
                data=values[low - owned.start:low - owned.start + count].view(*stacked, *sizes), dtype=values.dtype,
                local_shape=(*stacked, *sizes), global_shape=part.global_shape, global_offset=global_offset,
                axis_fragmentations=None,  # an irregular grid
                replica_id=part.replica_id[:2],  # pipeline, tensor; the slices of data-parallel ranks differ
                allow_shape_mismatch=part.allow_shape_mismatch))
            low += count
    return tensors


def _parts(declaration: ShardedBase) -> Iterator[tuple[ShardedTensor, int]]:
    """(sharded tensor, its first element within the parameter) of what a parameter is stored as: itself, or the halves
    of a gated MLP's first matrix, each of which tensor parallelism splits."""
    if not isinstance(declaration, ShardedTensorFactory):
        yield declaration, 0
        return
    shape_alone = torch.empty_like(declaration.data, device="meta")
    for part in nested_values(replace(declaration, data=shape_alone).build()):
        assert part.data.is_contiguous() and part.data._base is not None, f"{part.key} is not a view of the parameter"
        yield part, part.data.storage_offset()
