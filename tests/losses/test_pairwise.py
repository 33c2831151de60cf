"""Losses of labelled pairs against Sentence Transformers' classes of the same names."""

import itertools
import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    AnglELoss,
    ContrastiveLoss,
    CoSENTLoss,
    CosineSimilarityLoss,
    OnlineContrastiveLoss,
)

from megatron_embed.losses import pairwise
from tests.helpers.loss_values import TOLERANCES, assert_equal, value_and_gradients, vectors

GRADED = torch.tensor([0.125, 0.875, 0.375, 0.875, 0.0, 1.0, 0.375, 0.75, 0.25], dtype=torch.float64)
"""Exact in float32, to which the peer's cosine_similarity brings them."""
BINARY = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)

CASES = {
    "cosine_similarity": (CosineSimilarityLoss(model=None), GRADED,
                          lambda a, b, label: pairwise.cosine_similarity(pairwise.cosine(a, b), label).mean()),
    "contrastive": (ContrastiveLoss(model=None, margin=0.4), BINARY,
                    lambda a, b, label: pairwise.contrastive(pairwise.cosine(a, b), label, 0.4).mean()),
    "online_contrastive": (OnlineContrastiveLoss(model=None, margin=0.6), BINARY,
                           lambda a, b, label: pairwise.online_contrastive(pairwise.cosine(a, b), label, 0.6)[0]),
    "online_contrastive without negatives": (
        OnlineContrastiveLoss(model=None, margin=0.6), torch.ones(9),
        lambda a, b, label: pairwise.online_contrastive(pairwise.cosine(a, b), label, 0.6)[0]),
    "online_contrastive without positives": (
        OnlineContrastiveLoss(model=None, margin=0.9), torch.zeros(9),
        lambda a, b, label: pairwise.online_contrastive(pairwise.cosine(a, b), label, 0.9)[0]),
    "cosent": (CoSENTLoss(model=None, scale=20.0), GRADED,
               lambda a, b, label: pairwise.cosent(pairwise.cosine(a, b), label, 0.05)),
    "angle": (AnglELoss(model=None, scale=10.0), GRADED,
              lambda a, b, label: pairwise.cosent(pairwise.angle_similarity(a, b), label, 0.1))}


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_pair_losses_are_those_of_sentence_transformers(name, dtype, tolerance):
    peer, label, ours = CASES[name]
    first, second = vectors(2)
    theirs = value_and_gradients(lambda a, b: peer.compute_loss_from_embeddings([a, b], label.double()), first, second)
    result = value_and_gradients(lambda a, b: ours(a, b, label.to(dtype)), first.to(dtype), second.to(dtype))
    assert_equal(result, theirs, tolerance)


def test_cosent_is_its_formula():
    similarity = torch.tensor([0.3, 0.9, -0.2, 0.5], dtype=torch.float64)
    label = torch.tensor([1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    expected = math.log(1 + sum(math.exp(float(similarity[j] - similarity[i]) / 0.2)
                                for i, j in itertools.product(range(4), repeat=2) if label[i] > label[j]))
    assert float(pairwise.cosent(similarity, label, 0.2)) == pytest.approx(expected, rel=1e-12)


def test_cosent_of_equal_labels_is_zero_with_zero_gradient():
    similarity = torch.tensor([0.3, 0.9], requires_grad=True)
    loss = pairwise.cosent(similarity, torch.ones(2), 0.05)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, similarity)[0], torch.zeros(2))


def test_hard_pairs_of_online_contrastive():
    similarity = torch.tensor([0.9, 0.2, 0.5, -0.4])
    loss, hard = pairwise.online_contrastive(similarity, torch.tensor([1, 1, 0, 0]), 0.7)
    assert hard.tolist() == [False, True, True, False]
    assert float(loss) == pytest.approx(0.8**2 + 0.2**2)


@pytest.mark.parametrize("dim", [6, 7])
def test_angle_similarity_is_that_of_complex_numbers(dim):
    first, second = vectors(2, dim=dim)
    units = [torch.nn.functional.pad(torch.nn.functional.normalize(part, dim=1), (0, dim % 2)) for part in (first,
                                                                                                         second)]
    numbers = [torch.complex(*(half.contiguous() for half in part.chunk(2, dim=1))) for part in units]
    product = (numbers[0] * numbers[1].conj()).sum(dim=1)
    torch.testing.assert_close(pairwise.angle_similarity(first, second), (product.real + product.imag).abs())
