"""The objective that a run's settings ask for."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.config.objective import CONTRASTIVE, PAIRS
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.matryoshka import widths_of
from megatron_embed.parallel.topology import Twins
from megatron_embed.training import contrastive, own_documents, pairs
from megatron_embed.training.contrastive import Contrastive
from megatron_embed.training.learned import LearnedScale
from megatron_embed.training.objective import Objective, width_names
from megatron_embed.training.own_documents import OwnDocuments
from megatron_embed.training.pairs import Pairs
from megatron_embed.training.reranking import Reranking
from megatron_embed.training.sharing import Shared


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the metrics of `build_objective`'s objective, which takes a group of ranks."""
    if config.task == "reranker":
        return Reranking.names
    widths = width_names(widths_of(config.embedding.matryoshka_dims, config.objective.matryoshka_weights))
    if config.objective.loss in PAIRS:
        return pairs.own_names(config.objective.loss) + widths
    if config.objective.loss not in CONTRASTIVE:
        return own_documents.NAMES + widths
    learned = LearnedScale(config).names if config.objective.learnable_temperature else ()
    return contrastive.NAMES + widths + learned


def build_objective(config: RunConfig, dp_group: dist.ProcessGroup, device: torch.device,
                    twins: Twins | None = None) -> Objective[Any]:
    """The objective of `config.objective`.

    Args:
        dp_group: data-parallel ranks, without context parallelism.
        twins: tensor- and context-parallel ranks, to share a loss over the global batch among; null: there are none.
    """
    if config.task == "reranker":
        return Reranking(config.objective.loss, config.reranker, dp_group)
    loss, normalize = config.objective.loss, config.embedding.unit_length
    widths = widths_of(config.embedding.matryoshka_dims, config.objective.matryoshka_weights)
    if loss in PAIRS:
        return Pairs(config.objective, widths, normalize=normalize, dp_group=dp_group)
    if loss not in CONTRASTIVE:
        return OwnDocuments(config.objective, widths, normalize=normalize, dp_group=dp_group, device=device)
    if twins is not None and twins.group.size() == 1:
        twins = None
    objective = Contrastive(
        config.objective, widths, normalize=normalize,
        in_batch=config.data.all_in_batch, num_positives=config.data.num_positives,
        dp_group=dp_group if twins is None else twins.everyone,
        learned=LearnedScale(config) if config.objective.learnable_temperature else None)
    return objective if twins is None else Shared(objective, twins, dp_group.size())
