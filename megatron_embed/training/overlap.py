"""Correct gradients and parameters while they are communicated behind the computation.

Megatron's DistributedDataParallel does the work: a bucket of gradients is reduced once all of them have been computed,
a bucket of parameters is gathered when the first forward pass comes to it. With two passes per step the gathers belong
to the first pass; the second finds everything in place.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from megatron_embed.platform.compat import DistributedDataParallel


class NoSync:
    """Context in which a chunk sums up gradients and sends none.

    Megatron's own (`DistributedDataParallel.no_sync`) is a generator, and a pipeline's forward-only pass enters it
    without leaving it: it ends when Python collects it, which may be amid the backward passes, and then sends
    unfinished gradients. This one ends when its block does.
    """

    def __init__(self, chunk: DistributedDataParallel) -> None:
        self.groups = _bucket_groups(chunk)

    def __enter__(self) -> None:
        for group in self.groups:
            group.is_last_microbatch = False

    def __exit__(self, *error: object) -> None:
        for group in self.groups:
            group.is_last_microbatch = True


def no_sync_until_last_microbatch(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Make Megatron's schedules reduce gradients after a step's last micro-batch only."""
    contexts = [functools.partial(NoSync, chunk) for chunk in wrapped]
    wrapped[0].config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]


def assert_gathered(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Stop a run whose forward passes used parameters that had not been gathered. For `overlap_param_gather`.

    Megatron waits for a bucket before the call of a module that holds one of its parameters. A module that reads those
    of another would read what they were a step ago.
    """
    for chunk in wrapped:
        for group in _bucket_groups(chunk):
            assert group.param_gather_dispatched and group.param_gather_handle is None, \
                f"{next(iter(group.params)).shape} and others were not gathered before they were used"


def complete_parameters(wrapped: Sequence[torch.nn.Module]) -> None:
    """Bring every rank's parameters up to date now instead of during the next forward pass.

    Called by all ranks before anything but a training step reads parameters: checkpoints, evaluations. With
    `overlap_param_gather` one all-gather of each bucket over its data-parallel group, else nothing.
    """
    for chunk in wrapped:
        if isinstance(chunk, DistributedDataParallel) and chunk.use_forward_hook:
            chunk.start_param_sync(force_sync=True)


def _bucket_groups(chunk: DistributedDataParallel) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
