"""The objective over ranks: one process's loss and gradient, by one gather and one reduce-scatter of embeddings."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_embed.batch import Capacity, EmbedBatch
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.config.schema import DataConfig, EmbeddingConfig, ModelConfig, RunConfig, TrainFile
from megatron_embed.losses.info_nce import info_nce
from tests.ranks import run_on_ranks
from tests.toys import layout, run_config, save_model
from tests.training.exactness import ROWS, build, counted_step, objective_settings

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


def config_of(objective=None, data=None, dims=()):
    return RunConfig(model=ModelConfig(path="none"), objective=ObjectiveConfig(**objective or {}),
                     data=DataConfig(**data or {}), embedding=EmbeddingConfig(matryoshka_dims=dims))


def objective_on_rank(ragged, masked, total):
    from megatron_embed.objectives.build import build_objective

    embeddings, batch = batch_of_rank(dist.get_rank(), ragged)
    objective = build_objective(config_of({"temperature": 0.1, "mask_duplicates": masked}), dist.group.WORLD,
                                torch.device("cpu"))
    found = objective(embeddings, batch, total=total)
    return found.sums, found.embeddings


def whole_mask(batches, positive):
    """[queries, candidates] of all ranks, by a loop over the texts."""
    texts = torch.cat([batch.document_ids for batch in batches]).tolist()
    queries = torch.cat([batch.query_ids for batch in batches]).tolist()
    given = {(int(batch.query_ids[row]), int(text)) for batch in batches
             for row, text in zip(batch.positive_query, batch.positive_ids, strict=True)}
    return torch.tensor([[(query, text) in given and column != at for column, text in enumerate(texts)]
                         for query, at in zip(queries, positive.tolist(), strict=True)])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_agree_with_one_process(world_size, ragged, masked):
    parts = [batch_of_rank(rank, ragged) for rank in range(world_size)]
    counts = [batch.num_documents for _, batch in parts]
    assert (len(set(counts)) > 1) == (ragged and world_size > 1)
    before = [sum(counts[:rank]) for rank in range(world_size)]
    leaves = [embeddings.double().requires_grad_() for embeddings, _ in parts]
    query = torch.cat([leaf[:batch.num_queries] for leaf, (_, batch) in zip(leaves, parts, strict=True)])
    document = torch.cat([leaf[batch.num_queries:] for leaf, (_, batch) in zip(leaves, parts, strict=True)])
    positive = torch.cat([batch.positive_index + start for (_, batch), start in zip(parts, before, strict=True)])
    excluded = whole_mask([batch for _, batch in parts], positive) if masked else None
    loss = info_nce(query, document, positive, 0.1, excluded)
    unmasked = info_nce(query, document, positive, 0.1)
    assert loss > 0.3
    assert not masked or loss < unmasked - 1e-3
    results = run_on_ranks(objective_on_rank, world_size, ragged, masked, len(query))
    pairs, hidden = len(query) * len(document), 0 if excluded is None else int(excluded.sum())
    for (sums, gradient), expected in zip(results, torch.autograd.grad(loss, leaves), strict=True):
        metrics = sums.metrics()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics["negatives_per_query"] == (pairs - hidden) / len(query) - 1
        assert metrics["masked_fraction"] == hidden / (pairs - len(query))
        assert expected.norm() > 0.01
        assert (gradient.double() - expected).norm() <= 1e-5 * expected.norm()


ALL = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")
VARIANTS = [({"temperature": 0.1, **objective}, data, dims) for objective, data, dims in [
    ({"directions": ALL, "mask_duplicates": True, "hard_negatives": "private"}, {}, ()),
    ({"directions": ALL, "mask_margin": 0.1}, {"num_positives": 2}, (7, 4)),
    ({"directions": ("query_to_document", "document_to_query"), "partition": "per_direction"}, {}, (5, 2)),
    ({"mask_margin": 0.2, "mask_margin_type": "relative", "mask_duplicates": True}, {"num_positives": 2}, ()),
    ({"hardness": "hard_negatives", "hardness_strength": 5.0, "matryoshka_weights": (1.0, 0.3)}, {}, (7, 3)),
    ({"directions": ("query_to_document", "query_to_query")},
     {"train": (TrainFile(path="x", in_batch_negatives=False),), "num_negatives": 3}, ()),
    ({"loss": "sigmoid", "bias": -3.0, "mask_duplicates": True, "hard_negatives": "private"}, {}, (7, 3))]]


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

    found = []
    for variant in VARIANTS:
        parts = [variant_batch(rank, variant) for rank in range(world)]
        rows, batch = together(parts) if dist.get_world_size() == 1 else parts[dist.get_rank()]
        objective = build_objective(config_of(*variant), dist.group.WORLD, torch.device("cpu"))
        result = objective(rows, batch, total=6.0)
        found.append((result.sums.metrics(), result.embeddings, batch.num_queries))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_variant_is_the_same_over_ranks(world_size):
    (whole,), parts = run_on_ranks(variants_on_ranks, 1, world_size), run_on_ranks(variants_on_ranks, world_size,
                                                                                   world_size)
    for number, (metrics, gradient, _) in enumerate(whole):
        shares = [part[number] for part in parts]
        ours = torch.cat([rows[:queries] for _, rows, queries in shares]
                         + [rows[queries:] for _, rows, queries in shares])
        assert gradient.norm() > 0.01
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm(), VARIANTS[number]
        for share, _, _ in shares:
            assert share == pytest.approx(metrics, rel=1e-5), VARIANTS[number]
        dims = VARIANTS[number][2]
        weights = VARIANTS[number][0].get("matryoshka_weights", (1.0,) * len(dims))
        if dims:
            parts_of_loss = [metrics[f"loss@{dim}"] * weight for dim, weight in zip(dims, weights, strict=True)]
            assert metrics["loss"] == pytest.approx(sum(parts_of_loss), rel=1e-6)
    assert any(metrics["masked_fraction"] > 0.05 for metrics, *_ in whole)


def collectives_of_step(config):
    return [(name, elements) for name, elements, _ in counted_step(*build(config))]


@pytest.mark.parametrize("masked, more", [(False, False), (True, False), (True, True)])
def test_one_gather_and_one_reduce_scatter_per_step(tmp_path, masked, more):
    settings = {"directions": ("query_to_document", "query_to_query", "document_to_document")} if more else {}
    directory = save_model(tmp_path / "model", "bert", tokenizer=True)
    hidden, capacity = 32, ROWS // 2 * 2
    for micro_batch_size in (6, 3, 1):
        config = run_config(directory, parallel=layout(),
                            objective=objective_settings(mask_duplicates=masked, **settings),
                            matryoshka_dims=(32, 8) if more else (),
                            distributed=False, training={"global_batch_size": ROWS,
                                                         "micro_batch_size": micro_batch_size})
        for calls in run_on_ranks(collectives_of_step, 2, config):
            gathers = [elements for name, elements in calls if name in ("all_gather_into_tensor", "all_gather")]
            scatters = [elements for name, elements in calls if name in ("reduce_scatter_tensor", "reduce_scatter")]
            # Of each rank: its numbers of documents, queries and positives; with a mask hashes of documents, queries
            # and of each positive with its query; with more directions each document's query and whether it is a
            # positive; then the rows.
            numbers = 3 + (capacity + 3 * (ROWS // 2) if masked else 0) + (2 * capacity if more else 0)
            rows = capacity + (ROWS // 2 if more else 0)
            assert sorted(gathers) == [2 * numbers, 2 * rows * hidden]
            assert scatters == [2 * rows * hidden]
            # The sums of the step, and the gradient buffer of the parameters.
            others = sorted(elements for name, elements in calls if name in ("all_reduce", "broadcast"))
            assert others[0] == (18 if more else 14)
            assert others[1] > 30522 * hidden
            assert len(others) == 2


def test_metrics_are_means_over_the_batch():
    from megatron_embed.objectives.base import Sums

    values = torch.tensor([[8.0, 4.0], [10.0, 40.0], [0.0, 0.0]], dtype=torch.float64)
    assert Sums(names=("loss", "masked_fraction", "of_nothing"), values=values).metrics() == {
        "loss": 2.0, "masked_fraction": 0.25}


def gathered(rows_by_rank, capacity):
    from megatron_embed.parallel.collectives import gather_padded, largest, scatter_sum, send_from_last, sum_over

    rank, group = dist.get_rank(), dist.group.WORLD
    rows = torch.full((rows_by_rank[rank], 2), float(rank + 1))
    everything = gather_padded(rows, capacity, group)
    mine = scatter_sum(everything * (rank + 1), group)
    total = torch.tensor([float(rank)])
    return SimpleNamespace(everything=everything, mine=mine, total=sum_over(total, group), untouched=total,
                           last=send_from_last(torch.tensor([float(rank)]), group), largest=largest(rank * 5, group))


def test_rows_are_gathered_with_padding_and_returned_to_their_owners():
    for rank, result in enumerate(run_on_ranks(gathered, 2, [3, 0], 4)):
        assert result.everything.shape == (2, 4, 2)
        assert result.everything[0].tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
        assert not result.everything[1].any()
        assert torch.equal(result.mine, result.everything[rank] * 3)  # 1 + 2 times, from both ranks
        assert result.total == 1
        assert result.untouched == rank
        assert result.last == 1
        assert result.largest == 5
