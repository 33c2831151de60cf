"""Shortened rows and their gradients against autograd and Sentence Transformers' own truncation."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

from megatron_embed.losses.matryoshka import Width, cut, shorten, widths_of


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_shortened_rows_and_gradients_are_those_of_sentence_transformers(dim):
    generator = torch.Generator().manual_seed(0)
    rows, gradient = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf, width = rows.clone().requires_grad_(), Width(dim=dim, weight=0.3)
    theirs = shrink(leaf, dim)
    (expected,) = torch.autograd.grad((theirs * gradient[:, :dim]).sum() * 0.3, leaf)
    found = shorten(rows, width, normalize=True)
    torch.testing.assert_close(found.rows, theirs.detach(), rtol=1e-12, atol=0)
    before = torch.ones(5, 6, dtype=torch.float64)
    torch.testing.assert_close(found.add_gradient(before.clone(), gradient[:, :dim].clone(), 0.3) - before, expected,
                               rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.add_gradient(None, gradient[:, :dim].clone(), 0.3), expected, rtol=1e-9,
                               atol=1e-12)
    torch.testing.assert_close(cut(leaf, width, normalize=True), theirs)
    assert dim == 1 or expected[:, :dim].norm() > 0.01
    assert not expected[:, dim:].any()


def test_rows_as_they_are_and_rows_without_normalization():
    rows = torch.arange(6.0).view(2, 3)
    (whole,) = widths_of((), ())
    assert shorten(rows, whole, normalize=True).rows is rows
    assert cut(rows, whole, normalize=True) is rows
    short = shorten(rows, Width(dim=2, weight=1.0), normalize=False)
    assert torch.equal(short.rows, rows[:, :2])
    assert short.add_gradient(None, torch.ones(2, 2), 2.0).tolist() == [[2, 2, 0], [2, 2, 0]]


def test_widths_have_weight_1_unless_said_otherwise():
    assert widths_of((8, 4), ()) == (Width(dim=8, weight=1.0), Width(dim=4, weight=1.0))
    assert widths_of((8, 4), (0.5, 2.0))[1] == Width(dim=4, weight=2.0)
