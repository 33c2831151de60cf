"""Copies between host and device, several tensors in one: to the device asynchronously, to the host with one wait."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_embed.rounding import round_up

Value = TypeVar("Value")

ALIGNMENT = 16
"""Bytes; a multiple of every element's size, as views of the packed buffer need."""


def copy_to_device(value: Value, device: torch.device) -> Value:
    """The value with all of its host tensors on `device`; on a CPU the value itself.

    On a GPU they are packed into one pinned buffer, one asynchronous copy is started, and the results are views of the
    copy. Work on the current stream that uses them comes after the copy; a pinned buffer is used again only then.

    Args:
        value: a tensor, or tuples and dataclasses that contain some, nested in each other; all else stays as it is. A
            tensor that is contained twice is copied once.
    """
    if device.type == "cpu":
        return value
    tensors = {id(tensor): tensor for tensor in _tensors(value)}
    starts, size = {}, 0
    for key, tensor in tensors.items():
        starts[key] = size
        size += round_up(tensor.nbytes, ALIGNMENT)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for key, tensor in tensors.items():
        _view(packed, starts[key], tensor).copy_(tensor)
    moved = packed.to(device, non_blocking=True)
    return _replaced(value, {key: _view(moved, starts[key], tensor) for key, tensor in tensors.items()})


def copy_to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Numbers of one device, in float64 on the CPU: one copy, for which the host waits until all work is done."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return tuple(tensor.double() for tensor in tensors)
    packed = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu()
    parts = packed.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def _view(packed: Tensor, start: int, tensor: Tensor) -> Tensor:
    """The bytes of `packed` that belong to a tensor, in its dtype and shape."""
    return packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))


def _replaced(value: Any, copies: dict[int, Tensor]) -> Any:
    """The value with each tensor replaced by its copy; `copies`: by the tensor's id."""
    if isinstance(value, Tensor):
        return copies[id(value)]
    if isinstance(value, tuple):
        return tuple(_replaced(part, copies) for part in value)
    if not dataclasses.is_dataclass(value):
        return value
    replaced = copy.copy(value)
    for name, part in vars(value).items():
        object.__setattr__(replaced, name, _replaced(part, copies))  # also if it is frozen
    return replaced
