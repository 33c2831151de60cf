"""Triplet loss and losses from a teacher's scores against Sentence Transformers' classes of the same names."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss, TripletLoss

from megatron_embed.losses.triplet_and_distillation import kl_distillation, margin_mse, triplet
from tests.helpers.loss_values import TOLERANCES, assert_equal, value_and_gradients, vectors


def teacher(columns):
    return torch.randn(9, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_triplet_is_that_of_sentence_transformers(dtype, tolerance):
    rows, peer = vectors(3), TripletLoss(model=None, triplet_margin=0.8)
    theirs = value_and_gradients(lambda *parts: peer.compute_loss_from_embeddings(list(parts), None), *rows)
    ours = value_and_gradients(lambda *parts: triplet(*parts, 0.8).mean(), *(part.to(dtype) for part in rows))
    assert_equal(ours, theirs, tolerance)
    losses = triplet(*rows, 0.8)
    assert 0 < int((losses == 0).sum()) < 9


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_margin_mse_is_that_of_sentence_transformers(dtype, tolerance):
    rows, scores = vectors(4), teacher(3)
    peer = MarginMSELoss(model=None)
    theirs = value_and_gradients(lambda *parts: peer.compute_loss_from_embeddings(list(parts), scores), *rows)

    def ours(query, positive, *negatives):
        near, wanted = (query * positive).sum(dim=1), scores.to(dtype)
        return torch.stack([margin_mse(near, (query * negative).sum(dim=1), wanted[:, 0], wanted[:, index + 1])
                            for index, negative in enumerate(negatives)]).mean()

    assert_equal(value_and_gradients(ours, *(part.to(dtype) for part in rows)), theirs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_kl_distillation_is_that_of_sentence_transformers(dtype, tolerance):
    rows, scores = vectors(4, seed=2), teacher(3)
    peer = DistillKLDivLoss(model=None, student_temperature=1.5, teacher_temperature=0.7)
    theirs = value_and_gradients(lambda *parts: peer.compute_loss_from_embeddings(list(parts), scores), *rows)

    def ours(query, *documents):
        # A place that holds no document, whatever stands there, counts for nothing.
        student = torch.stack([*((query * document).sum(dim=1) for document in documents), query.sum(dim=1)], dim=1)
        padded = torch.cat([scores, torch.full((9, 1), 5.0, dtype=torch.float64)], dim=1).to(dtype)
        valid = torch.tensor([True, True, True, False]).expand(9, 4)
        return kl_distillation(student, padded, valid, 1.5, 0.7).mean()

    assert_equal(value_and_gradients(ours, *(part.to(dtype) for part in rows)), theirs, tolerance)
