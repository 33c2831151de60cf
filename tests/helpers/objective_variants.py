"""Every variant of the contrastive objective on rows without a model, over ranks and in one process."""

import dataclasses
import itertools

import torch
import torch.distributed as dist

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.config.schema import DataConfig, EmbeddingConfig, ModelConfig, RunConfig, TrainFile

DIM = 7
QUERIES = 3
MOST_DOCUMENTS = 4
"""Per query."""

def batch_of_rank(rank, ragged, num_positives=1):
    """(embeddings [rows, DIM] float32, batch) of one rank: rows differ in number unless they are all the most.

    Texts are numbers below 3 (queries) and 5 (documents), so that they repeat within and over ranks.
    """
    generator = torch.Generator().manual_seed(100 + rank)
    queries = QUERIES - rank % 2 if ragged else QUERIES
    sizes = torch.randint(1, MOST_DOCUMENTS + 1, (queries,), generator=generator) if ragged else torch.full(
        (queries,), MOST_DOCUMENTS)
    documents = int(sizes.sum())
    embeddings = torch.nn.functional.normalize(torch.randn(queries + documents, DIM, generator=generator), dim=1)
    first = sizes.cumsum(0) - sizes
    document_ids = torch.randint(0, 5, (documents,), generator=generator)
    others = torch.randint(0, 5, (rank,), generator=generator)  # second positives of the first query
    batch = EmbedBatch(
        micro_batches=(), num_queries=queries, num_documents=documents, positive_index=first,
        document_query=torch.repeat_interleave(torch.arange(queries), sizes),
        is_positive=torch.cat([torch.arange(size) < num_positives for size in sizes.tolist()]),
        query_ids=torch.randint(0, 3, (queries,), generator=generator), document_ids=document_ids,
        positive_query=torch.tensor([*range(queries), *[0] * rank]),
        positive_ids=torch.cat([document_ids[first], others]), num_truncated=0,
        capacity=Capacity(QUERIES, QUERIES * MOST_DOCUMENTS, QUERIES * 2), micro_capacity=Capacity(0, 0, 0))
    return embeddings, batch


def config_of(objective=None, data=None, dims=(), precision=("float32",)):
    return RunConfig(model=ModelConfig(path="none"), objective=ObjectiveConfig(**objective or {}),
                     data=DataConfig(**data or {}),
                     embedding=EmbeddingConfig(matryoshka_dims=dims, precision=precision))

ALL = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")
VARIANTS = [({"temperature": 0.1, **objective}, *others) for objective, *others in [
    ({"directions": ALL, "mask_duplicates": True, "hard_negatives": "private"}, {}, ()),
    ({"directions": ALL, "mask_margin": 0.1}, {"num_positives": 2}, (7, 4)),
    ({"directions": ("query_to_document", "document_to_query"), "partition": "per_direction"}, {}, (5, 2)),
    ({"mask_margin": 0.2, "mask_margin_type": "relative", "mask_duplicates": True}, {"num_positives": 2}, ()),
    ({"hardness": "hard_negatives", "hardness_strength": 5.0, "matryoshka_weights": (1.0, 0.3)}, {}, (7, 3)),
    ({"directions": ("query_to_document", "query_to_query")},
     {"train": (TrainFile(path="x", in_batch_negatives=False),), "num_negatives": 3}, ()),
    ({"loss": "sigmoid", "bias": -3.0, "mask_duplicates": True, "hard_negatives": "private"}, {}, (7, 3)),
    ({"directions": ALL, "mask_duplicates": True, "precision_weights": (1.0, 0.5, 0.7)}, {"num_positives": 2}, (),
     ("float32", "int8", "binary")),
    ({"mask_margin": 0.1, "matryoshka_weights": (1.0, 0.3)}, {}, (7, 3), ("binary", "int8")),
    ({"loss": "sigmoid", "bias": -3.0}, {}, (), ("binary",))]]

def variant_batch(rank, variant):
    """The same rows, every other query alone where some data set is."""
    embeddings, batch = batch_of_rank(rank, ragged=True, num_positives=variant[1].get("num_positives", 1))
    alone = torch.arange(batch.num_queries) % 2 == 0 if "train" in variant[1] else None
    return embeddings, dataclasses.replace(batch, in_batch=None if alone is None else ~alone)


def together(parts):
    """The rows of several ranks as those of one."""
    batches = [batch for _, batch in parts]
    queries = list(itertools.accumulate((batch.num_queries for batch in batches), initial=0))
    documents = list(itertools.accumulate((batch.num_documents for batch in batches), initial=0))

    def joined(name, shifts=None):
        values = [getattr(batch, name) for batch in batches]
        if values[0] is None:
            return None
        return torch.cat([value + shift for value, shift in zip(values, shifts or [False] * len(values), strict=False)])

    embeddings = torch.cat([part[: batch.num_queries] for part, batch in parts]
                           + [part[batch.num_queries:] for part, batch in parts])
    count = len(batches)
    return embeddings, dataclasses.replace(
        batches[0], num_queries=queries[-1], num_documents=documents[-1],
        positive_index=joined("positive_index", documents), document_query=joined("document_query", queries),
        positive_query=joined("positive_query", queries), is_positive=torch.cat([b.is_positive for b in batches]),
        query_ids=joined("query_ids", [0] * count), document_ids=joined("document_ids", [0] * count),
        positive_ids=joined("positive_ids", [0] * count),
        in_batch=None if batches[0].in_batch is None else torch.cat([batch.in_batch for batch in batches]),
        capacity=Capacity(queries[-1], documents[-1], sum(len(batch.positive_ids) for batch in batches)))


def variants_on_ranks(world):
    """[(metrics, gradient in the order of `together`)] of every variant: this rank's share, or all of it."""
    from megatron_embed.objectives.build import build_objective

    results = []
    for variant in VARIANTS:
        parts = [variant_batch(rank, variant) for rank in range(world)]
        rows, batch = together(parts) if dist.get_world_size() == 1 else parts[dist.get_rank()]
        objective = build_objective(config_of(*variant), dist.group.WORLD)
        result = objective(rows, batch, total=6.0)
        results.append((result.sums.metrics(), result.embeddings, batch.num_queries))
    return results
