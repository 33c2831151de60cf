"""Contrastive losses: a query's positive against all other candidates, plain and tiled with a closed-form gradient.

Per tile of rows: similarity -> logits -> gradient of the loss with respect to the logits -> gradients of the vectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.names import LOSS_TILE_ELEMENTS, Direction, Hardness

MaskTile = Callable[[int, int], Tensor]
"""(first row, last row + 1) -> bool for those rows and every column. A whole mask exists at no time."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings:
    """The settings that turn similarities into logits and a loss."""

    temperature: float
    """Divides the similarity, > 0."""
    directions: tuple[Direction, ...] = ("query_to_document",)
    """The pairs that enter the softmax's denominator, `query_to_document` first. A row's anchor is its query, in
    `document_to_...` its positive; the columns are all documents or all queries. The logits of several directions are
    concatenated along the columns."""
    joint: bool = True
    """One softmax over all directions; else one per direction, of which the mean counts."""
    mask_margin: float | None = None
    """A column whose similarity exceeds the positive's by more than this is excluded; None: off."""
    relative: bool = False
    """The margin is a share of the positive's similarity (its absolute value)."""
    hardness: Hardness | None = None
    """The negative documents to whose logits `hardness_strength * similarity` is added, without gradient."""
    hardness_strength: float = 0.0
    bias: float | None = None
    """Set: SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343), for each column on its own, instead of the softmax: with
    logit = similarity / temperature + bias, -log sigmoid(logit) of the positive and -log sigmoid(-logit) of all others;
    of queries to documents alone."""

    @property
    def num_positive_columns(self) -> int:
        """Columns of a row that hold its positive or, as a column of its positive, its own query."""
        return sum(direction in ("query_to_document", "document_to_query") for direction in self.directions)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The vectors that rows are compared with, and which of them are not negatives. Masks span all directions."""

    document: Tensor
    """[candidates, dim]."""
    positive_index: Tensor
    """[rows] int64, each row's positive in `document`."""
    query: Tensor | None = None
    """[queries, dim]; needed by the directions to queries."""
    query_index: Tensor | None = None
    """[rows] int64, each row's own query in `query`."""
    ignored: MaskTile | None = None
    """True where a column was never meant as a negative; false at the positive."""
    excluded: MaskTile | None = None
    """True where a column is known to be relevant and therefore not a negative; false at the positive."""
    own: MaskTile | None = None
    """Over the documents alone: true where one was given for the row's query. Needed if `hardness` is
    in_batch_negatives or hard_negatives."""

    def keys(self, direction: Direction) -> Tensor:
        """The vectors of a direction's columns."""
        if direction.endswith("document"):
            return self.document
        assert self.query is not None, "directions to queries need the queries"
        return self.query


class InfoNCESums(NamedTuple):
    """Sums over the rows of one call, so that ranks can add theirs; float64 so that their order does not matter.

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
    masked: Tensor
    """Columns that are excluded: known to be relevant, or too similar."""
    negatives: Tensor
    """Columns that count as negatives, all rows and directions together."""


@dataclass(frozen=True, kw_only=True)
class InfoNCEGradients:
    """Gradients of sum(weight * loss of a row) / total."""

    sums: InfoNCESums
    anchor: Tensor
    """[rows, dim], with respect to the rows' queries as anchors."""
    document: Tensor
    """[candidates, dim]."""
    query: Tensor | None
    """[queries, dim], with respect to the queries as columns; None if no direction needs them."""
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
        excluded: [batch, candidates] bool, true where a document is not a negative; false at the positive.
    Returns:
        Scalar of the inputs' dtype (at least float32), mean over these rows. No communication.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ document.to(dtype).T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    return functional.cross_entropy(logits, positive_index)


