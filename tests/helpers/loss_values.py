"""Vectors, and comparison of a loss with Sentence Transformers' value and gradients."""

import torch

TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]

def vectors(count, rows=9, dim=7, seed=0):
    """Not of unit length; neighbours resemble each other, so that labels can be right or wrong."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return [base + 0.7 * torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in range(count)]


def value_and_gradients(loss, *rows):
    leaves = [part.clone().requires_grad_() for part in rows]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def assert_equal(ours, theirs, tolerance):
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), rtol=tolerance, atol=0)
    for gradient, wanted in zip(ours[1], theirs[1], strict=True):
        assert wanted.norm() > 1e-3
        assert (gradient.double() - wanted).norm() <= tolerance * wanted.norm()
