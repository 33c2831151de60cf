"""Any loss over several widths of the same rows (Kusupati et al. 2022, arXiv:2205.13147)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Width:
    """One width of a loss."""

    dim: int | None
    """Leading dimensions of a row; null: the rows as they are."""
    weight: float


def widths_of(dims: Sequence[int], weights: Sequence[float]) -> tuple[Width, ...]:
    """The widths of a loss: those given, with their weights or 1 each; without any, the rows as they are."""
    if not dims:
        return (Width(dim=None, weight=1.0),)
    return tuple(Width(dim=dim, weight=weight)
                 for dim, weight in zip(dims, weights or [1.0] * len(dims), strict=True))


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """Rows cut to a width and, if normalized ones are asked for, brought back to unit length."""

    rows: Tensor
    """[rows, width]."""
    length: Tensor | None
    """[rows, 1], what the cut rows were divided by; null: nothing."""
    whole_dim: int
    """Of the rows before the cut."""

    def add_gradient(self, into: Tensor | None, gradient: Tensor, weight: float) -> Tensor:
        """[rows, dim], `into` (null: 0) + weight * the gradient of the whole rows, given that of the shortened ones.

        Through u = c / |c| it is (g - (g . u) u) / |c|.
        """
        if self.length is not None:
            along = (gradient * self.rows).sum(dim=1, keepdim=True)
            gradient = (gradient - along * self.rows) / self.length
        if into is None and gradient.shape[1] == self.whole_dim:
            return gradient if weight == 1.0 else gradient * weight
        if into is None:
            into = gradient.new_zeros(len(gradient), self.whole_dim)
        into[:, : gradient.shape[1]] += gradient * weight
        return into


def shorten(rows: Tensor, width: Width, *, normalize: bool) -> Shortened:
    """[rows, dim] rows at a width; the whole rows are taken as they are, without normalization."""
    if width.dim is None:
        return Shortened(rows=rows, length=None, whole_dim=rows.shape[1])
    cut = rows[:, : width.dim]
    if not normalize:
        return Shortened(rows=cut.contiguous(), length=None, whole_dim=rows.shape[1])
    length = cut.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return Shortened(rows=cut / length, length=length, whole_dim=rows.shape[1])


def cut(rows: Tensor, width: Width, *, normalize: bool) -> Tensor:
    """The same with a graph, for losses by autograd."""
    if width.dim is None:
        return rows
    return functional.normalize(rows[:, : width.dim], dim=1) if normalize else rows[:, : width.dim]
