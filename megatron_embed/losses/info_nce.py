"""Contrastive losses: a query's positive against all other candidates, plain and tiled with a closed-form gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

Direction = Literal["query_to_document", "query_to_query", "document_to_document", "document_to_query"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

MaskTile = Callable[[int, int], Tensor]
"""(first row, last row + 1) -> bool for those rows and every column. A whole mask exists at no time."""

TILE_ELEMENTS = 1 << 24
"""Similarities computed at once: 64 MiB of float32, whatever the number of candidates."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What InfoNCE makes of similarities; the vectors apart."""

    temperature: float
    """Divides the similarity, > 0."""
    directions: tuple[Direction, ...] = ("query_to_document",)
    """What is in the denominator; `query_to_document` first. A row's anchor is its query, in `document_to_...` its
    positive; the columns are all documents or all queries. Columns of several directions lie side by side."""
    joint: bool = True
    """One softmax over all directions; else one per direction, of which the mean counts."""
    margin: float | None = None
    """A column whose similarity exceeds the positive's by more than this is no negative; null: off."""
    relative: bool = False
    """The margin is a share of the positive's similarity (its absolute value)."""
    hardness: Hardness | None = None
    """Which negative documents get `hardness_strength * similarity`, without gradient, added to their logits."""
    hardness_strength: float = 0.0
    bias: float | None = None
    """Set: SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343), for each column on its own, instead of the softmax: with
    logit = similarity / temperature + bias, -log sigmoid(logit) of the positive and -log sigmoid(-logit) of all others;
    of queries to documents alone."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What rows are compared with. Masks span the columns of all directions."""

    document: Tensor
    """[candidates, dim]."""
    positive_index: Tensor
    """[rows] int64, each row's positive in `document`."""
    query: Tensor | None = None
    """[queries, dim]; needed by the directions to queries."""
    query_index: Tensor | None = None
    """[rows] int64, each row's own query in `query`."""
    left_out: MaskTile | None = None
    """True where a column never was meant as a negative; false at the positive."""
    excluded: MaskTile | None = None
    """True where a column is no negative because it is known to be right; false at the positive."""
    own: MaskTile | None = None
    """Over the documents alone: true where one was given for the row's query. Needed by `hardness` of some."""

    def keys(self, direction: Direction) -> Tensor:
        """The vectors of a direction's columns."""
        if direction.endswith("document"):
            return self.document
        assert self.query is not None, "directions to queries need the queries"
        return self.query


@dataclass(frozen=True, kw_only=True)
class InfoNCESums:
    """Sums over the rows of one call, so that ranks can add theirs; float64 so that the order does not show.

    Similarities, margins and `correct` are those of queries to documents.
    """

    loss: Tensor
    correct: Tensor
    """Rows whose positive scores highest."""
    positive_similarity: Tensor
    negative_similarity: Tensor
    """Sum over rows of the mean similarity to the row's negatives."""
    margin: Tensor
    """Sum over rows of positive similarity minus the highest negative similarity."""
    negatives: Tensor
    """Columns that count as negatives, all rows and directions together."""
    masked: Tensor
    """Columns that are no negatives because they are right, or too similar."""

    def stacked(self) -> Tensor:
        """[7] float64 in the order of the fields."""
        return torch.stack([self.loss, self.correct, self.positive_similarity, self.negative_similarity, self.margin,
                            self.negatives, self.masked])


@dataclass(frozen=True, kw_only=True)
class InfoNCEGradients:
    """Gradients of `weighted loss of these rows / total`."""

    sums: InfoNCESums
    rows: Tensor
    """[rows, dim], of the rows' queries as anchors."""
    document: Tensor
    """[candidates, dim]."""
    query: Tensor | None
    """[queries, dim], of the queries as columns; null where no direction needs them."""
    log_scale: Tensor
    """Scalar float64, with respect to log(1 / temperature)."""
    bias: Tensor
    """Scalar float64, with respect to the bias; 0 without one."""


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


def contrast_loss(query: Tensor, candidates: Candidates, contrast: Contrast, *, total: float,
                  weights: Tensor | None = None) -> Tensor:
    """What `contrast_gradients` differentiates, by autograd and with all similarities at once: for comparison.

    Returns:
        Scalar, the weighted sum over these rows / total.
    """
    rows, positives = len(query), candidates.positive_index
    anchors = {True: query, False: candidates.document[positives]}
    parts = [anchors[direction.startswith("query")] @ candidates.keys(direction).T for direction in contrast.directions]
    similarity = torch.cat(parts, dim=1)
    widths = [part.shape[1] for part in parts]
    left_out, excluded = _masks(similarity.detach(), candidates, contrast, widths, 0, rows)
    logits = similarity / contrast.temperature
    penalty = _penalty(similarity.detach(), candidates, contrast, 0, rows)
    if penalty is not None:
        logits = torch.cat([logits[:, : widths[0]] + penalty, logits[:, widths[0] :]], dim=1)
    for mask in (left_out, excluded):
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
    if contrast.bias is not None:
        signs = torch.full_like(logits, -1.0).scatter_(1, positives[:, None], 1.0)
        losses = -functional.logsigmoid(signs * (logits + contrast.bias)).sum(dim=1)
    else:
        spans = [logits] if contrast.joint else list(torch.split(logits, widths, dim=1))
        normalizer = torch.stack([span.logsumexp(dim=1) for span in spans]).mean(dim=0)
        losses = normalizer - logits.gather(1, positives[:, None])[:, 0]
    return (losses if weights is None else losses * weights).sum() / total