def contrastive_gradients(query: Tensor, candidates: Candidates, settings: ContrastiveSettings, *, total: float,
                          weights: Tensor | None = None) -> InfoNCEGradients:
    """InfoNCE over all directions and its gradient in closed form, by tiles of rows against all columns.

    One row's loss is log(sum over its columns of exp(logit)) - logit of its positive, where a logit is similarity /
    temperature. With p the softmax of a row's logits and y its one-hot positive, d loss / d logits = (p - y) / total;
    two further products per direction give the gradients of anchors and columns. The directions are those of GTE (Li
    et al. 2023, arXiv:2308.03281) and Qwen3-Embedding (Zhang et al. 2025, arXiv:2506.05176); the hardness weights those
    of Lan et al. 2025 (arXiv:2503.04812, in-batch negatives) and EmbeddingGemma (arXiv:2509.20354, hard negatives).

    If a document is too similar to the query (`mask_margin`), it is a column neither of the query nor of the positive.
    Memory beyond inputs and outputs is one tile (LOSS_TILE_ELEMENTS similarities) and its masks; no graph is built.

    Args:
        query: [rows, dim], float32 or float64, unit length for cosine similarity; may have no rows.
        candidates: the columns.
        settings: the loss.
        total: rows of the whole batch, over which the loss is a mean.
        weights: [rows], of each row's loss; None: 1.
    Returns:
        Sums over these rows and gradients. No communication.
    """
    keys = [candidates.keys(direction) for direction in settings.directions]
    widths = [len(key) for key in keys]
    rows_per_tile = max(1, min(len(query), LOSS_TILE_ELEMENTS // max(1, sum(widths))))
    buffer = query.new_empty(min(rows_per_tile, len(query)), sum(widths))
    sums = torch.zeros(len(InfoNCESums._fields), dtype=torch.float64, device=query.device)
    gradients = _Gradients(query, candidates, settings, total)
    for first in range(0, len(query), rows_per_tile):
        tile = _Tile(candidates, settings, widths, first, min(first + rows_per_tile, len(query)))
        anchors = tile.anchors(query)
        similarity = tile.similarity(anchors, keys, buffer)
        tile_sums, grad_logits = tile.grad_logits(similarity, None if weights is None else weights[tile.rows, None])
        sums += tile_sums
        gradients.add(tile, anchors, keys, grad_logits)
    return gradients.result(InfoNCESums(*sums))


def similarity_gradients(similarity: Tensor, candidates: Candidates, settings: ContrastiveSettings, *, first: int,
                         total: float, weights: Tensor | None = None) -> InfoNCESums:
    """The loss of `contrastive_gradients`, of queries to documents, from similarities that are known.

    Args:
        similarity: [rows, candidates], of rows `first`, `first + 1`, ... of `candidates`; becomes the gradient of
            sum(weight * loss of a row) / total with respect to it.
        candidates: the columns; their vectors are not used.
        total: rows of the whole batch, over which the loss is a mean.
        weights: [rows], of each row's loss; None: 1.
    """
    tile = _Tile(candidates, settings, [similarity.shape[1]], first, first + len(similarity))
    sums, gradient = tile.grad_logits(similarity, None if weights is None else weights[:, None])
    gradient /= total * settings.temperature
    return InfoNCESums(*sums)


@dataclass(frozen=True)
class _Tile:
    """Rows `first` to `last - 1` against all columns. Large intermediate results overwrite each other."""

    candidates: Candidates
    settings: ContrastiveSettings
    widths: list[int]
    """Columns of each direction."""
    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def positive_column(self) -> Tensor:
        """[rows, 1] int64."""
        return self.candidates.positive_index[self.rows, None]

    def split(self, columns: Tensor) -> tuple[Tensor, ...]:
        """[rows, all columns] as views of [rows, columns of a direction]."""
        return torch.split(columns, self.widths, dim=1)

    def anchors(self, query: Tensor) -> list[Tensor]:
        """Per direction [rows, dim]: the queries, or their positives in `document_to_...`."""
        queries, directions = query[self.rows], self.settings.directions
        positives = queries
        if len(directions) > 1:
            positives = self.candidates.document[self.candidates.positive_index[self.rows]]
        return [queries if direction.startswith("query") else positives for direction in directions]

    def similarity(self, anchors: Sequence[Tensor], keys: Sequence[Tensor], buffer: Tensor) -> Tensor:
        """[rows, all columns] in `buffer`."""
        similarity = buffer[: self.last - self.first]
        for anchor, key, span in zip(anchors, keys, self.split(similarity), strict=True):
            torch.mm(anchor, key.T, out=span)
        return similarity

    def grad_logits(self, similarity: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """([7] float64 InfoNCESums, [rows, all columns] weighted gradient of the summed loss with respect to the
        logits, which overwrites `similarity`)."""
        settings = self.settings
        ignored, excluded = self._masks(similarity)
        masked = ignored if excluded is None else excluded if ignored is None else ignored | excluded
        sums = self._statistics(similarity, excluded, masked)
        logits = self._logits(similarity, masked)
        if settings.bias is not None:
            loss, grad_logits = _sigmoid_loss(logits, self.positive_column, settings.bias)
        else:
            spans = [logits] if settings.joint else list(self.split(logits))
            loss, grad_logits = _softmax_loss(logits, self.positive_column, spans)
        if weights is not None:
            grad_logits *= weights
            loss = loss * weights
        sums[0] = loss.sum(dtype=torch.float64)
        return sums, grad_logits

    def _logits(self, similarity: Tensor, masked: Tensor | None) -> Tensor:
        """[rows, all columns], -inf where a column is masked; overwrites `similarity`."""
        bonus = self._hardness_bonus(similarity)
        similarity /= self.settings.temperature
        if bonus is not None:
            similarity[:, : self.widths[0]] += bonus
        if masked is not None:
            similarity.masked_fill_(masked, float("-inf"))
        return similarity

    def _masks(self, similarity: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """([rows, all columns] bool, the columns never meant as negatives; the same, those that are known to be
        relevant or too similar)."""
        ignored = None if self.candidates.ignored is None else self.candidates.ignored(self.first, self.last)
        excluded = None if self.candidates.excluded is None else self.candidates.excluded(self.first, self.last)
        if self.settings.mask_margin is not None:
            similar = self._too_similar(similarity, self.settings.mask_margin)
            excluded = similar if excluded is None else excluded | similar
        if ignored is not None and excluded is not None:
            excluded = excluded & ~ignored
        return ignored, excluded

    def _too_similar(self, similarity: Tensor, margin: float) -> Tensor:
        """[rows, all columns] bool: the similarity exceeds the positive's by more than the margin."""
        positive = similarity.gather(1, self.positive_column)
        similar = similarity > positive + margin * (positive.abs() if self.settings.relative else 1.0)
        spans = dict(zip(self.settings.directions, self.split(similar), strict=True))
        spans["query_to_document"].scatter_(1, self.positive_column, False)
        if "document_to_document" in spans:
            spans["document_to_document"].copy_(spans["query_to_document"])
        if "document_to_query" in spans:
            assert self.candidates.query_index is not None
            spans["document_to_query"].scatter_(1, self.candidates.query_index[self.rows, None], False)
        return similar

    def _hardness_bonus(self, similarity: Tensor) -> Tensor | None:
        """[rows, candidates], what hardness adds to the logits of queries to documents."""
        settings = self.settings
        if settings.hardness is None:
            return None
        bonus = settings.hardness_strength * similarity[:, : self.widths[0]]
        if settings.hardness != "all_negatives":
            assert self.candidates.own is not None
            own = self.candidates.own(self.first, self.last)
            bonus = bonus.masked_fill(own if settings.hardness == "in_batch_negatives" else ~own, 0.0)
        return bonus.scatter_(1, self.positive_column, 0.0)

    def _statistics(self, similarity: Tensor, excluded: Tensor | None, masked: Tensor | None) -> Tensor:
        """[7] float64 InfoNCESums of this tile, the loss left at 0."""
        documents = None if masked is None else masked[:, : self.widths[0]]
        sums = similarity.new_zeros(len(InfoNCESums._fields), dtype=torch.float64)
        sums[1:5] = _similarity_sums(similarity[:, : self.widths[0]], self.positive_column, documents)
        # A number that is assigned to an element would be copied to the device, and waited for.
        sums[6].fill_(similarity.numel() - self.settings.num_positive_columns * len(similarity))
        if excluded is not None:
            sums[5] = excluded.sum()
        if masked is not None:
            sums[6] -= masked.sum()
        return sums


class _Gradients:
    """Gradients of the vectors, the scale and the bias, summed over tiles."""

    def __init__(self, query: Tensor, candidates: Candidates, settings: ContrastiveSettings, total: float) -> None:
        self.settings, self.total = settings, total
        self.anchor, self.document = torch.zeros_like(query), torch.zeros_like(candidates.document)
        self.query = None if candidates.query is None else torch.zeros_like(candidates.query)
        self.log_scale, self.bias = torch.zeros(2, dtype=torch.float64, device=query.device)

    def add(self, tile: _Tile, anchors: Sequence[Tensor], keys: Sequence[Tensor], grad_logits: Tensor) -> None:
        """Adds a tile's share, given d loss / d logits, which is overwritten."""
        if self.settings.bias is not None:
            self.bias += grad_logits.sum(dtype=torch.float64) / self.total
        grad_logits /= self.total * self.settings.temperature
        spans = tile.split(grad_logits)  # now d loss / d similarity
        for direction, anchor, key, grad_similarity in zip(self.settings.directions, anchors, keys, spans, strict=True):
            grad_anchor = grad_similarity @ key
            self.log_scale += (grad_anchor * anchor).sum(dtype=torch.float64)
            if direction.startswith("query"):
                self.anchor[tile.rows] += grad_anchor
            else:
                self.document.index_add_(0, tile.candidates.positive_index[tile.rows], grad_anchor)
            grad_key = self.document if direction.endswith("document") else self.query
            assert grad_key is not None
            grad_key.addmm_(grad_similarity.T, anchor)

    def result(self, sums: InfoNCESums) -> InfoNCEGradients:
        return InfoNCEGradients(sums=sums, anchor=self.anchor, document=self.document, query=self.query,
                                log_scale=self.log_scale, bias=self.bias)


def _sigmoid_loss(logits: Tensor, positive_column: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """([rows, 1] losses, their gradient with respect to the logits, which it overwrites)."""
    logits += bias
    loss = functional.softplus(logits).sum(dim=1, keepdim=True) - logits.gather(1, positive_column)
    grad_logits = logits.sigmoid_().scatter_add_(1, positive_column, logits.new_full(positive_column.shape, -1.0))
    return loss, grad_logits


def _softmax_loss(logits: Tensor, positive_column: Tensor, spans: list[Tensor]) -> tuple[Tensor, Tensor]:
    """([rows, 1] losses of one softmax per span of columns, their gradient with respect to the logits, which it
    overwrites)."""
    at_positive = logits.gather(1, positive_column)
    loss = -at_positive
    for span in spans:
        normalizer = torch.logsumexp(span, dim=1, keepdim=True)
        loss = loss + normalizer / len(spans)
        span.sub_(normalizer).exp_()
    if len(spans) > 1:
        logits /= len(spans)
    return loss, logits.scatter_add_(1, positive_column, torch.full_like(at_positive, -1.0))


def _similarity_sums(similarity: Tensor, positive_column: Tensor, masked: Tensor | None) -> Tensor:
    """[4] float64: correct, positive similarity, mean negative similarity, margin. `similarity` is restored."""
    positive = similarity.gather(1, positive_column)
    total, num_masked = similarity.sum(dim=1, keepdim=True), torch.zeros_like(positive)
    if masked is not None:
        num_masked = masked.sum(dim=1, keepdim=True).to(positive.dtype)
        total = total - torch.where(masked, similarity, 0.0).sum(dim=1, keepdim=True)
    num_negatives = similarity.shape[1] - 1 - num_masked
    similarity.scatter_(1, positive_column, float("-inf"))
    negatives = similarity if masked is None else similarity.masked_fill(masked, float("-inf"))
    hardest = negatives.amax(dim=1, keepdim=True)
    similarity.scatter_(1, positive_column, positive)
    some = num_negatives > 0
    mean_negative = torch.where(some, (total - positive) / num_negatives.clamp(min=1), 0.0)
    margin = torch.where(some, positive - hardest, 0.0)
    correct = (positive > hardest).to(positive.dtype)
    return torch.cat([correct, positive, mean_negative, margin], dim=1).sum(dim=0, dtype=torch.float64)
