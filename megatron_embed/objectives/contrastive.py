"""InfoNCE and SigLIP's sigmoid loss over the global batch, with the embeddings of all data-parallel ranks."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, InfoNCESums, contrastive_gradients
from megatron_embed.losses.matryoshka import MatryoshkaDim, Truncated, truncate
from megatron_embed.losses.negatives import (
    DuplicateMask,
    GuidedMask,
    IgnoredColumns,
    answered_queries,
    duplicate_mask,
    duplicates_over,
    either,
)
from megatron_embed.losses.precision import as_stored
from megatron_embed.names import Direction
from megatron_embed.objectives.base import (
    LossGradient,
    Objective,
    Sums,
    combine_dims,
    configured_dims,
    matryoshka_names,
)
from megatron_embed.objectives.fixed_vectors import FixedRows, FixedVectors
from megatron_embed.objectives.gathering import (
    GatheredEmbeddings,
    GlobalBatchIds,
    PaddedRows,
    gather_embeddings,
    gather_ids,
)
from megatron_embed.objectives.learned_scale import LearnedScale
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.device_copy import copy_to_device

NAMES = ("loss", "in_batch_accuracy", "positive_similarity", "negative_similarity", "margin", "masked_fraction",
         "negatives_per_query")
"""Metrics in the order of InfoNCESums."""
COMPATIBLE_NAMES = ("compatible_loss", "compatible_accuracy")
"""Further metrics of objective.compatible_with: of the queries against the vectors of the index."""


def compatible_weight(config: RunConfig) -> float | None:
    """Weight of the loss against the vectors of the index, beside the other one; None: without it."""
    objective = config.objective
    alone = objective.compatible_with is None or config.training.query_side_only
    return None if alone else objective.compatible_weight


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the metrics."""
    learned = LearnedScale(config).names if config.objective.learnable_temperature else ()
    compatible = () if compatible_weight(config) is None else COMPATIBLE_NAMES
    return NAMES + matryoshka_names(configured_dims(config)) + compatible + learned