def contrast_gradients(query: Tensor, candidates: Candidates, contrast: Contrast, *, total: float,
                       weights: Tensor | None = None) -> InfoNCEGradients:
    """InfoNCE over all directions and its gradient in closed form, by tiles of rows against all columns.

    One row's loss is log(sum over its columns of exp(logit)) - logit of its positive, where a logit is similarity /
    temperature. With p the softmax of a row's logits and y its one-hot positive, d loss / d logits = (p - y) / total;
    two further products per direction give the gradients of anchors and columns. The directions are those of GTE (Li
    et al. 2023, arXiv:2308.03281) and Qwen3-Embedding (Zhang et al. 2025, arXiv:2506.05176); the hardness weights those
    of Lan et al. 2025 (arXiv:2503.04812, in-batch negatives) and EmbeddingGemma (arXiv:2509.20354, hard negatives).

    Where a document is too similar to the query (`margin`), it is a column neither of the query nor of the positive.
    Memory beyond inputs and outputs is one tile (TILE_ELEMENTS similarities) and its masks; no graph is built.

    Args:
        query: [rows, dim], float32 or float64, unit length for cosine similarity; no rows at all are allowed.
        candidates: the columns.
        contrast: the settings.
        total: rows of the whole batch, over which the loss is a mean.
        weights: [rows], of each row's loss; null: 1.
    Returns:
        Sums over these rows and gradients. No communication.
    """
    rows, directions = query.shape[0], contrast.directions
    keys = [candidates.keys(direction) for direction in directions]
    widths = [len(key) for key in keys]
    tile = max(1, min(rows, TILE_ELEMENTS // max(1, sum(widths))))
    buffer = query.new_empty(min(tile, rows), sum(widths))
    grad_rows, grad_document = torch.zeros_like(query), torch.zeros_like(candidates.document)
    grad_query = None if candidates.query is None else torch.zeros_like(candidates.query)
    sums = torch.zeros(7, dtype=torch.float64, device=query.device)
    log_scale, bias = torch.zeros(2, dtype=torch.float64, device=query.device)
    for first in range(0, rows, tile):
        last = min(first + tile, rows)
        positives = candidates.positive_index[first:last]
        asking = query[first:last]
        answering = candidates.document[positives] if len(directions) > 1 else asking
        anchors = [asking if direction.startswith("query") else answering for direction in directions]
        scores = buffer[: last - first]
        for anchor, key, span in zip(anchors, keys, torch.split(scores, widths, dim=1), strict=True):
            torch.mm(anchor, key.T, out=span)
        share = None if weights is None else weights[first:last, None]
        sums += _to_gradient(scores, candidates, contrast, widths, first, last, share)
        if contrast.bias is not None:
            bias += scores.sum(dtype=torch.float64) / total
        scores /= total * contrast.temperature
        parts = torch.split(scores, widths, dim=1)
        for direction, anchor, key, span in zip(directions, anchors, keys, parts, strict=True):
            grad_anchor = span @ key
            log_scale += (grad_anchor * anchor).sum(dtype=torch.float64)
            if direction.startswith("query"):
                grad_rows[first:last] += grad_anchor
            else:
                grad_document.index_add_(0, positives, grad_anchor)
            grad_key = grad_document if direction.endswith("document") else grad_query
            assert grad_key is not None
            grad_key.addmm_(span.T, anchor)
    return InfoNCEGradients(sums=InfoNCESums(**dict(zip(InfoNCESums.__dataclass_fields__, sums, strict=True))),
                            rows=grad_rows, document=grad_document, query=grad_query, log_scale=log_scale, bias=bias)


def _to_gradient(scores: Tensor, candidates: Candidates, contrast: Contrast, widths: list[int], first: int, last: int,
                 weights: Tensor | None) -> Tensor:
    """[7] float64 sums of a tile, whose similarities become d loss / d logits in place, weighted, not yet / total."""
    column = candidates.positive_index[first:last, None]
    left_out, excluded = _masks(scores, candidates, contrast, widths, first, last)
    neither = left_out if excluded is None else excluded if left_out is None else left_out | excluded
    sums = _tile_sums(scores[:, : widths[0]], column, None if neither is None else neither[:, : widths[0]])
    masked = 0 if excluded is None else excluded.sum()
    # Its own positive is a column of each row, and of its positive towards queries its own query: no negatives.
    right = sum(direction in ("query_to_document", "document_to_query") for direction in contrast.directions)
    sums[6] = masked
    sums[5] = scores.numel() - right * len(scores) - (0 if neither is None else neither.sum())
    penalty = _penalty(scores, candidates, contrast, first, last)
    scores /= contrast.temperature
    if penalty is not None:
        scores[:, : widths[0]] += penalty
    if neither is not None:
        scores.masked_fill_(neither, float("-inf"))
    loss = _sigmoid(scores, column, contrast.bias) if contrast.bias is not None else _softmax(
        scores, column, [scores] if contrast.joint else list(torch.split(scores, widths, dim=1)))
    if weights is not None:
        scores *= weights
        loss = loss * weights
    sums[0] = loss.sum(dtype=torch.float64)
    return sums


def _sigmoid(logits: Tensor, column: Tensor, bias: float) -> Tensor:
    """[rows, 1] losses of a tile, whose logits become their gradient in place."""
    logits += bias
    loss = functional.softplus(logits).sum(dim=1, keepdim=True) - logits.gather(1, column)
    logits.sigmoid_().scatter_add_(1, column, logits.new_full(column.shape, -1.0))
    return loss


def _softmax(scores: Tensor, column: Tensor, spans: list[Tensor]) -> Tensor:
    """[rows, 1] losses of a tile, one softmax per span of columns; its logits become their gradient in place."""
    at_positive = scores.gather(1, column)
    loss = -at_positive
    for span in spans:
        normalizer = torch.logsumexp(span, dim=1, keepdim=True)
        loss = loss + normalizer / len(spans)
        span.sub_(normalizer).exp_()
    if len(spans) > 1:
        scores /= len(spans)
    scores.scatter_add_(1, column, torch.full_like(at_positive, -1.0))
    return loss


def _masks(scores: Tensor, candidates: Candidates, contrast: Contrast, widths: list[int], first: int,
           last: int) -> tuple[Tensor | None, Tensor | None]:
    """([rows, columns] bool, the columns never meant as negatives; the same, those that are right or too similar)."""
    left_out = None if candidates.left_out is None else candidates.left_out(first, last)
    excluded = None if candidates.excluded is None else candidates.excluded(first, last)
    if contrast.margin is not None:
        column = candidates.positive_index[first:last, None]
        positive = scores.gather(1, column)
        similar = scores > positive + contrast.margin * (positive.abs() if contrast.relative else 1.0)
        spans = dict(zip(contrast.directions, torch.split(similar, widths, dim=1), strict=True))
        spans["query_to_document"].scatter_(1, column, False)
        if "document_to_document" in spans:
            spans["document_to_document"].copy_(spans["query_to_document"])
        if "document_to_query" in spans:
            assert candidates.query_index is not None
            spans["document_to_query"].scatter_(1, candidates.query_index[first:last, None], False)
        excluded = similar if excluded is None else excluded | similar
    if left_out is not None and excluded is not None:
        excluded = excluded & ~left_out
    return left_out, excluded


def _penalty(scores: Tensor, candidates: Candidates, contrast: Contrast, first: int, last: int) -> Tensor | None:
    """[rows, candidates], what hardness adds to the logits of queries to documents."""
    if contrast.hardness is None:
        return None
    penalty = contrast.hardness_strength * scores[:, : len(candidates.document)]
    if contrast.hardness != "all_negatives":
        assert candidates.own is not None
        own = candidates.own(first, last)
        penalty = penalty.masked_fill(own if contrast.hardness == "in_batch_negatives" else ~own, 0.0)
    return penalty.scatter_(1, candidates.positive_index[first:last, None], 0.0)


def _tile_sums(similarity: Tensor, column: Tensor, neither: Tensor | None) -> Tensor:
    """[7] float64 sums of one tile of queries against documents, loss and counts left at 0; it is restored."""
    positive = similarity.gather(1, column)
    rows, candidates = similarity.shape
    total, absent = similarity.sum(dim=1, keepdim=True), torch.zeros_like(positive)
    if neither is not None:
        absent = neither.sum(dim=1, keepdim=True).to(positive.dtype)
        total = total - torch.where(neither, similarity, 0.0).sum(dim=1, keepdim=True)
    count = candidates - 1 - absent
    similarity.scatter_(1, column, float("-inf"))
    candidates_only = similarity if neither is None else similarity.masked_fill(neither, float("-inf"))
    hardest = candidates_only.amax(dim=1, keepdim=True)
    similarity.scatter_(1, column, positive)
    some = count > 0
    mean_negative = torch.where(some, (total - positive) / count.clamp(min=1), 0.0)
    margin = torch.where(some, positive - hardest, 0.0)
    zero = positive.new_zeros(rows, 1)
    correct = (positive > hardest).to(positive.dtype)
    columns = torch.cat([zero, correct, positive, mean_negative, margin, zero, zero], dim=1)
    return columns.sum(dim=0, dtype=torch.float64)
