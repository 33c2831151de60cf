"""MaxSim and its gradient: against Sentence Transformers' losses, in tiles of any size, and with ties."""

import pytest
import torch
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorDistillKLDivLoss,
    MultiVectorMarginMSELoss,
    MultiVectorMultipleNegativesRankingLoss,
)

from megatron_embed.batch import TextVectors
from megatron_embed.losses import maxsim as module
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, similarity_gradients
from megatron_embed.losses.maxsim import maxsim, maxsim_gradients, maxsim_pairs
from megatron_embed.losses.triplet_and_distillation import kl_distillation, margin_mse

QUERIES, DOCUMENTS, DIM, TEMPERATURE = (3, 5, 4, 1), (7, 2, 9, 4, 6, 1, 3, 8), 16, 0.7
"""Vectors of each text; every query has two documents, the first of which is its positive."""


class GivenVectors(torch.nn.Module):
    """A "model" of the stock losses that has its token vectors already."""

    def forward(self, features, task=None):
        return features


def texts(counts, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(counts), DIM, generator=generator, dtype=dtype)
    return TextVectors(vectors=torch.nn.functional.normalize(vectors, dim=1), counts=torch.tensor(counts))


def padded(vectors, counts, rows):
    """The features of a column of texts, as the stock library's collator and model give them."""
    parts = vectors.split(list(counts))
    chosen = [parts[row] for row in rows]
    return {"token_embeddings": torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True),
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones(len(part), dtype=torch.int64)
                                                               for part in chosen], batch_first=True)}


def stock(loss, labels=None):
    """(loss, gradients of the queries' and documents' vectors) by a stock loss of two documents per query."""
    query, document = texts(QUERIES, 1).vectors.requires_grad_(), texts(DOCUMENTS, 2).vectors.requires_grad_()
    columns = [padded(query, QUERIES, range(4)), padded(document, DOCUMENTS, range(0, 8, 2)),
               padded(document, DOCUMENTS, range(1, 8, 2))]
    value = loss(columns) if labels is None else loss(columns, labels)
    return value.detach(), *torch.autograd.grad(value, (query, document))


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0].to(theirs[0].dtype), theirs[0], rtol=1e-6, atol=1e-7)
    for own, expected in zip(ours[1:], theirs[1:], strict=True):
        assert expected.abs().max() > 1e-3, "gradients that are 0 prove nothing"
        torch.testing.assert_close(own.to(expected.dtype), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=[1 << 22, 40], ids=["one tile", "small tiles"], autouse=True)
def _tile(request, monkeypatch):
    monkeypatch.setattr(module, "MAXSIM_TILE_ELEMENTS", request.param)


def test_info_nce_is_the_stock_library_s():
    queries, documents = texts(QUERIES, 1), texts(DOCUMENTS, 2)
    scores = maxsim(queries, documents)
    candidates = Candidates(document=torch.empty(0), positive_index=torch.arange(0, 8, 2))
    sums = similarity_gradients(scores, candidates, ContrastiveSettings(temperature=TEMPERATURE), first=0, total=4)
    gradients = maxsim_gradients(queries, documents, scores)
    assert_same((sums.loss / 4, *gradients),
                stock(MultiVectorMultipleNegativesRankingLoss(GivenVectors(), scale=1 / TEMPERATURE)))


@pytest.mark.parametrize("loss", ["kl_distillation", "margin_mse"])
def test_distillation_is_the_stock_library_s(loss):
    queries, documents = texts(QUERIES, 1), texts(DOCUMENTS, 2)
    queries.vectors.requires_grad_()
    documents.vectors.requires_grad_()
    teacher = torch.tensor([[3.0, 1.0], [2.0, 2.5], [0.5, -1.0], [4.0, 3.0]], dtype=torch.float64)
    scores = maxsim_pairs(queries, documents, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).view(4, 2)
    if loss == "margin_mse":
        value = margin_mse(scores[:, 0], scores[:, 1], teacher[:, 0], teacher[:, 1]).mean()
        expected = stock(MultiVectorMarginMSELoss(GivenVectors()), teacher)
    else:
        value = kl_distillation(scores, teacher, torch.ones(4, 2, dtype=torch.bool), 0.5, 2.0).mean()
        expected = stock(MultiVectorDistillKLDivLoss(GivenVectors(), student_temperature=0.5, teacher_temperature=2.0),
                         teacher)
    assert_same((value.detach(), *torch.autograd.grad(value, (queries.vectors, documents.vectors))), expected)


def test_of_equal_maxima_the_first_counts():
    query = TextVectors(vectors=torch.eye(2, 4), counts=torch.tensor([2]))
    document = TextVectors(vectors=torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0, 1.0]]),
                           counts=torch.tensor([3]))
    _, gradient = maxsim_gradients(query, document, torch.ones(1, 1))
    assert gradient.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    leaf = document.vectors.clone().requires_grad_()
    pairs = maxsim_pairs(query, TextVectors(vectors=leaf, counts=document.counts), torch.tensor([0]))
    torch.testing.assert_close(torch.autograd.grad(pairs.sum(), leaf)[0], gradient)
