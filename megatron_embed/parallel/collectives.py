"""Collectives over explicit groups, on tensors and small values."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.errors import PreemptedError, UserError
from megatron_embed.platform import stop_signal as stop

Value = TypeVar("Value")


def gather_padded(rows: Tensor, capacity: int, group: dist.ProcessGroup) -> Tensor:
    """[rows of this rank, ...] -> [ranks, capacity, ...] over `group`, each rank's rows, padded with zeros.

    One all-gather, whatever the number of rows; `capacity` must be the same on all ranks and >= the rows of each.
    """
    padded = rows.new_zeros(capacity, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    if group.size() == 1:
        return padded[None]
    gathered = rows.new_empty(group.size() * capacity, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered.view(group.size(), capacity, *rows.shape[1:])


def scatter_sum(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, capacity, ...] -> [capacity, ...]: this rank's share of the sum over `group`. One reduce-scatter."""
    if group.size() == 1:
        return rows[0]
    share = rows.new_empty(rows.shape[1:])
    dist.reduce_scatter_tensor(share, rows.reshape(-1, *rows.shape[2:]), group=group)
    return share


def sum_over(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise sum of a small tensor over `group`; a new tensor."""
    total = values.clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


class SumOverRanks(torch.autograd.Function):
    """Elementwise sum over a group, by one all-reduce; each rank's gradient of the result is complete, and its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_over(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def send_from_last(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor of the last rank of `group`, on every rank (a pipeline's last stage has the loss)."""
    if group.size() > 1:
        values = values.clone()
        dist.broadcast(values, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return values


def largest(value: int, group: dist.ProcessGroup) -> int:
    """The maximum of an integer over `group`."""
    return largest_of_each([value], group)[0]


def largest_of_each(values: list[int], group: dist.ProcessGroup) -> list[int]:
    """The elementwise maximum of a list of integers over `group`."""
    tensor = torch.tensor(values, dtype=torch.int64)
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def smallest(value: int) -> int:
    """The minimum of an integer over the world."""
    if dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def leave_if_asked() -> None:
    """Within `stop.finishing`, raise PreemptedError on every rank of the world if any rank was asked to stop.

    Elsewhere it does nothing: a rank that is asked to stop ends by itself. Called by all ranks; one small all-reduce
    over the world.
    """
    if stop.held() and smallest(-int(stop.asked())) < 0:
        raise PreemptedError(f"stopped ({stop.reason() or 'another rank was asked to'}) between two batches")


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's position in the group and the number of its ranks; (0, 1) without a group."""
    return (0, 1) if group is None else (group.rank(), group.size())


def gather_objects(value: Value, group: dist.ProcessGroup | None) -> list[Value]:
    """Each rank's value, in rank order, on every rank. One all-gather of objects over the group, if there is one."""
    if group is None or group.size() == 1:
        return [value]
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_to_first(value: Value, group: dist.ProcessGroup | None) -> list[Value] | None:
    """Each rank's value, in rank order, on the group's first rank; None on the others.

    Pickled values go along a binomial tree: no rank is connected to more than log2(ranks) others for it, while gloo's
    own gather connects the first one to all. A rank of the tree holds the values of those behind it for a while.
    """
    values, step = [value], 1
    if group is None:
        return values
    while step < group.size():
        if group.rank() % (2 * step):
            _send(values, group.rank() - step, group)
            return None
        if group.rank() + step < group.size():
            values += _receive(group.rank() + step, group)
        step *= 2
    return values


def scatter_from_first(values: list[Value] | None, group: dist.ProcessGroup) -> Value:
    """This rank's value of those that the group's first rank has for all, in rank order, by the tree of
    `gather_to_first`; None on the other ranks."""
    step = 1 << (group.size() - 1).bit_length() >> 1
    while step:
        if values is not None and values[step:]:
            _send(values[step:], group.rank() + step, group)
            values = values[:step]
        elif group.rank() % (2 * step) == step:
            values = _receive(group.rank() - step, group)
        step //= 2
    assert values is not None
    return values[0]


def _send(values: list[Value], rank: int, group: dist.ProcessGroup) -> None:
    """Send pickled values to a rank of the group, from host memory."""
    dist.send_object_list([values], dst=dist.get_global_rank(group, rank), group=group, device=torch.device("cpu"))


def _receive(rank: int, group: dist.ProcessGroup) -> list[Any]:
    """The values that `_send` sends."""
    received: list[Any] = [None]
    dist.recv_object_list(received, src=dist.get_global_rank(group, rank), group=group, device=torch.device("cpu"))
    values: list[Any] = received[0]
    return values


def broadcast_from_rank0(text: str) -> str:
    """The text of rank 0 of the world, on every rank. One broadcast of an object."""
    values = [text]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_on_all_ranks(error: UserError | None) -> None:
    """Raise, on every rank of the world, the error of the lowest rank that has one; return if none has.

    Called by all ranks; one all-gather of objects over the world.
    """
    gathered: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, error)
    for rank_error in gathered:
        if rank_error is not None:
            raise rank_error
