"""The objective that a run's settings ask for."""

from typing import Any

import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from megatron_embed.training.contrastive import InfoNCE
from megatron_embed.training.objective import Objective
from megatron_embed.training.reranking import Reranking


def build_objective(config: RunConfig, dp_group: dist.ProcessGroup) -> Objective[Any]:
    """The objective of `config.objective` over the ranks of `dp_group`: data-parallel ranks, without context."""
    if config.task == "reranker":
        return Reranking(config.objective.loss, config.reranker, dp_group)
    return InfoNCE(config.objective, dp_group)
