"""Any loss over several leading parts of the same embeddings (Kusupati et al. 2022, arXiv:2205.13147), at several
precisions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.names import Precision


@dataclass(frozen=True, kw_only=True)
class MatryoshkaDim:
    """One dimension of a loss, at one precision."""

    dim: int | None
    """Leading components of an embedding; None: the embeddings as they are."""
    weight: float
    precision: Precision = "float32"

    @property
    def name(self) -> str:
        """What tells it from the others of a loss: `64`, `64@binary`, `binary`."""
        parts = ([] if self.dim is None else [str(self.dim)])
        return "@".join([*parts, self.precision] if self.precision != "float32" or not parts else parts)


def matryoshka_dims(dims: Sequence[int], weights: Sequence[float], precisions: Sequence[Precision] = ("float32",),
                    precision_weights: Sequence[float] = ()) -> tuple[MatryoshkaDim, ...]:
    """The dimensions of a loss: those given, with their weights or 1 each; without any, the whole embeddings. Each at
    every precision, whose weight multiplies that of the dimension."""
    widths: Sequence[int | None] = dims or [None]
    return tuple(MatryoshkaDim(dim=dim, precision=precision, weight=weight * factor)
                 for dim, weight in zip(widths, weights or [1.0] * len(widths), strict=True)
                 for precision, factor in zip(precisions, precision_weights or [1.0] * len(precisions), strict=True))


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Embeddings truncated to a dimension and, if normalized ones are asked for, brought back to unit length."""

    embeddings: Tensor
    """[rows, truncated dim]."""
    length: Tensor | None
    """[rows, 1], what the truncated embeddings were divided by; None: nothing."""
    whole_dim: int
    """Dimension before the truncation."""

    def add_gradient(self, into: Tensor | None, gradient: Tensor, weight: float) -> Tensor:
        """[rows, dim], `into` (None: 0) + weight * the gradient of the whole embeddings, given that of the truncated.

        Through u = c / |c| it is (g - (g . u) u) / |c|.
        """
        if self.length is not None:
            along = (gradient * self.embeddings).sum(dim=1, keepdim=True)
            gradient = (gradient - along * self.embeddings) / self.length
        if into is None and gradient.shape[1] == self.whole_dim:
            return gradient if weight == 1.0 else gradient * weight
        if into is None:
            into = gradient.new_zeros(len(gradient), self.whole_dim)
        into[:, : gradient.shape[1]] += gradient * weight
        return into


def truncate(embeddings: Tensor, matryoshka: MatryoshkaDim, *, normalize: bool) -> Truncated:
    """[rows, dim] embeddings at a dimension; whole embeddings are taken as they are, without normalization."""
    if matryoshka.dim is None:
        return Truncated(embeddings=embeddings, length=None, whole_dim=embeddings.shape[1])
    leading = embeddings[:, : matryoshka.dim]
    if not normalize:
        return Truncated(embeddings=leading.contiguous(), length=None, whole_dim=embeddings.shape[1])
    length = leading.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return Truncated(embeddings=leading / length, length=length, whole_dim=embeddings.shape[1])


def truncate_with_graph(embeddings: Tensor, matryoshka: MatryoshkaDim, *, normalize: bool) -> Tensor:
    """[rows, truncated dim], differentiable, for losses by autograd."""
    if matryoshka.dim is None:
        return embeddings
    leading = embeddings[:, : matryoshka.dim]
    return functional.normalize(leading, dim=1) if normalize else leading
