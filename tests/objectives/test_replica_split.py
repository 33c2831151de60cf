"""The loss split over a replica's ranks: that of one process, and no embedding is sent twice."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.helpers.objective_variants import VARIANTS, config_of, variant_batch, variants_on_ranks
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, build, counted_step, objective_settings
from tests.helpers.toys import layout, run_config, save_model


def variants_on_replicas(replicas):
    """The same as variants_on_ranks; the ranks of a replica hold the same rows."""
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.objectives.replica_split import ReplicaSplit
    from megatron_embed.parallel.topology import ModelParallelGroups

    world, rank = dist.get_world_size(), dist.get_rank()
    replica_size = world // replicas
    groups = [dist.new_group(list(range(start, start + replica_size))) for start in range(0, world, replica_size)]
    across = [dist.new_group(list(range(offset, world, replica_size))) for offset in range(replica_size)]
    split = ModelParallelGroups(tp_cp=groups[rank // replica_size], tp_dp_cp=dist.group.WORLD,
                                tp=groups[rank // replica_size])
    results = []
    for variant in VARIANTS:
        rows, batch = variant_batch(rank // replica_size, variant)
        objective = build_objective(config_of(*variant), across[rank % replica_size], split)
        assert isinstance(objective, ReplicaSplit)
        assert objective.total(batch) == batch.num_queries * replicas
        result = objective(rows, batch, total=6.0)
        results.append(SimpleNamespace(metrics=result.sums.metrics(), rows=result.embeddings,
                                       queries=batch.num_queries))
    return results


@pytest.mark.parametrize("replicas, size", [(2, 2), (1, 4)], ids=["two replicas", "more ranks than queries"])
def test_every_variant_is_that_of_one_process(replicas, size):
    (whole,) = run_on_ranks(variants_on_ranks, 1, replicas)
    ranks = run_on_ranks(variants_on_replicas, replicas * size, replicas)
    for index, (metrics, gradient, _) in enumerate(whole):
        parts = [rank[index] for rank in ranks]
        for part, first in zip(parts, (parts[rank - rank % size] for rank in range(len(parts))), strict=True):
            assert torch.equal(part.rows, first.rows), "ranks of a replica disagree"
        firsts = parts[::size]
        ours = torch.cat([part.rows[: part.queries] for part in firsts]
                         + [part.rows[part.queries:] for part in firsts])
        assert gradient.norm() > 0.01
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm(), VARIANTS[index]
        for part in parts:
            assert part.metrics == pytest.approx(metrics, rel=1e-5, abs=1e-8), VARIANTS[index]


def messages_of_loss(config):
    """[(collective, elements of the larger side)] of one step, over a replica's ranks and over all replicas."""
    from megatron_embed.parallel import topology

    with mock.patch.object(topology, "shared_groups", contextlib.nullcontext):  # else all are one, of these two ranks
        built, batch = build(config)
    groups, calls = built.topology.model_parallel_groups, counted_step(built, batch)
    of_group = {name: [(collective, size) for collective, size, used in calls if used is group]
                for name, group in (("tp_cp", groups.tp_cp), ("tp_dp_cp", groups.tp_dp_cp))}
    return {"rows": batch.num_queries + len(batch.document_ids), **of_group}


@pytest.mark.parametrize("sizes", [layout(2), layout(cp=2)], ids=["tp2", "cp2"])
def test_no_embedding_is_sent_twice(tmp_path, sizes):
    directory = save_model(tmp_path / "model", "bert", tokenizer=True)
    hidden, documents = 32, ROWS * 2
    config = run_config(directory, parallel=sizes, objective=objective_settings(), distributed=False,
                        training={"global_batch_size": ROWS, "micro_batch_size": 3})
    for calls in run_on_ranks(messages_of_loss, 2, config):
        # Both ranks' numbers of rows, then each document of the global batch once; their gradients; the gradient of a
        # part; and the step's sums.
        assert calls["tp_dp_cp"] == [("all_gather_into_tensor", 2 * 3), ("all_gather_into_tensor", documents * hidden),
                                     ("reduce_scatter_tensor", documents * hidden), ("all_reduce", 14)]
        rows = calls["rows"]
        assert rows < documents + ROWS, "the capacity is all there is"
        assert calls["tp_cp"] == [("all_gather_into_tensor", (rows + rows % 2) * hidden)]
