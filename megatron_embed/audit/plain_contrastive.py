"""InfoNCE and the sigmoid loss written out: all similarities of the global batch in float64, masks from the texts'
hashes, the gradient by autograd. It shares no code with losses/ and objectives/, whose results it checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.audit.global_batch import GlobalBatch
from megatron_embed.audit.plain_own_documents import Weight, over_dimensions, pair
from megatron_embed.audit.variation import Variation
from megatron_embed.config.objective import ObjectiveConfig

_CELLS = 1 << 22
"""Similarities of rows that are computed together."""


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """[rows, columns] bool each."""

    ignored: Tensor
    excluded: Tensor

    @property
    def masked(self) -> Tensor:
        return self.ignored | self.excluded


class PlainContrastive:
    """The loss of a global batch.

    Attributes:
        masked: query -> (number of its negative documents, the queries of the documents that are masked), at the
            largest dimension, once `values` was called.

    Args:
        weights: dimension, precision and weight of each loss.
        temperature, bias: of this step.
    """

    def __init__(self, config: ObjectiveConfig, weights: Sequence[Weight], *, normalize: bool,
                 temperature: float, bias: float | None, variation: Variation) -> None:
        self.config, self.weights, self.normalize, self.variation = config, weights, normalize, variation
        self.log_scale = torch.tensor(-math.log(variation.temperature or temperature), dtype=torch.float64)
        self.masked: dict[int, tuple[int, list[int]]] = {}
        self.bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
        self.directions = variation.directions or config.directions

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp()

    def values(self, query: Tensor, document: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Metric -> [2] float64, sum and divisor, over the batch. The losses carry a graph; `loss` is the weighted one.

        Args:
            query, document: [queries, dim], [documents, dim] float64.
        """
        return over_dimensions(self._at_dimension, query, document, batch, self.weights, normalize=self.normalize)

    def _at_dimension(self, query: Tensor, document: Tensor, batch: GlobalBatch) -> dict[str, list[Tensor]]:
        positives = batch.is_positive.nonzero()[:, 0]
        term_query = batch.document_query[positives]
        if self.variation.label_shift:
            first = positives[torch.searchsorted(term_query.contiguous(), torch.arange(len(query)))]
            positives = first[self._shifted(term_query, len(query))]
        counts = torch.bincount(term_query, minlength=len(query))
        weights = 1.0 / counts[term_query].double()
        weights = weights if self.variation.per_query else torch.ones_like(weights)
        rows = max(1, _CELLS // max(1, len(document) + len(query)))
        parts = [self._rows(query, document, batch, term_query[start : start + rows], positives[start : start + rows],
                            weights[start : start + rows]) for start in range(0, len(term_query), rows)]
        sums = torch.stack(parts).sum(dim=0)
        terms, columns = float(len(term_query)), float(sums[5:].detach().sum())
        divisors = [float(len(query)), terms, terms, terms, terms, columns, terms]
        names = ("loss", "in_batch_accuracy", "positive_similarity", "negative_similarity", "margin",
                 "masked_fraction", "negatives_per_query")
        return {name: pair(value, divisor) for name, value, divisor in zip(names, sums, divisors, strict=True)}

    def _shifted(self, queries: Tensor, count: int) -> Tensor:
        """The query so many places later, of all or of the rank's own."""
        share = count // self.variation.ranks if self.variation.shift_within_rank else count
        return queries // share * share + (queries + self.variation.label_shift) % share

    def _rows(self, query: Tensor, document: Tensor, batch: GlobalBatch, of: Tensor, positive: Tensor,
              weights: Tensor) -> Tensor:
        """[7] sums over some terms, query `of` with document `positive` each, in the order of the metrics."""
        number = torch.arange(len(of))
        anchors = {"query": query[of], "document": document[positive]}
        sides = {"query": query, "document": document}
        queries_of = {"query": torch.arange(len(query)), "document": batch.document_query}
        similarity = {}
        for direction in self.directions:
            anchor, side = direction.split("_to_")
            similarity[direction] = self._similarity(anchors[anchor], sides[side],
                                                     self._rank_of(of, query)[:, None] ==
                                                     self._rank_of(queries_of[side], query)[None, :])
        masks = self._masks({name: value.detach() for name, value in similarity.items()}, batch, of, positive)
        logits = {direction: value * self.scale for direction, value in similarity.items()}
        main = similarity["query_to_document"].detach()
        logits["query_to_document"] = logits["query_to_document"] + self._bonus(main, batch, of, positive)
        logits = {direction: value.masked_fill(masks[direction].masked, -math.inf)
                  for direction, value in logits.items()}
        at_positive = logits["query_to_document"][number, positive]
        if self.bias is not None:
            losses = (functional.softplus(logits["query_to_document"] + self.bias).sum(dim=1)
                      - (at_positive + self.bias))
        elif self.config.partition == "joint":
            losses = torch.cat(list(logits.values()), dim=1).logsumexp(dim=1) - at_positive
        else:
            losses = sum(value.logsumexp(dim=1) for value in logits.values()) / len(logits) - at_positive
        self._note_masked(masks["query_to_document"], batch, of)
        counts = [masks[name].excluded.sum() for name in self.directions]
        own = sum(name in ("query_to_document", "document_to_query") for name in self.directions) * len(of)
        negatives = sum(value.numel() - int(masks[name].masked.sum()) for name, value in similarity.items()) - own
        return torch.stack([(losses * weights).sum(), *_statistics(main, positive, masks["query_to_document"].masked),
                            torch.stack(counts).sum().double(), losses.new_tensor(float(negatives))])

    def _note_masked(self, masks: _Masks, batch: GlobalBatch, of: Tensor) -> None:
        """Note for each query how many documents are its negatives, and the queries of those that are masked."""
        negatives = (~masks.masked).sum(dim=1) - 1
        for row, query in enumerate(of.tolist()):
            columns = masks.excluded[row].nonzero()[:, 0]
            self.masked.setdefault(query, (int(negatives[row]), batch.document_query[columns].tolist()))

    def _rank_of(self, queries: Tensor, query: Tensor) -> Tensor:
        """The data-parallel rank of the run that held each query."""
        return queries // (len(query) // self.variation.ranks)

    def _similarity(self, anchor: Tensor, side: Tensor, same_rank: Tensor) -> Tensor:
        if self.variation.documents != "others_detached":
            return anchor @ side.T
        return torch.where(same_rank, anchor @ side.T, anchor @ side.detach().T)

    def _masks(self, similarity: dict[str, Tensor], batch: GlobalBatch, of: Tensor,
               positive: Tensor) -> dict[str, _Masks]:
        number, config = torch.arange(len(of)), self.config
        own = batch.document_query[None, :] == of[:, None]
        own_query = torch.arange(len(batch.query_texts))[None, :] == of[:, None]
        # With shifted labels a query's own positive is a negative like any other, unless equal texts are masked.
        document = torch.zeros_like(own) if self.variation.label_shift else own & batch.is_positive
        other_query = torch.zeros_like(own_query)
        if config.hard_negatives == "private":
            document = document | (~own & ~batch.is_positive)
        document = document | self._left_out(batch, len(batch.query_texts), of)
        if batch.in_batch is not None:
            alone = ~batch.in_batch[of][:, None]
            document, other_query = document | (~own & alone), ~own_query & alone
        document[number, positive] = False
        ignored = {"query_to_document": document, "query_to_query": own_query | other_query,
                   "document_to_document": document | own, "document_to_query": other_query}
        duplicates = self._duplicates(batch, of, positive)
        result = {}
        for direction in self.directions:
            excluded = torch.zeros_like(ignored[direction])
            masks_duplicates = self.variation.duplicates_masked
            if config.mask_duplicates if masks_duplicates is None else masks_duplicates:
                excluded = excluded | duplicates[direction]
            if config.mask_margin is not None and self.variation.margin_masked:
                excluded = excluded | self._similar(direction, similarity, positive, own_query)
            result[direction] = _Masks(ignored=ignored[direction], excluded=excluded & ~ignored[direction])
        return result

    def _left_out(self, batch: GlobalBatch, queries: int, of: Tensor) -> Tensor:
        """[rows, documents] bool, the documents that a variation does not compare with."""
        if self.variation.documents == "positives":
            return (~batch.is_positive)[None, :].expand(len(of), -1)
        if self.variation.documents == "own_rank":
            share = queries // self.variation.ranks
            return (batch.document_query // share)[None, :] != (of // share)[:, None]
        return torch.zeros(1, len(batch.is_positive), dtype=torch.bool)

    def _duplicates(self, batch: GlobalBatch, of: Tensor, positive: Tensor) -> dict[str, Tensor]:
        """Per direction [rows, columns] bool: the column is relevant to the row, as some row of the batch says."""
        queries, documents = batch.query_texts.tolist(), batch.document_texts.tolist()
        by_text: dict[int, list[int]] = {}
        for column, text in enumerate(documents):
            by_text.setdefault(text, []).append(column)
        given: dict[int, list[int]] = {}
        givers: dict[int, set[int]] = {}
        for query_text, text in batch.given:
            given.setdefault(query_text, []).extend(by_text.get(text, ()))
            givers.setdefault(text, set()).add(query_text)
        to_document = torch.zeros(len(of), len(documents), dtype=torch.bool)
        to_query = torch.zeros(len(of), len(queries), dtype=torch.bool)
        for row, (query, column) in enumerate(zip(of.tolist(), positive.tolist(), strict=True)):
            to_document[row, given.get(queries[query], [])] = True
            to_document[row, column] = False
            if len(self.directions) > 1:
                answered = givers.get(documents[column], set())
                to_query[row] = torch.tensor([text in answered for text in queries])
                to_query[row, query] = False
        first = torch.searchsorted(batch.document_query, torch.arange(len(queries)))
        return {"query_to_document": to_document, "document_to_document": to_document,
                "query_to_query": to_document[:, first], "document_to_query": to_query}

    def _similar(self, direction: str, similarity: dict[str, Tensor], positive: Tensor, own_query: Tensor) -> Tensor:
        """[rows, columns] bool: more similar than the positive by more than the margin."""
        main = similarity["query_to_document"]
        at_positive = main.gather(1, positive[:, None])
        scale = at_positive.abs() if self.config.mask_margin_type == "relative" else 1.0
        bound = at_positive + (self.config.mask_margin or 0.0) * scale
        if direction.endswith("_to_document"):
            similar = main > bound
            return similar.scatter(1, positive[:, None], False)
        similar = similarity[direction] > bound
        return similar & ~own_query if direction == "document_to_query" else similar

    def _bonus(self, similarity: Tensor, batch: GlobalBatch, of: Tensor, positive: Tensor) -> Tensor:
        """[rows, documents], what hardness adds to the logits."""
        config = self.config
        if config.hardness is None or not self.variation.hardness:
            return torch.zeros((), dtype=similarity.dtype)
        bonus, own = config.hardness_strength * similarity, batch.document_query[None, :] == of[:, None]
        if config.hardness != "all_negatives":
            bonus = bonus.masked_fill(own if config.hardness == "in_batch_negatives" else ~own, 0.0)
        return bonus.scatter(1, positive[:, None], 0.0)


def _statistics(similarity: Tensor, positive: Tensor, masked: Tensor) -> list[Tensor]:
    """Sums over rows: positive on top, its similarity, the negatives' mean similarity, distance to the closest one."""
    number = torch.arange(len(similarity))
    at_positive = similarity[number, positive]
    negative = ~masked
    negative[number, positive] = False
    count = negative.sum(dim=1)
    mean = (similarity * negative).sum(dim=1) / count.clamp(min=1)
    hardest = similarity.masked_fill(~negative, -math.inf).amax(dim=1)
    some = count > 0
    return [(at_positive > hardest).sum().double(), at_positive.sum(), mean.sum(),
            torch.where(some, at_positive - hardest, 0.0).sum()]
