"""The objective of an embedding model's configuration; a reranker's is objectives/reranking.py."""

from typing import Any

import torch.distributed as dist

from megatron_embed.config.objective import CONTRASTIVE, DISTILLED_VECTORS, LABELLED_PAIRS
from megatron_embed.config.schema import RunConfig
from megatron_embed.objectives import (
    contrastive,
    embedding_distillation,
    hard_negatives,
    joint,
    labelled_pairs,
    sparse,
)
from megatron_embed.objectives.base import Objective, configured_dims, matryoshka_names
from megatron_embed.objectives.contrastive import Contrastive
from megatron_embed.objectives.embedding_distillation import EmbeddingDistillation
from megatron_embed.objectives.fixed_vectors import FixedVectors
from megatron_embed.objectives.hard_negatives import HardNegatives
from megatron_embed.objectives.joint import JointContrastive
from megatron_embed.objectives.labelled_pairs import LabelledPairs
from megatron_embed.objectives.multi_vector import MultiVectorContrastive, MultiVectorDistillation
from megatron_embed.objectives.replica_split import ReplicaSplit
from megatron_embed.objectives.sparse import SparseContrastive, SparseDistillation
from megatron_embed.parallel.topology import ModelParallelGroups


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the metrics of an embedding model's objective, without building it."""
    dims = matryoshka_names(configured_dims(config))
    regularizers = sparse.NAMES if config.embedding.head == "sparse" else ()
    if config.objective.loss in LABELLED_PAIRS:
        return labelled_pairs.metric_names(config.objective.loss) + dims
    if config.objective.loss == DISTILLED_VECTORS:
        return embedding_distillation.NAMES
    if config.objective.loss not in CONTRASTIVE:
        return hard_negatives.NAMES + dims + regularizers
    scores = joint.names(config.objective) if config.embedding.head == "joint" else ()
    return contrastive.metric_names(config) + regularizers + scores


def build_objective(config: RunConfig, dp_group: dist.ProcessGroup, groups: ModelParallelGroups | None = None,
                    fixed: FixedVectors | None = None) -> Objective[Any]:
    """The objective of `config.objective` for an embedding model.

    Args:
        dp_group: data-parallel ranks, without context parallelism.
        groups: to split a loss over the global batch among the tensor- and context-parallel ranks of a replica, or for
            the shares of the vocabulary of a sparse model; None: each rank computes all of it, with whole vectors.
        fixed: vectors by other models, if the configuration names any.
    """
    if config.objective.loss in LABELLED_PAIRS:
        return LabelledPairs(config, dp_group)
    if config.objective.loss == DISTILLED_VECTORS:
        assert fixed is not None
        return EmbeddingDistillation(config, dp_group, fixed)
    if config.embedding.head == "sparse":
        assert groups is not None, "a sparse model's vectors are divided over the tensor-parallel ranks"
        sparse_class = SparseContrastive if config.objective.loss in CONTRASTIVE else SparseDistillation
        return sparse_class(config, dp_group, groups.tp)
    multi_vector = config.embedding.head == "multi_vector"
    if config.objective.loss not in CONTRASTIVE:
        return MultiVectorDistillation(config, dp_group) if multi_vector else HardNegatives(config, dp_group)
    contrastive_class = MultiVectorContrastive if multi_vector else Contrastive
    if config.embedding.head == "joint":
        contrastive_class = JointContrastive
    if groups is None or groups.tp_cp.size() == 1:
        return contrastive_class(config, dp_group, fixed)
    return ReplicaSplit(contrastive_class(config, groups.tp_dp_cp, fixed), groups.tp_cp, dp_group.size())
