"""InfoNCE: each query's positive against every other document, plain (autograd) and tiled (closed-form gradient)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

ExcludedTile = Callable[[int, int], Tensor]
"""(first row, last row + 1) -> [those rows, candidates] bool, true where a candidate is no negative; false at the
positive. The whole mask exists at no time."""

TILE_ELEMENTS = 1 << 24
"""Similarities computed at once: 64 MiB of float32, whatever the number of candidates."""


@dataclass(frozen=True, kw_only=True)
class InfoNCESums:
    """Sums over the rows of one call, so that ranks can add theirs; float64 so that the order does not show."""

    loss: Tensor
    correct: Tensor
    """Rows whose positive scores highest."""
    positive_similarity: Tensor
    negative_similarity: Tensor
    """Sum over rows of the mean similarity to the row's negatives."""
    margin: Tensor
    """Sum over rows of positive similarity minus the highest negative similarity."""
    negatives: Tensor
    """Candidates that count as negatives, all rows together."""
    masked: Tensor
    """Candidates left out by `excluded`, all rows together."""

    def stacked(self) -> Tensor:
        """[7] float64 in the order of the fields."""
        return torch.stack([self.loss, self.correct, self.positive_similarity, self.negative_similarity, self.margin,
                            self.negatives, self.masked])


def info_nce(query: Tensor, document: Tensor, positive_index: Tensor, temperature: float,
             excluded: Tensor | None = None) -> Tensor:
    """Mean InfoNCE of each query row against every document row (van den Oord et al. 2018, arXiv:1807.03748).

    Args:
        query: [batch, dim], unit length for cosine similarity.
        document: [candidates, dim], already gathered if it spans ranks.
        positive_index: [batch] int64, row of each query's positive in `document`.
        temperature: divides the similarity, > 0.
        excluded: [batch, candidates] bool, true where a document is no negative; false at the positive.
    Returns:
        Scalar of the inputs' dtype (at least float32), mean over these rows. No communication.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ document.to(dtype).T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    return functional.cross_entropy(logits, positive_index)


def info_nce_gradients(query: Tensor, document: Tensor, positive_index: Tensor, temperature: float, *, total: float,
                       excluded: ExcludedTile | None = None) -> tuple[InfoNCESums, Tensor, Tensor]:
    """The same loss and its gradient in closed form, by tiles of query rows against all documents.

    With p the softmax of a row's logits and y its one-hot positive, d loss / d logits = (p - y) / total; the two
    further products give the gradients of queries and documents. Memory beyond inputs and outputs is one tile
    (TILE_ELEMENTS similarities); no graph is built.

    Args:
        query, document, positive_index, temperature: as in `info_nce`, float32 or float64; no rows at all are allowed.
        total: rows of the whole batch, over which the loss is a mean; >= the rows given here.
        excluded: the mask, asked for tile by tile.
    Returns:
        (sums over these rows, [batch, dim] gradient of the queries, [candidates, dim] gradient of the documents), both
        gradients of `sum over these rows / total`. No communication.
    """
    rows, candidates = query.shape[0], document.shape[0]
    tile = max(1, min(rows, TILE_ELEMENTS // max(1, candidates)))
    scores = query.new_empty(min(tile, rows), candidates)
    grad_query, grad_document = torch.empty_like(query), torch.zeros_like(document)
    sums = torch.zeros(7, dtype=torch.float64, device=query.device)
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        part, positives = query[first:last], positive_index[first:last]
        logits = torch.mm(part, document.T, out=scores[: last - first])
        hidden = None if excluded is None else excluded(first, last)
        sums += _tile_sums(logits, positives, hidden)
        logits /= temperature
        if hidden is not None:
            logits.masked_fill_(hidden, float("-inf"))
        at_positive = logits.gather(1, positives[:, None])
        normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
        sums[0] += (normalizer - at_positive).sum(dtype=torch.float64)
        weights = logits.sub_(normalizer).exp_()
        weights.scatter_add_(1, positives[:, None], torch.full_like(at_positive, -1.0))
        weights /= total * temperature
        torch.mm(weights, document, out=grad_query[first:last])
        grad_document.addmm_(weights.T, part)
    return InfoNCESums(**dict(zip(InfoNCESums.__dataclass_fields__, sums, strict=True))), grad_query, grad_document


def _tile_sums(similarity: Tensor, positives: Tensor, excluded: Tensor | None) -> Tensor:
    """[7] float64 sums of one tile, loss left at 0. `similarity` is restored before it returns."""
    column = positives[:, None]
    positive = similarity.gather(1, column)
    rows, candidates = similarity.shape
    total, masked = similarity.sum(dim=1, keepdim=True), torch.zeros_like(positive)
    if excluded is not None:
        masked = excluded.sum(dim=1, keepdim=True).to(positive.dtype)
        total = total - torch.where(excluded, similarity, 0.0).sum(dim=1, keepdim=True)
    count = candidates - 1 - masked
    similarity.scatter_(1, column, float("-inf"))
    candidates_only = similarity if excluded is None else similarity.masked_fill(excluded, float("-inf"))
    hardest = candidates_only.amax(dim=1, keepdim=True)
    similarity.scatter_(1, column, positive)
    some = count > 0
    mean_negative = torch.where(some, (total - positive) / count.clamp(min=1), 0.0)
    margin = torch.where(some, positive - hardest, 0.0)
    zero = positive.new_zeros(rows, 1)
    correct = (positive > hardest).to(positive.dtype)
    columns = torch.cat([zero, correct, positive, mean_negative, margin, count, masked], dim=1)
    return columns.sum(dim=0, dtype=torch.float64)
