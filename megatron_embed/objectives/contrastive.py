"""InfoNCE and SigLIP's sigmoid loss over the global batch: the only place that sees other ranks' rows."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.objective import ObjectiveConfig
from megatron_embed.losses.duplicates import duplicate_mask
from megatron_embed.losses.info_nce import Candidates, Contrast, InfoNCESums, contrast_gradients
from megatron_embed.losses.matryoshka import Width, shorten
from megatron_embed.losses.negatives import Owners, answered_queries, duplicates_over
from megatron_embed.objectives.base import LossGradient, Objective, Sums, over_widths, width_names
from megatron_embed.objectives.gathering import Pool, gather_pool, gather_rows
from megatron_embed.objectives.learned_scale import LearnedScale
from megatron_embed.objectives.splitting import split_by_micro_batch
from megatron_embed.parallel.collectives import sum_over

NAMES = ("loss", "in_batch_accuracy", "positive_similarity", "negative_similarity", "margin", "masked_fraction",
         "negatives_per_query")


class Contrastive(Objective[EmbedBatch]):
    """Each local query's positives against the rows of all data-parallel ranks.

    Args:
        config: the loss and its keys.
        widths: over which the loss is taken.
        in_batch: False where some data set's queries have no negatives but their own hard ones.
        num_positives: the most positives of a query; each is a term of its own, a query's terms together weigh 1.
        dp_group: data-parallel ranks, without context parallelism.
        learned: the temperature and bias in place of the configured ones; null: those.
    """

    def __init__(self, config: ObjectiveConfig, widths: tuple[Width, ...], *, normalize: bool, in_batch: bool,
                 num_positives: int, dp_group: dist.ProcessGroup, learned: LearnedScale | None = None) -> None:
        self.learned = learned
        self.names = NAMES + width_names(widths) + (() if learned is None else learned.names)
        self.couples_batch = config.couples_batch
        self.contrast = Contrast(
            temperature=config.temperature, directions=config.directions, joint=config.partition == "joint",
            margin=config.mask_margin, relative=config.mask_margin_type == "relative", hardness=config.hardness,
            hardness_strength=config.hardness_strength, bias=config.bias if config.loss == "sigmoid" else None)
        self.widths = widths
        self.normalize = normalize
        self.mask_duplicates = config.mask_duplicates
        self.private = config.hard_negatives == "private"
        self.in_batch = in_batch
        self.dp_group = dp_group
        self.needs_queries = any(direction.endswith("query") for direction in config.directions)
        # Without any of these, no column is left out but the row's own positive.
        self.needs_owners = (self.private or not in_batch or num_positives > 1 or len(config.directions) > 1
                             or config.hardness in ("in_batch_negatives", "hard_negatives"))

    def total(self, batch: EmbedBatch) -> float:
        """Queries of the global batch: every data-parallel rank has as many."""
        return batch.num_queries * self.dp_group.size()

    def split(self, batch: EmbedBatch) -> list[EmbedBatch]:
        return split_by_micro_batch(batch)

    def __call__(self, rows: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """As the base class says; `rows` are the queries, then the documents.

        Ranks may differ in their numbers of rows, but not in `batch.capacity`. One all-gather of rows and one
        reduce-scatter of their gradients over the data-parallel group, and two small collectives (counts, text hashes
        and owners; sums), whatever the number of micro-batches, directions and widths.
        """
        group = self.dp_group
        query, document = rows[: batch.num_queries], rows[batch.num_queries :]
        pool = gather_pool(batch, group, rows.device, ids=self.mask_duplicates, owners=self.needs_owners)
        gathered = gather_rows(document, query if self.needs_queries else None, batch.capacity, pool, group)
        terms = _Terms.of(batch, pool, group.rank(), rows.device)
        masks, contrast = self._masks(batch, pool, terms), self._contrast()
        values: list[Tensor] = []
        of_scale: list[Tensor] = []
        grad_rows = grad_document = grad_query = None
        for width in self.widths:
            mine, documents = (shorten(part, width, normalize=self.normalize) for part in (query, gathered.document))
            queries = None if gathered.query is None else shorten(gathered.query, width, normalize=self.normalize)
            found = contrast_gradients(
                mine.rows[terms.query], dataclasses.replace(
                    masks, document=documents.rows, query=None if queries is None else queries.rows),
                contrast, total=total, weights=terms.weights)
            values.append(_ratios(found.sums, batch.num_queries, len(terms.query)))
            of_scale.append(torch.stack([found.log_scale, found.bias]) * width.weight)
            anchors = torch.zeros_like(mine.rows).index_add_(0, terms.query, found.rows)
            grad_rows = mine.add_gradient(grad_rows, anchors, width.weight)
            grad_document = documents.add_gradient(grad_document, found.document, width.weight)
            if queries is not None and found.query is not None:
                grad_query = queries.add_gradient(grad_query, found.query, width.weight)
        assert grad_rows is not None and grad_document is not None
        own_document, own_query = gathered.return_gradients(grad_document, grad_query)
        if own_query is not None:
            grad_rows = grad_rows + own_query
        parts = [over_widths(values, self.widths)]
        if self.learned is not None:
            # What was divided by the terms of the whole batch is to be a mean over queries, as all metrics are.
            parts.append(_scale_ratios(self.learned, torch.stack(of_scale).sum(dim=0) * total, batch.num_queries))
        return LossGradient(sums=Sums(names=self.names, values=sum_over(torch.cat(parts), group)),
                            rows=torch.cat([grad_rows, own_document]))

    def _contrast(self) -> Contrast:
        """The settings, with the temperature and bias of this step."""
        if self.learned is None:
            return self.contrast
        return dataclasses.replace(self.contrast, temperature=self.learned.temperature, bias=self.learned.bias)

    def _masks(self, batch: EmbedBatch, pool: Pool, terms: "_Terms") -> Candidates:
        """The candidates without their vectors."""
        nothing = torch.empty(0)
        excluded = owners = None
        if self.needs_owners:
            alone = None if batch.in_batch is None else ~batch.in_batch.to(pool.owner.device)[terms.query]
            owners = Owners(row_query=terms.number, positive_index=terms.positive, owner=pool.owner,
                            is_positive=pool.is_positive, num_queries=int(pool.num_queries.sum()),
                            directions=self.contrast.directions, private=self.private, alone=alone)
        if self.mask_duplicates:
            row_ids = batch.query_ids.to(pool.document_ids.device)[terms.query]
            documents = duplicate_mask(row_ids, terms.positive, pool.document_ids, pool.given)
            excluded = documents.tile
            if owners is not None:
                answers = None
                if "document_to_query" in self.contrast.directions:
                    answers = answered_queries(pool.document_ids[terms.positive], terms.number, pool.query_ids,
                                               pool.given)
                excluded = duplicates_over(self.contrast.directions, documents, owners.first_positive, answers)
        return Candidates(
            document=nothing, positive_index=terms.positive, query_index=terms.number, excluded=excluded,
            left_out=None if owners is None else owners.left_out, own=None if owners is None else owners.own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Terms:
    """A term of the loss is a local query with one of its positives."""

    query: Tensor
    """[terms] int64, local number of the query."""
    number: Tensor
    """[terms] int64, its number over all ranks."""
    positive: Tensor
    """[terms] int64, the positive's number over all ranks."""
    weights: Tensor | None
    """[terms] float32, 1 / (positives of the query); null: 1 everywhere."""

    @staticmethod
    def of(batch: EmbedBatch, pool: Pool, rank: int, device: torch.device) -> "_Terms":
        document = batch.is_positive.nonzero()[:, 0]
        query = batch.document_query[document]
        weights = None
        if len(query) > batch.num_queries:
            weights = (1.0 / torch.bincount(query, minlength=batch.num_queries).float())[query].to(device)
        return _Terms(
            query=query.to(device), number=query.to(device) + int(pool.num_queries[:rank].sum()),
            positive=document.to(device) + int(pool.num_documents[:rank].sum()), weights=weights)


def _ratios(sums: InfoNCESums, queries: int, terms: int) -> Tensor:
    """[7, 2] float64: sums and divisors in the order of NAMES."""
    ordered = torch.stack([sums.loss, sums.correct, sums.positive_similarity, sums.negative_similarity, sums.margin,
                           sums.masked, sums.negatives])
    divisors = torch.full_like(ordered, terms)
    divisors[0] = queries
    divisors[NAMES.index("masked_fraction")] = sums.masked + sums.negatives
    return torch.stack([ordered, divisors], dim=1)


def _scale_ratios(learned: LearnedScale, gradient: Tensor, queries: int) -> Tensor:
    """[2 or 4, 2] float64: sums and divisors in the order of `learned.names`.

    `gradient`: [2] float64 with respect to log scale and bias, summed over these queries.
    """
    rows = [(learned.temperature * queries, queries), (float(gradient[0]), queries)]
    if learned.bias is not None:
        rows += [(learned.bias * queries, queries), (float(gradient[1]), queries)]
    return torch.tensor(rows, dtype=torch.float64, device=gradient.device)
