"""The objective that a run's settings ask for."""

from typing import Any

import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from megatron_embed.training.contrastive import InfoNCE
from megatron_embed.training.objective import Objective


def build_objective(config: RunConfig, dp_group: dist.ProcessGroup) -> Objective[Any]:
    """The objective of `config.objective` over the ranks of `dp_group`: data-parallel ranks, without context."""
    return InfoNCE(config.objective, dp_group)