class Contrastive(Objective[EmbedBatch]):
    """Each local query's positives against the rows of all data-parallel ranks.

    A query with several positives has a term for each of them; together they weigh 1.

    Args:
        dp_group: data-parallel ranks, without context parallelism.
        fixed: vectors of the documents in the index that is to be kept, whose loss is added to that of the documents in
            training or, with `training.query_side_only`, takes its place; and those of a guide.
    """

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup, fixed: FixedVectors | None = None) -> None:
        objective = config.objective
        self.learned = LearnedScale(config) if objective.learnable_temperature else None
        self.dims = configured_dims(config)
        self.fixed, self.query_side_only = fixed or FixedVectors(), config.training.query_side_only
        self.compatible_weight = compatible_weight(config)
        assert (self.query_side_only or self.compatible_weight is not None) == (self.fixed.old_document is not None)
        self.names = metric_names(config)
        self.couples_batch = objective.couples_batch
        self.settings = ContrastiveSettings(
            temperature=objective.temperature, directions=objective.directions, joint=objective.partition == "joint",
            mask_margin=None if objective.guide_model is not None else objective.mask_margin,
            relative=objective.mask_margin_type == "relative",
            hardness=objective.hardness, hardness_strength=objective.hardness_strength,
            bias=objective.bias if objective.loss == "sigmoid" else None)
        self.guide_margin = objective.mask_margin or 0.0
        self.normalize = config.embedding.unit_length
        self.mask_duplicates = objective.mask_duplicates
        self.private = objective.hard_negatives == "private"
        self.dp_group = dp_group
        self.needs_queries = any(direction.endswith("query") for direction in objective.directions)
        # Without any of these, no mask of ignored columns is needed.
        self.needs_document_queries = (
            self.private or not config.data.all_in_batch or config.data.num_positives > 1
            or len(objective.directions) > 1 or objective.hardness in ("in_batch_negatives", "hard_negatives"))

    def total(self, batch: EmbedBatch) -> float:
        """Queries of the global batch: every data-parallel rank has as many."""
        return batch.num_queries * self.dp_group.size()

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are those of the queries, then of the documents.

        Ranks may differ in their numbers of rows, but not in `batch.capacity`. One all-gather of embeddings and one
        reduce-scatter of their gradients over the data-parallel group, and two small collectives (numbers of rows, text
        hashes and documents' queries; sums), whatever the number of micro-batches, directions, dimensions and
        precisions.
        """
        query = embeddings[: batch.num_queries]
        ids = gather_ids(batch, self.dp_group, texts=self.mask_duplicates, document_queries=self.needs_document_queries)
        columns, fixed = copy_to_device((self._columns(batch, ids), self.fixed.rows_of(batch)), embeddings.device)
        gathered, old, guided = self._gather(embeddings, batch, columns, fixed)
        losses = _LossOverDims(query=query, gathered=gathered, terms=columns.terms,
                               columns=columns.candidates(self.settings.directions, guided),
                               settings=self.step_settings(),
                               total=total, normalize=self.normalize)
        for matryoshka in self.dims:
            losses.add(matryoshka)
        if old is not None and self.compatible_weight is not None:
            losses.add_compatible(columns.candidates(("query_to_document",), guided), old, self.compatible_weight)
        gradient = losses.gradient(with_documents=batch.embeds_documents)
        sums = self._sums(losses.sums, losses.grad_scale, len(columns.terms.query), batch, total, losses.compatible)
        return LossGradient(sums=sums, embeddings=gradient)

    def _gather(self, embeddings: Tensor, batch: EmbedBatch, columns: "_Columns",
                fixed: FixedRows) -> tuple[GatheredEmbeddings, Tensor | None, GuidedMask | None]:
        """(the embeddings that are columns, of all ranks, [candidates, dim] the documents in the index if theirs is a
        loss of its own, the guide's mask): one all-gather, in which a text's vectors are one behind the other."""
        query, document, old = embeddings[: batch.num_queries], embeddings[batch.num_queries :], fixed.old_document
        if not batch.embeds_documents:
            assert old is not None
            document, old = old, None
        documents = [part for part in (document, old, fixed.guide_document) if part is not None]
        queries = [query]
        if old is not None:
            queries.append(query.new_zeros(len(query), old.shape[1]))  # the index holds no queries
        if fixed.guide_query is not None:
            queries.append(fixed.guide_query)
        gathered = gather_embeddings(torch.cat(documents, dim=1),
                                     torch.cat(queries, dim=1) if self.needs_queries else None, columns.padded,
                                     self.dp_group)
        own, *others = gathered.split([part.shape[1] for part in documents]) if len(documents) > 1 else [gathered]
        guided = None
        if fixed.guide_query is not None:
            guide = others.pop()
            guided = GuidedMask(
                query=fixed.guide_query[columns.terms.query], document=guide.document, queries=guide.query,
                positive_index=columns.terms.positive, query_index=columns.terms.query_index,
                directions=self.settings.directions, margin=self.guide_margin, relative=self.settings.relative)
        return own, others[0].document if others else None, guided

    def step_settings(self) -> ContrastiveSettings:
        """The settings, with the temperature and bias of this step."""
        if self.learned is None:
            return self.settings
        return dataclasses.replace(self.settings, temperature=self.learned.temperature, bias=self.learned.bias)

    def _sums(self, sums: Sequence[InfoNCESums], grad_scale: Sequence[Tensor], num_terms: int, batch: EmbedBatch,
              total: float, compatible: InfoNCESums | None = None, further: Tensor | None = None) -> Sums:
        """The metrics over all ranks: one all-reduce.

        Args:
            sums: per dimension.
            grad_scale: per dimension [2] float64, weighted gradient with respect to log scale and bias.
            compatible: of the queries against the vectors of the index, if theirs is a loss of its own.
            further: [metrics, 2] float64 sums and divisors of further metrics of this rank.
        """
        parts = [combine_dims([_ratios(own, batch.num_queries, num_terms) for own in sums], self.dims)]
        if compatible is not None and self.compatible_weight is not None:
            parts.append(_ratios(compatible, batch.num_queries, num_terms)[: len(COMPATIBLE_NAMES)])
            parts[0][0, 0] += parts[1][0, 0] * self.compatible_weight
        if self.learned is not None:
            # The gradient was divided by the terms of the whole batch, and metrics are means over queries.
            gradient = torch.stack(list(grad_scale)).sum(dim=0) * total
            parts.append(_scale_ratios(self.learned, gradient, batch.num_queries))
        if further is not None:
            parts.append(further)
        return Sums(names=self.names, values=sum_over(torch.cat(parts), self.dp_group))

    def _columns(self, batch: EmbedBatch, ids: GlobalBatchIds) -> "_Columns":
        """Rows and columns of the loss, on the CPU."""
        terms, capacity, documents, answers = _Terms.of(batch, ids, self.dp_group.rank()), batch.capacity, None, None
        if self.mask_duplicates:
            documents = duplicate_mask(batch.query_ids[terms.query], terms.positive, ids.document_ids, ids.given)
            if "document_to_query" in self.settings.directions:
                answers = answered_queries(ids.document_ids[terms.positive], terms.query_index, ids.query_ids,
                                           ids.given)
        return _Columns(
            padded=(PaddedRows.of(ids.num_documents, capacity.documents),
                    PaddedRows.of(ids.num_queries, capacity.queries) if self.needs_queries else None),
            terms=terms, ignored=self._ignored(batch, ids, terms) if self.needs_document_queries else None,
            documents=documents, answers=answers)

    def _ignored(self, batch: EmbedBatch, ids: GlobalBatchIds, terms: "_Terms") -> IgnoredColumns:
        own_only = None if batch.in_batch is None else ~batch.in_batch[terms.query]
        return IgnoredColumns(
            row_query=terms.query_index, positive_index=terms.positive, document_query=ids.document_query,
            is_positive=ids.is_positive, num_queries=int(ids.num_queries.sum()), directions=self.settings.directions,
            private=self.private, own_negatives_only=own_only)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Terms:
    """A term of the loss is a local query with one of its positives."""

    query: Tensor
    """[terms] int64, local index of the query."""
    query_index: Tensor
    """[terms] int64, the query's index over all ranks."""
    positive: Tensor
    """[terms] int64, the positive's index over all ranks."""
    weights: Tensor | None
    """[terms] float32, 1 / (positives of the query); None: 1 everywhere."""

    @staticmethod
    def of(batch: EmbedBatch, ids: GlobalBatchIds, rank: int) -> "_Terms":
        """Those of this rank, on the CPU."""
        document = batch.is_positive.nonzero()[:, 0]
        query = batch.document_query[document]
        weights = None
        if len(query) > batch.num_queries:
            weights = (1.0 / torch.bincount(query, minlength=batch.num_queries).float())[query]
        return _Terms(query=query, query_index=query + int(ids.num_queries[:rank].sum()),
                      positive=document + int(ids.num_documents[:rank].sum()), weights=weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Columns:
    """All of the loss's rows and columns but their vectors."""

    padded: tuple[PaddedRows, PaddedRows | None]
    """Documents and, if they are columns, queries in the message that gathers them."""
    terms: _Terms
    ignored: IgnoredColumns | None
    documents: DuplicateMask | None
    """The documents whose text some row gives to the row's query as a positive; None: they count as negatives."""
    answers: DuplicateMask | None
    """The queries to which some row gives the row's positive; None: not needed."""

    def candidates(self, directions: tuple[Direction, ...], guided: GuidedMask | None = None) -> Candidates:
        """The candidates without their vectors. `guided`: a guide's mask."""
        excluded, ignored = None, self.ignored
        ignored = None if ignored is None else dataclasses.replace(ignored, directions=directions)
        of_guide = None if guided is None else dataclasses.replace(guided, directions=directions).tile
        if self.documents is not None:
            excluded = self.documents.tile if ignored is None else duplicates_over(
                directions, self.documents, ignored.first_positive, self.answers)
        return Candidates(
            document=torch.empty(0), positive_index=self.terms.positive, query_index=self.terms.query_index,
            excluded=either(excluded, of_guide), ignored=None if ignored is None else ignored.tile,
            own=None if ignored is None else ignored.own)


@dataclasses.dataclass(kw_only=True)
class _LossOverDims:
    """Sums and gradients of the loss, added up over matryoshka dimensions and precisions."""

    query: Tensor
    """[queries/dp, dim], this rank's queries."""
    gathered: GatheredEmbeddings
    """The columns' embeddings, of all ranks."""
    terms: _Terms
    columns: Candidates
    """The columns without their embeddings."""
    settings: ContrastiveSettings
    total: float
    normalize: bool
    sums: list[InfoNCESums] = dataclasses.field(default_factory=list)
    """Per dimension."""
    grad_scale: list[Tensor] = dataclasses.field(default_factory=list)
    """Per dimension [2] float64, weighted gradient with respect to log scale and bias."""
    grad_query: Tensor | None = None
    grad_document: Tensor | None = None
    grad_query_columns: Tensor | None = None
    compatible: InfoNCESums | None = None
    """Sums of the queries against the vectors of the index; None: these are no loss of their own."""

    def add(self, matryoshka: MatryoshkaDim) -> None:
        """Add the loss at one dimension and precision."""
        query, documents = self._truncate(self.query, matryoshka), self._truncate(self.gathered.document, matryoshka)
        queries = None if self.gathered.query is None else self._truncate(self.gathered.query, matryoshka)
        stored = as_stored(matryoshka.precision, query.embeddings, documents.embeddings,
                           None if queries is None else queries.embeddings)
        candidates = dataclasses.replace(self.columns, document=stored.document, query=stored.query)
        grad = contrastive_gradients(stored.anchor[self.terms.query], candidates, self.settings, total=self.total,
                                     weights=self.terms.weights)
        self.sums.append(grad.sums)
        self.grad_scale.append(torch.stack([grad.log_scale, grad.bias]) * matryoshka.weight)
        grad_query = torch.zeros_like(query.embeddings).index_add_(0, self.terms.query, grad.anchor)
        self.grad_query = query.add_gradient(self.grad_query, grad_query, matryoshka.weight)
        self.grad_document = documents.add_gradient(self.grad_document, grad.document, matryoshka.weight)
        if queries is not None and grad.query is not None:
            self.grad_query_columns = queries.add_gradient(self.grad_query_columns, grad.query, matryoshka.weight)

    def add_compatible(self, columns: Candidates, old_document: Tensor, weight: float) -> None:
        """Add the loss of the whole queries against the vectors of the index, once the others are.

        Args:
            columns: those of queries to documents, without vectors.
            old_document: [candidates, dim].
        """
        assert self.grad_query is not None
        settings = dataclasses.replace(self.settings, directions=("query_to_document",), joint=True)
        grad = contrastive_gradients(self.query[self.terms.query],
                                     dataclasses.replace(columns, document=old_document), settings, total=self.total,
                                     weights=self.terms.weights)
        self.compatible = grad.sums
        self.grad_scale.append(torch.stack([grad.log_scale, grad.bias]) * weight)
        self.grad_query.index_add_(0, self.terms.query, grad.anchor, alpha=weight)

    def gradient(self, *, with_documents: bool) -> Tensor:
        """[rows/dp, dim] of this rank's queries and, `with_documents`, its documents, complete over all ranks: one
        reduce-scatter, or none if no vectors of other ranks are trained."""
        assert self.grad_query is not None and self.grad_document is not None
        if not with_documents and self.gathered.query is None:
            return self.grad_query
        own_document, own_query = self.gathered.return_gradients(self.grad_document, self.grad_query_columns)
        grad_query = self.grad_query if own_query is None else self.grad_query + own_query
        return torch.cat([grad_query, own_document]) if with_documents else grad_query

    def _truncate(self, embeddings: Tensor, matryoshka: MatryoshkaDim) -> Truncated:
        return truncate(embeddings, matryoshka, normalize=self.normalize)


def _ratios(sums: InfoNCESums, num_queries: int, num_terms: int) -> Tensor:
    """[7, 2] float64: sums and divisors in the order of NAMES."""
    divisors = torch.full((len(NAMES),), num_terms, dtype=torch.float64, device=sums.loss.device)
    divisors[NAMES.index("loss")].fill_(num_queries)
    divisors[NAMES.index("masked_fraction")] = sums.masked + sums.negatives
    return torch.stack([torch.stack(sums), divisors], dim=1)


def _scale_ratios(learned: LearnedScale, gradient: Tensor, num_queries: int) -> Tensor:
    """[2 or 4, 2] float64: sums and divisors in the order of `learned.names`.

    `gradient`: [2] float64 with respect to log scale and bias, summed over these queries.
    """
    values = [learned.temperature, *([] if learned.bias is None else [learned.bias])]
    sums = torch.stack([entry for value, of_value in zip(values, gradient.unbind(), strict=False)
                        for entry in (gradient.new_full((), value * num_queries), of_value)])
    return torch.stack([sums, torch.full_like(sums, num_queries)], dim=1)
