"""Messages between the ranks of a save or load, along a tree.

torch.distributed.checkpoint gathers every rank's plan and results on rank 0 and scatters the answers (utils.py,
_DistWrapper). With gloo that connects rank 0 to every other rank: as many open files as there are ranks, beside those
of the run's store, which rank 0 usually hosts too.
"""

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_embed.parallel.collectives import gather_to_first, scatter_from_first

_GATHER, _SCATTER = _DistWrapper.gather_object, _DistWrapper.scatter_object


def use_trees() -> None:
    """From now on, saves and loads of this process talk along a tree."""
    _DistWrapper.gather_object, _DistWrapper.scatter_object = _gather, _scatter  # type: ignore[method-assign]


def _gather(self: _DistWrapper, value: Any) -> list[Any] | None:
    if not self.use_dist or self.coordinator_rank:
        return _GATHER(self, value)
    return gather_to_first(value, self.group or dist.group.WORLD)


def _scatter(self: _DistWrapper, values: list[Any] | None) -> Any:
    if not self.use_dist or self.coordinator_rank:
        return _SCATTER(self, values)
    return scatter_from_first(values, self.group or dist.group.WORLD)
