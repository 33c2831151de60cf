"""The losses that compare with vectors by other models, on ranks, against sums of losses without them."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.helpers.objective_variants import DIM, VARIANTS, config_of, together, variant_batch
from tests.helpers.other_models import hashed_vectors
from tests.helpers.ranks import run_on_ranks

WEIGHT = 0.6
WORLD = 2
OLD = hashed_vectors(DIM, 1)
COMPATIBLE = [variant for variant in VARIANTS if "num_positives" not in variant[1]] + VARIANTS[1:2] + [
    ({"temperature": 0.3, "learnable_temperature": True}, {}, (7, 3))]


def changed(variant, **objective):
    return ({**variant[0], **objective}, *variant[1:])


def query_side(config):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, query_side_only=True))


def rows_on_ranks(variant):
    """(embeddings, batch) of this rank, or of all ranks together where there is one."""
    parts = [variant_batch(rank, variant) for rank in range(WORLD)]
    return together(parts) if dist.get_world_size() == 1 else parts[dist.get_rank()]


def assert_near(gradient, wanted):
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def result_of(config, embeddings, batch, fixed=None):
    from megatron_embed.objectives.build import build_objective

    objective = build_objective(config, dist.group.WORLD, None, fixed)
    result = objective(embeddings, batch, total=6.0)
    assert tuple(result.sums.names) == objective.names
    return result.sums.metrics(), result.embeddings


def compatible_results():
    """Per variant: of the loss with an index, of the loss against the index alone, and their reference."""
    from megatron_embed.objectives.fixed_vectors import FixedVectors

    results, fixed = [], FixedVectors(old_document=OLD)
    for variant in COMPATIBLE:
        embeddings, batch = rows_on_ranks(variant)
        queries = batch.num_queries
        with_index = torch.cat([embeddings[:queries], OLD(batch.document_ids)])
        config = config_of(*changed(variant, compatible_with="old", compatible_weight=WEIGHT))
        alone = changed((variant[0], variant[1], ()), directions=("query_to_document",), partition="joint",
                        matryoshka_weights=())
        plain, against_index = (result_of(config_of(*each), rows, batch) for each, rows in (
            (variant, embeddings), (alone, with_index)))
        results.append((result_of(config, embeddings, batch, fixed), plain, against_index, queries))
    return results


@pytest.fixture(scope="module")
def on_ranks():
    return run_on_ranks(compatible_results, WORLD), run_on_ranks(compatible_results, 1)[0]


def test_the_loss_with_an_index_is_a_weighted_sum(on_ranks):
    for rank_results in (*on_ranks[0], on_ranks[1]):
        for (metrics, gradient), (plain, of_plain), (old, of_old), queries in rank_results:
            assert metrics["compatible_loss"] == pytest.approx(old["loss"], rel=1e-6)
            assert metrics["compatible_accuracy"] == pytest.approx(old["in_batch_accuracy"])
            assert metrics["loss"] == pytest.approx(plain["loss"] + WEIGHT * old["loss"], rel=1e-6)
            assert abs(metrics["loss"] - plain["loss"]) > 1e-2
            if "log_scale_gradient" in metrics:
                assert metrics["log_scale_gradient"] == pytest.approx(
                    plain["log_scale_gradient"] + WEIGHT * old["log_scale_gradient"], rel=1e-5)
            wanted = of_plain.clone()
            wanted[:queries] += WEIGHT * of_old[:queries]
            assert_near(gradient, wanted)
            assert (gradient[:queries] - of_plain[:queries]).norm() > 1e-3


def test_ranks_equal_one_process(on_ranks):
    for index, ((metrics, whole), *_) in enumerate(on_ranks[1]):
        shares = [results[index] for results in on_ranks[0]]
        for (own, _), *_ in shares:
            assert own == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        joined = torch.cat([gradient[:queries] for (_, gradient), *_, queries in shares]
                           + [gradient[queries:] for (_, gradient), *_, queries in shares])
        assert_near(joined, whole)


def query_side_results():
    from megatron_embed.objectives.fixed_vectors import FixedVectors

    results = []
    for directions in (("query_to_document",), ("query_to_document", "query_to_query")):
        variant = ({"temperature": 0.1, "directions": directions, "mask_duplicates": True}, {}, ())
        embeddings, batch = rows_on_ranks(variant)
        queries = embeddings[: batch.num_queries]
        only = dataclasses.replace(batch, embeds_documents=False)
        with_index = torch.cat([queries, OLD(batch.document_ids)])
        results.append((result_of(query_side(config_of(*variant)), queries, only, FixedVectors(old_document=OLD)),
                        result_of(config_of(*variant), with_index, batch), batch.num_queries))
    return results


def test_documents_of_the_index_alone_are_the_documents_of_a_loss():
    for results in (*run_on_ranks(query_side_results, WORLD), run_on_ranks(query_side_results, 1)[0]):
        for (metrics, gradient), (wanted, of_all), queries in results:
            assert metrics == pytest.approx(wanted, rel=1e-6)
            assert len(gradient) == queries
            assert gradient.norm() > 1e-3
            assert_near(gradient, of_all[:queries])


def replica_results():
    """The loss with an index, and against it alone, of two tensor-parallel ranks that share a replica's queries."""
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.objectives.fixed_vectors import FixedVectors
    from megatron_embed.parallel.topology import ModelParallelGroups

    variant, fixed, results = COMPATIBLE[0], FixedVectors(old_document=OLD), []
    embeddings, batch = variant_batch(0, variant)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups = ModelParallelGroups(tp_cp=dist.group.WORLD, tp_dp_cp=dist.group.WORLD, tp=dist.group.WORLD)
    both = config_of(*changed(variant, compatible_with="old"))
    only = query_side(config_of({"temperature": 0.1, "mask_duplicates": True}))
    for config, rows, own in ((both, embeddings, batch), (
            only, embeddings[: batch.num_queries], dataclasses.replace(batch, embeds_documents=False))):
        split, whole = (build_objective(config, alone, each, fixed)(rows, own, total=6.0) for each in (groups, None))
        results.append((split, whole))
    return [(one.sums.metrics(), other.sums.metrics(), one.embeddings, other.embeddings) for one, other in results]


def test_ranks_of_a_replica_share_the_queries():
    for results in run_on_ranks(replica_results, 2):
        for metrics, wanted, gradient, of_whole in results:
            assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert_near(gradient, of_whole)
