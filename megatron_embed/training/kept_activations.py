"""Activations that the second pass of a step takes from the first instead of computing them again.

A micro-batch of the first pass that runs with a graph needs no forward pass in the second. The first micro-batches of a
step are the ones: their backward passes come first, so that their activations are gone before others are computed, and
a step with k of them needs the memory of k micro-batches, not of k + 1. Every micro-batch keeps its place in the order
of forward and of backward passes, so that gradients, the random numbers of dropout and a router's statistics are those
of two whole passes, bit for bit; only a first pass that embeds several micro-batches as one rounds differently.
"""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_embed.batch import MicroBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.parallel.collectives import gather_objects, largest
from megatron_embed.parallel.topology import Topology
from megatron_embed.planning.advice import adapted_linears
from megatron_embed.planning.memory import (
    GIB,
    RESERVE_BYTES,
    SHARE_FOR_KEPT,
    first_pass_micro_batches,
    grid_of,
    kept_tokens,
    stage_memory,
)
from megatron_embed.platform import free_memory

logger = logging.getLogger(__name__)

SHARE_OF_HOST = 0.5
"""Share of a host's available memory that CPU ranks may fill with activations; the rest is for other programs."""


@dataclass(frozen=True, kw_only=True)
class KeptActivations:
    """Which micro-batches of a step keep their activations; equal on all ranks."""

    micro_batches: int | None
    """At most so many; None: any number."""
    tokens: int | None = None
    """At most so many of a data-parallel rank, padding included; None: any number."""

    def count(self, micro_batches: Sequence[MicroBatch], group: dist.ProcessGroup) -> int:
        """The number of the first micro-batches of a step that keep their activations, equal on all ranks of `group`.

        Args:
            group: the data-parallel group, whose ranks have equally many micro-batches but other numbers of tokens;
                with a limit in tokens, one small all-reduce.
        """
        most = len(micro_batches) if self.micro_batches is None else min(self.micro_batches, len(micro_batches))
        if self.tokens is None:
            return most
        total, fitting = 0, 0
        for micro in micro_batches[:most]:
            total += micro.token_ids.numel()
            fitting += total <= self.tokens
        return -largest(-fitting, group)


def build_kept_activations(config: RunConfig, shape: ModelShape, topology: Topology) -> KeptActivations | None:
    """The activations that steps keep by `training.keep_activations`; None: none. Says what `auto` found.

    Called by all ranks; `auto` gathers each rank's free memory over the world.

    Args:
        config: the run's, with the adapters of its model in section `lora`.
    """
    asked = config.training.keep_activations
    if asked != "auto":
        return KeptActivations(micro_batches=asked) if asked else None
    if not config.workload.couples_batch:
        return None
    reason = why_not(config, shape, topology)
    if reason is not None:
        logger.info("training.keep_activations = auto keeps none: %s", reason)
        return None
    grid, spare = grid_of(config, topology.world_size), spare_memory(config, shape, topology)
    tokens = kept_tokens(config, shape, grid, spare, adapted_linears(config, shape),
                         on_cpu=topology.device.type == "cpu")
    logger.info("training.keep_activations = auto: %.1f GiB of every rank hold the activations of %s tokens, the first "
                "%d of the %d micro-batches of a step if all texts have their maximum length", spare / GIB,
                f"{tokens:,}", min(tokens // grid.micro_batch_tokens, grid.num_microbatches), grid.num_microbatches)
    return KeptActivations(micro_batches=None, tokens=tokens) if tokens else None


def why_not(config: RunConfig, shape: ModelShape, topology: Topology) -> str | None:
    """The reason why `auto` keeps no activations of this run, whatever the memory; None: it may."""
    if topology.pp_size > 1:
        return "a pipeline computes every micro-batch again"
    merged = topology.device.type == "cuda" and first_pass_micro_batches(config, shape, grid_of(
        config, topology.world_size)) > 1
    if config.training.deterministic and merged:
        return ("training.deterministic is on, and free memory would decide which micro-batches are embedded as one; "
                "set training.first_pass_micro_batches to 1")
    return None


def spare_memory(config: RunConfig, shape: ModelShape, topology: Topology) -> int:
    """Bytes that the rank with least memory has left for activations to be kept, >= 0.

    By the plan of the run: parameters, gradients, optimizer state and the activations of one more micro-batch come
    first. On GPUs, a share of the whole memory less that; on CPU ranks, where the parameters are in memory by now, a
    share of what is available on the host, divided by its ranks, less what is still to come.
    """
    planned = stage_memory(config, shape, grid_of(config, topology.world_size), 0,
                           adapted_linears(config, shape))
    if topology.device.type == "cuda":
        total, obtainable = free_memory.gpu_bytes(topology.device)
        # What the driver and the communicators hold is in the plan's reserve.
        capacity = total if obtainable >= total - RESERVE_BYTES else obtainable
        own = SHARE_FOR_KEPT * capacity - planned.total
        return max(0, int(min(gather_objects(own, dist.group.WORLD))))
    still_to_come = planned.optimizer + planned.host + planned.save + planned.loss + planned.activations
    hosts = gather_objects((socket.gethostname(), free_memory.host_bytes()), dist.group.WORLD)
    names = [name for name, _ in hosts]
    return max(0, int(min(SHARE_OF_HOST * free / names.count(name) for name, free in hosts)) - still_to_come)
