"""Rounded vectors in the loss: values of Sentence Transformers' own quantization, straight-through gradients."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sentence_transformers.util.quantization import _dequantize_embeddings, quantize_embeddings
from torch.nn.functional import cross_entropy, normalize

from megatron_embed.losses.matryoshka import matryoshka_dims
from megatron_embed.losses.precision import as_stored, int8_ranges, int8_values, signs
from tests.helpers.objective_variants import batch_of_rank, config_of
from tests.helpers.ranks import run_on_ranks

TEMPERATURE = 0.1
PRECISIONS, FACTORS = ("float32", "int8", "binary", "rescore"), (1.0, 0.5, 0.7, 0.4)
DIMS, WEIGHTS = (7, 4), (1.0, 0.3)


def stock_values(vectors, precision, ranges=None):
    """What Sentence Transformers' codes of these vectors stand for, in the vectors' dtype."""
    values = vectors.detach().numpy()
    if precision == "int8":
        codes = quantize_embeddings(values, "int8", ranges=ranges)
        return torch.from_numpy(_dequantize_embeddings(codes, "int8", ranges)).to(vectors)
    unpacked = np.unpackbits(quantize_embeddings(values, "ubinary"), axis=-1)[:, : vectors.shape[1]]
    return (torch.from_numpy(unpacked).to(vectors) * 2 - 1) / vectors.shape[1] ** 0.5


def straight_through(vectors, values):
    return vectors + (values - vectors).detach()


def stock_loss(query, document, positive, dim, precision):
    """InfoNCE of vectors at a width and precision, by autograd."""
    query, document = normalize(query[:, :dim], dim=1), normalize(document[:, :dim], dim=1)
    if precision == "int8":
        document = straight_through(document, stock_values(document, "int8", int8_ranges(document.detach()).numpy()))
    if precision == "binary":
        query, document = (straight_through(side, stock_values(side, "binary")) for side in (query, document))
    if precision == "rescore":
        document = straight_through(document, stock_values(document, "binary"))
    return cross_entropy(query @ document.T / TEMPERATURE, positive)


@pytest.mark.parametrize("rows", [200, 1])
def test_values_are_those_of_sentence_transformers(rows):
    vectors = normalize(torch.randn(rows, 20, generator=torch.Generator().manual_seed(1)), dim=1)
    vectors[:, 3] = 0.25  # a component without a range
    for ranges in (int8_ranges(vectors), torch.stack([vectors.amin(dim=0) * 0.5, vectors.amax(dim=0) * 0.5])):
        ours, stock = int8_values(vectors, ranges), stock_values(vectors, "int8", ranges.numpy())
        assert (ours - stock).abs().max() <= 1e-6
    assert torch.equal(signs(vectors).sign(), stock_values(vectors, "binary").sign())
    assert (signs(vectors) - stock_values(vectors, "binary")).abs().max() <= 1e-6
    assert (signs(vectors).norm(dim=1) - 1).abs().max() <= 1e-6
    assert torch.equal(signs(torch.zeros(1, 4, dtype=torch.float64)), torch.full((1, 4), -0.5, dtype=torch.float64))


def test_the_extremes_lie_in_the_middle_of_their_steps():
    """So that a last bit of a vector cannot change the code of a value that sets the range."""
    vectors = normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    ranges = int8_ranges(vectors)
    places = (vectors - ranges[0]) / ((ranges[1] - ranges[0]) / 255)
    assert (places.amin(dim=0) - 0.5).abs().max() < 1e-3 and (places.amax(dim=0) - 254.5).abs().max() < 1e-3
    assert int8_ranges(vectors[:0]).shape == (2, 16)


def test_float32_is_not_touched():
    vectors = torch.randn(3, 4)
    stored = as_stored("float32", vectors, vectors, None)
    assert stored.anchor is vectors and stored.document is vectors and stored.query is None


def test_a_term_for_each_dimension_and_precision():
    terms = matryoshka_dims((8, 4), (1.0, 0.5), ("float32", "binary"), (1.0, 0.25))
    assert [(term.name, term.weight) for term in terms] == [
        ("8", 1.0), ("8@binary", 0.25), ("4", 0.5), ("4@binary", 0.125)]
    assert [term.name for term in matryoshka_dims((), (), ("float32", "int8"))] == ["float32", "int8"]


def objective_on_rank(total):
    from megatron_embed.objectives.build import build_objective

    embeddings, batch = batch_of_rank(dist.get_rank(), ragged=True)
    config = config_of({"temperature": TEMPERATURE, "matryoshka_weights": WEIGHTS, "precision_weights": FACTORS}, {},
                       DIMS, PRECISIONS)
    result = build_objective(config, dist.group.WORLD)(embeddings, batch, total=total)
    return result.sums.metrics(), result.embeddings


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_are_those_of_the_stock_quantization_over_the_whole_batch(world_size):
    parts = [batch_of_rank(rank, ragged=True) for rank in range(world_size)]
    leaves = [embeddings.double().requires_grad_() for embeddings, _ in parts]
    query = torch.cat([leaf[: batch.num_queries] for leaf, (_, batch) in zip(leaves, parts, strict=True)])
    document = torch.cat([leaf[batch.num_queries :] for leaf, (_, batch) in zip(leaves, parts, strict=True)])
    before = itertools.accumulate((batch.num_documents for _, batch in parts[:-1]), initial=0)
    positive = torch.cat([batch.positive_index + start for (_, batch), start in zip(parts, before, strict=True)])
    losses = {(dim, precision): stock_loss(query, document, positive, dim, precision)
              for dim in DIMS for precision in PRECISIONS}
    weights = {(dim, precision): weight * factor for dim, weight in zip(DIMS, WEIGHTS, strict=True)
               for precision, factor in zip(PRECISIONS, FACTORS, strict=True)}
    loss = sum(losses[term] * weight for term, weight in weights.items())
    expected = torch.autograd.grad(loss, leaves)
    results = run_on_ranks(objective_on_rank, world_size, float(len(query)))
    for (metrics, gradient), own in zip(results, expected, strict=True):
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for (dim, precision), value in losses.items():
            name = f"loss@{dim}" if precision == "float32" else f"loss@{dim}@{precision}"
            assert metrics[name] == pytest.approx(value.item(), rel=1e-6)
        assert own.norm() > 0.01
        assert (gradient.double() - own).norm() <= 1e-5 * own.norm()
    values = [value.item() for value in losses.values()]
    assert len({round(value, 4) for value in values}) == len(values), "a precision makes no difference"
