"""The plain losses of an audit against those of training, in value and gradient: two ways to compute the same."""

import dataclasses
import types

import pytest
import torch
import torch.distributed as dist

from megatron_embed.batch import RerankBatch
from tests.helpers.objective_variants import VARIANTS, batch_of_rank, config_of, variant_batch
from tests.helpers.ranks import run_on_ranks

LISTS = ("pointwise", "listwise", "margin_ranking", "ranknet", "lambda_loss", "kl_distillation")
OWN = ({"loss": "triplet", "margin": 0.6}, {"loss": "margin_mse"}, {"loss": "kl_distillation", "temperature": 0.5,
                                                                    "teacher_temperature": 0.3})
PAIRS = ("cosine_similarity", "contrastive", "online_contrastive", "cosent", "angle")


def cases(rank):
    """(configuration, loss of a reranker or None, embeddings, batch) of every loss."""
    for variant in VARIANTS:
        yield config_of(*variant), None, *variant_batch(rank, variant)
    learned = ({"temperature": 0.2, "learnable_temperature": True}, {}, ())
    yield config_of(*learned), None, *variant_batch(rank, learned)
    rows, batch = batch_of_rank(rank, ragged=False)
    teacher = torch.linspace(-1, 2, batch.num_documents).sin().double()
    batch = dataclasses.replace(batch, teacher_scores=teacher,
                                is_positive=torch.isin(torch.arange(batch.num_documents), batch.positive_index))
    for objective in OWN:
        yield config_of(objective, {"num_negatives": 3}, (7, 3)), None, rows, batch
    queries, chosen = batch.num_queries, batch.positive_index
    pairs = dataclasses.replace(
        batch, num_documents=queries, positive_index=torch.arange(queries), document_query=torch.arange(queries),
        is_positive=torch.ones(queries, dtype=torch.bool), document_ids=batch.document_ids[chosen], teacher_scores=None,
        scores=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).roll(rank)[:queries])
    for loss in PAIRS:
        yield config_of({"loss": loss}, {"num_negatives": 0}, (7, 4)), None, rows[: 2 * queries], pairs
    lists = RerankBatch(
        micro_batches=(), num_truncated=0, num_queries=3, num_documents=8, group_sizes=(4, 1, 3),
        labels=torch.tensor([2.0, 0, 1, 0, 1, 0, 0, 1]).roll(rank), teacher_scores=torch.linspace(0, 3, 8).cos())
    for loss in LISTS:
        yield config_of(), loss, torch.linspace(-1, 1, 8).mul(5 + rank).sin()[:, None], lists


def both_ways():
    """Largest differences of (metrics, gradients) of each case on this rank."""
    from megatron_embed.audit.plain_objective import PlainObjective
    from megatron_embed.config.schema import RerankerConfig
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.objectives.reranking import Reranking

    found, topology = [], types.SimpleNamespace(dp_group=dist.group.WORLD)
    for config, loss, rows, batch in cases(dist.get_rank()):
        if loss is not None:
            settings = RerankerConfig(temperature=0.7, margin=0.4)
            config = types.SimpleNamespace(task="reranker", objective=types.SimpleNamespace(loss=loss),
                                           reranker=settings)
            own = Reranking(loss, settings, dist.group.WORLD)
        else:
            own = build_objective(config, dist.group.WORLD)
        total = 6.0  # one number for all ranks, as in a run; these ranks' numbers of rows differ
        results = [each(rows, batch, total=total) for each in (own, PlainObjective(config, topology, own))]
        (metrics, gradient), (plain, plain_gradient) = [(each.sums.metrics(), each.embeddings) for each in results]
        assert metrics.keys() == plain.keys() and float(gradient.norm()) > 0
        found.append((loss or config.objective.loss, max(abs(value - plain[name]) for name, value in metrics.items()),
                      float((gradient - plain_gradient).norm() / gradient.norm())))
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_plain_losses_are_those_of_training(ranks):
    for found in run_on_ranks(both_ways, ranks):
        assert len(found) == len(VARIANTS) + 1 + len(OWN) + len(PAIRS) + len(LISTS)
        assert [each for each in found if max(each[1:]) > 1e-5] == []


SETTINGS = ({"mask_margin": 0.1, "temperature": 0.2}, {"hardness": "all_negatives", "hardness_strength": 3.0},
            {"hard_negatives": "private"}, {"matryoshka_weights": (2.0, 0.5)})


def under_variations():
    """Of each setting: (metrics of a loss that has it, those of its variation), and gradients of other variations."""
    from megatron_embed.audit.plain_objective import PlainObjective
    from megatron_embed.audit.variation import Variation
    from megatron_embed.objectives.build import build_objective

    topology = types.SimpleNamespace(dp_group=dist.group.WORLD)

    def computed(objective, variation=None):
        variant = (objective, {"num_negatives": 3}, (7, 3))
        config, (rows, batch) = config_of(*variant), variant_batch(0, variant)
        plain = PlainObjective(config, topology, build_objective(config, dist.group.WORLD))
        plain.variation = variation or plain.variation
        return plain(rows, batch, total=6.0), batch

    found = []
    for settings in SETTINGS:
        without = {"hardness": "all_negatives", "hardness_strength": 1.0} if "hardness" in settings else {}
        (direct, _), (varied, _) = computed(settings), computed(without, Variation(settings=tuple(settings.items())))
        found.append((direct.sums.metrics(), varied.sums.metrics()))
    (base, batch), (scaled, _), (rounded, _) = (computed({}, variation) for variation in (
        None, Variation(detached=("queries",), detached_factor=3.0), Variation(rounded="gradient")))
    return found, base.embeddings, scaled.embeddings, rounded.embeddings, batch.num_queries


def test_variations_are_what_they_are_called():
    found, base, scaled, rounded, queries = run_on_ranks(under_variations, 1)[0]
    for direct, varied in found:
        assert varied == pytest.approx(direct)
    assert len({direct["loss"] for direct, _ in found}) == len(found)
    torch.testing.assert_close(scaled[:queries], 3 * base[:queries])
    torch.testing.assert_close(scaled[queries:], base[queries:])
    assert torch.equal(rounded, base.bfloat16().to(base.dtype)) and not torch.equal(rounded, base)
