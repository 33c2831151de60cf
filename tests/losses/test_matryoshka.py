"""Truncated embeddings and their gradients against autograd and Sentence Transformers' own truncation."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

from megatron_embed.losses.matryoshka import MatryoshkaDim, matryoshka_dims, truncate, truncate_with_graph


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_truncated_embeddings_and_gradients_are_those_of_sentence_transformers(dim):
    generator = torch.Generator().manual_seed(0)
    rows, gradient = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf, matryoshka = rows.clone().requires_grad_(), MatryoshkaDim(dim=dim, weight=0.3)
    theirs = shrink(leaf, dim)
    (expected,) = torch.autograd.grad((theirs * gradient[:, :dim]).sum() * 0.3, leaf)
    truncated = truncate(rows, matryoshka, normalize=True)
    torch.testing.assert_close(truncated.embeddings, theirs.detach(), rtol=1e-12, atol=0)
    before = torch.ones(5, 6, dtype=torch.float64)
    torch.testing.assert_close(truncated.add_gradient(before.clone(), gradient[:, :dim].clone(), 0.3) - before,
                               expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(truncated.add_gradient(None, gradient[:, :dim].clone(), 0.3), expected, rtol=1e-9,
                               atol=1e-12)
    torch.testing.assert_close(truncate_with_graph(leaf, matryoshka, normalize=True), theirs)
    assert dim == 1 or expected[:, :dim].norm() > 0.01
    assert not expected[:, dim:].any()


def test_rows_as_they_are_and_rows_without_normalization():
    rows = torch.arange(6.0).view(2, 3)
    (whole,) = matryoshka_dims((), ())
    assert truncate(rows, whole, normalize=True).embeddings is rows
    assert truncate_with_graph(rows, whole, normalize=True) is rows
    short = truncate(rows, MatryoshkaDim(dim=2, weight=1.0), normalize=False)
    assert torch.equal(short.embeddings, rows[:, :2])
    assert short.add_gradient(None, torch.ones(2, 2), 2.0).tolist() == [[2, 2, 0], [2, 2, 0]]


def test_dimensions_have_weight_1_unless_said_otherwise():
    assert matryoshka_dims((8, 4), ()) == (MatryoshkaDim(dim=8, weight=1.0), MatryoshkaDim(dim=4, weight=1.0))
    assert matryoshka_dims((8, 4), (0.5, 2.0))[1] == MatryoshkaDim(dim=4, weight=2.0)
