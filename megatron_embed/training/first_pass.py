"""Micro-batches of the first pass of a step: it keeps no activations, so it can embed several of them as one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_embed.batch import MicroBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.bins import bin_sizes, merge, pad_to_sizes
from megatron_embed.models.families import ModelShape
from megatron_embed.parallel.topology import Topology, token_alignment
from megatron_embed.planning.memory import PIPELINE_FILL, first_pass_micro_batches, grid_of
from megatron_embed.rounding import round_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """How a step's micro-batches are merged for the first pass; equal on all ranks."""

    micro_batches: int
    """At most this many of them become one."""
    fewest: int = 1
    """Micro-batches that are left, if the step has as many."""
    multiple: int = 1
    """Their number is a multiple of it, as that of the step is: the stages of an interleaved pipeline."""
    alignment: int = 1
    """Tokens; every size is a multiple of it."""
    budget: int | None = None
    """Token budget of a micro-batch of the step, for sizes from a short list; None: no budget."""
    uniform_size: bool = False
    """All get the size of the largest, for pipelines."""

    def count(self, micro_batches: int) -> int:
        """Micro-batches of the first pass of a step of `micro_batches`; the same on ranks that have equally many."""
        least = max(-(-micro_batches // self.micro_batches), min(micro_batches, self.fewest))
        return min(micro_batches, round_up(least, self.multiple))

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """The same rows in `count` micro-batches: neighbours are merged, about equally many each. No communication."""
        total, count = len(micro_batches), self.count(len(micro_batches))
        if count == total:
            return tuple(micro_batches)
        bounds = [total * index // count for index in range(count + 1)]
        merged = [merge(micro_batches[start:stop]) for start, stop in pairwise(bounds)]
        if self.budget is not None:
            sizes = bin_sizes(self.budget * self.micro_batches, self.alignment)
        else:
            sizes = sorted({round_up(micro.num_tokens, self.alignment) for micro in merged})
        return pad_to_sizes(merged, sizes, uniform=self.uniform_size)


def build_first_pass(config: RunConfig, shape: ModelShape, topology: Topology) -> FirstPass | None:
    """The first pass of a run's steps by `training.first_pass_micro_batches`; None: it has the micro-batches of the
    second pass. No communication."""
    asked, merged = config.training.first_pass_micro_batches, 1
    if asked != "auto":
        merged = asked
    elif topology.device.type == "cuda":
        merged = first_pass_micro_batches(config, shape, grid_of(config, topology.world_size))
        if config.workload.couples_batch and config.has_dropout:
            logger.info("dropout is on, so the first pass has the micro-batches of the second, which drops the same "
                        "(training.first_pass_micro_batches)")
    if merged == 1:
        return None
    pp = topology.pp_size
    return FirstPass(
        micro_batches=merged, fewest=PIPELINE_FILL * pp if asked == "auto" and pp > 1 else 1,
        multiple=pp if topology.num_model_chunks > 1 else 1, alignment=token_alignment(config.parallel),
        budget=config.training.micro_batch_tokens, uniform_size=pp > 1)
