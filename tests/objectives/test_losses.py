"""Every loss under data, tensor and pipeline ranks: value and gradients of the model's parameters are those of one
process, where Transformers embeds text by text and Sentence Transformers, or the formula written out, is the loss."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.helpers.loss_reference import GRADIENT_BOUND, LAYOUTS, LOSSES, VALUE_BOUND, errors_under, references
from tests.helpers.ranks import run_on_ranks


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return references(tmp_path_factory.mktemp("losses"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_loss_is_that_of_one_process(known, name):
    errors = errors_under(*known, *LAYOUTS[name])
    assert errors.keys() == LOSSES.keys()
    for loss, error in errors.items():
        assert error.value <= VALUE_BOUND, loss
        assert error.gradient <= GRADIENT_BOUND, loss


def pairs_on_rank(name):
    """(metrics, gradient) of a loss over pairs of which this rank has one or two, ranks differ."""
    from megatron_embed.objectives.build import build_objective, metric_names
    from tests.helpers.objective_variants import config_of, variant_batch

    rows, batch = variant_batch(dist.get_rank(), ({}, {}))
    batch = dataclasses.replace(batch, scores=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:batch.num_queries])
    objective = build_objective(config_of({"loss": name}), dist.group.WORLD)
    assert metric_names(config_of({"loss": name})) == objective.names
    return objective(rows, batch, total=objective.total(batch)).sums.metrics()


def test_metrics_of_pairs():
    first, second = run_on_ranks(pairs_on_rank, 2, "online_contrastive")
    assert first == second
    assert set(first) == {"loss", "similarity", "positive_similarity", "negative_similarity", "margin_to_mean_negative"}
    expected = (3 * first["positive_similarity"] + 2 * first["negative_similarity"]) / 5
    assert first["similarity"] == pytest.approx(expected)
