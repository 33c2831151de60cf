"""The objective over ranks: one process's loss and gradient, by one gather and one reduce-scatter of embeddings."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_embed.losses.info_nce import info_nce
from tests.helpers.objective_variants import VARIANTS, batch_of_rank, config_of, variants_on_ranks
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, build, counted_step, objective_settings
from tests.helpers.toys import layout, run_config, save_model


def objective_on_rank(ragged, masked, total):
    from megatron_embed.objectives.build import build_objective

    embeddings, batch = batch_of_rank(dist.get_rank(), ragged)
    objective = build_objective(config_of({"temperature": 0.1, "mask_duplicates": masked}), dist.group.WORLD)
    result = objective(embeddings, batch, total=total)
    return result.sums, result.embeddings


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


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_variant_is_the_same_over_ranks(world_size):
    (whole,), parts = run_on_ranks(variants_on_ranks, 1, world_size), run_on_ranks(variants_on_ranks, world_size,
                                                                                   world_size)
    for index, (metrics, gradient, _) in enumerate(whole):
        shares = [part[index] for part in parts]
        ours = torch.cat([rows[:queries] for _, rows, queries in shares]
                         + [rows[queries:] for _, rows, queries in shares])
        assert gradient.norm() > 0.01
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm(), VARIANTS[index]
        for share, _, _ in shares:
            # Signs tie, and a matrix product may round a tie in the last bit.
            assert share == pytest.approx(metrics, rel=1e-5, abs=1e-7), VARIANTS[index]
        parts_of_loss = {name: metrics[name] * weight for name, weight in losses_of(VARIANTS[index]).items()}
        if parts_of_loss:
            assert metrics["loss"] == pytest.approx(sum(parts_of_loss.values()), rel=1e-6)
            assert {name for name in metrics if name.startswith("loss@")} == parts_of_loss.keys()
    assert any(metrics["masked_fraction"] > 0.05 for metrics, *_ in whole)


def losses_of(variant):
    """Name -> weight of the losses of a variant, unless whole vectors in float32 have the only one."""
    objective, _, dims, *stored = variant
    precisions = stored[0] if stored else ("float32",)
    if not dims and not stored:
        return {}
    weights = objective.get("matryoshka_weights", (1.0,) * len(dims) or (1.0,))
    factors = objective.get("precision_weights", (1.0,) * len(precisions))
    return {f"loss@{dim or ''}@{precision}".replace("@@", "@").replace("@float32", "" if dim else "@float32"):
            weight * factor for dim, weight in zip(dims or (None,), weights, strict=True)
            for precision, factor in zip(precisions, factors, strict=True)}


def collectives_of_step(config):
    return [(name, elements) for name, elements, _ in counted_step(*build(config))]


@pytest.mark.parametrize("masked, more", [(False, False), (True, False), (True, True)])
def test_one_gather_and_one_reduce_scatter_per_step(tmp_path, masked, more):
    settings = {"directions": ("query_to_document", "query_to_query", "document_to_document")} if more else {}
    precision = ("float32", "int8", "binary") if more else ("float32",)
    directory = save_model(tmp_path / "model", "bert", tokenizer=True)
    hidden, capacity = 32, ROWS // 2 * 2
    for micro_batch_size in (6, 3, 1):
        config = run_config(directory, parallel=layout(),
                            objective=objective_settings(mask_duplicates=masked, **settings),
                            matryoshka_dims=(32, 8) if more else (), precision=precision,
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
            assert others[0] == (26 if more else 14)  # six losses, or none, beside the metrics
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
