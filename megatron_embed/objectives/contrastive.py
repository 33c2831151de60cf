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
    IgnoredColumns,
    answered_queries,
    duplicate_mask,
    duplicates_over,
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


class Contrastive(Objective[EmbedBatch]):
    """Each local query's positives against the rows of all data-parallel ranks.

    A query with several positives has a term for each of them; together they weigh 1.

    Args:
        dp_group: data-parallel ranks, without context parallelism.
    """

    def __init__(self, config: RunConfig, dp_group: dist.ProcessGroup) -> None:
        objective = config.objective
        self.learned = LearnedScale(config) if objective.learnable_temperature else None
        self.dims = configured_dims(config)
        self.names = NAMES + matryoshka_names(self.dims) + (() if self.learned is None else self.learned.names)
        self.couples_batch = objective.couples_batch
        self.settings = ContrastiveSettings(
            temperature=objective.temperature, directions=objective.directions, joint=objective.partition == "joint",
            mask_margin=objective.mask_margin, relative=objective.mask_margin_type == "relative",
            hardness=objective.hardness, hardness_strength=objective.hardness_strength,
            bias=objective.bias if objective.loss == "sigmoid" else None)
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
        group, query, document = self.dp_group, embeddings[: batch.num_queries], embeddings[batch.num_queries :]
        ids = gather_ids(batch, group, texts=self.mask_duplicates, document_queries=self.needs_document_queries)
        columns = copy_to_device(self._columns(batch, ids), embeddings.device)
        gathered = gather_embeddings(document, query if self.needs_queries else None, columns.padded, group)
        losses = _LossOverDims(query=query, gathered=gathered, terms=columns.terms,
                               columns=columns.candidates(self.settings.directions), settings=self.step_settings(),
                               total=total, normalize=self.normalize)
        for matryoshka in self.dims:
            losses.add(matryoshka)
        gradient = losses.gradient()
        sums = self._sums(losses.sums, losses.grad_scale, len(columns.terms.query), batch, total)
        return LossGradient(sums=sums, embeddings=gradient)

    def step_settings(self) -> ContrastiveSettings:
        """The settings, with the temperature and bias of this step."""
        if self.learned is None:
            return self.settings
        return dataclasses.replace(self.settings, temperature=self.learned.temperature, bias=self.learned.bias)

    def _sums(self, sums: Sequence[InfoNCESums], grad_scale: Sequence[Tensor], num_terms: int, batch: EmbedBatch,
              total: float) -> Sums:
        """The metrics over all ranks: one all-reduce.

        Args:
            sums: per dimension.
            grad_scale: per dimension [2] float64, weighted gradient with respect to log scale and bias.
        """
        parts = [combine_dims([_ratios(own, batch.num_queries, num_terms) for own in sums], self.dims)]
        if self.learned is not None:
            # The gradient was divided by the terms of the whole batch, and metrics are means over queries.
            gradient = torch.stack(list(grad_scale)).sum(dim=0) * total
            parts.append(_scale_ratios(self.learned, gradient, batch.num_queries))
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

    def candidates(self, directions: tuple[Direction, ...]) -> Candidates:
        """The candidates without their vectors."""
        excluded, ignored = None, self.ignored
        if self.documents is not None:
            excluded = self.documents.tile if ignored is None else duplicates_over(
                directions, self.documents, ignored.first_positive, self.answers)
        return Candidates(
            document=torch.empty(0), positive_index=self.terms.positive, query_index=self.terms.query_index,
            excluded=excluded, ignored=None if ignored is None else ignored.tile,
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

    def gradient(self) -> Tensor:
        """[rows/dp, dim] of this rank's queries and documents, complete over all ranks: one reduce-scatter."""
        assert self.grad_query is not None and self.grad_document is not None
        own_document, own_query = self.gathered.return_gradients(self.grad_document, self.grad_query_columns)
        grad_query = self.grad_query if own_query is None else self.grad_query + own_query
        return torch.cat([grad_query, own_document])

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
