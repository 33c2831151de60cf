"""Late interaction: the contrastive loss and distillation with MaxSim in place of one dot product."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_embed.batch import EmbedBatch, TextVectors
from megatron_embed.losses.info_nce import Candidates, InfoNCESums, similarity_gradients
from megatron_embed.losses.matryoshka import MatryoshkaDim
from megatron_embed.losses.maxsim import maxsim, maxsim_gradients, maxsim_pairs
from megatron_embed.names import MAXSIM_TILE_ELEMENTS
from megatron_embed.objectives.base import LossGradient
from megatron_embed.objectives.contrastive import Contrastive
from megatron_embed.objectives.document_tiles import DocumentTiles
from megatron_embed.objectives.gathering import gather_ids
from megatron_embed.objectives.hard_negatives import Groups, HardNegatives
from megatron_embed.parallel.device_copy import copy_to_device


def text_vectors(embeddings: Tensor, batch: EmbedBatch, counts_on_device: Tensor) -> tuple[TextVectors, TextVectors]:
    """The queries' and the documents' vectors of a batch; views.

    Args:
        counts_on_device: [rows] int64, `vector_counts` of the batch on the device of the embeddings.
    """
    texts = TextVectors(vectors=embeddings, counts=vector_counts(batch), counts_on_device=counts_on_device)
    return texts.part(0, batch.num_queries), texts.part(batch.num_queries, len(texts.counts))


def vector_counts(batch: EmbedBatch) -> Tensor:
    """[rows] int64 on the CPU, vectors of each row of a multi-vector model's batch."""
    assert batch.vector_counts is not None, "a multi-vector model's batch says how many vectors each row has"
    return batch.vector_counts


class MaxSimQueries:
    """Some queries, which documents are compared with."""

    def __init__(self, queries: TextVectors) -> None:
        self.queries = queries

    def empty_scores(self, num_candidates: int) -> Tensor:
        """[queries, candidates], or more of them in front."""
        return self.queries.vectors.new_empty(len(self.queries.counts), num_candidates)

    def scores(self, documents: TextVectors) -> Tensor:
        """Those of all pairs with these documents."""
        return maxsim(self.queries, documents)

    def gradients(self, documents: TextVectors, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the queries' vectors and of the documents', given those of the scores."""
        return maxsim_gradients(self.queries, documents, grad_scores)


@dataclass(frozen=True, kw_only=True)
class BlockTerms:
    """The terms of a loss by blocks of queries."""

    query: Tensor
    """[terms] int64 on the CPU, ascending, the query of each."""
    query_on_device: Tensor
    """The same on the device."""
    weights: Tensor | None
    """[terms] on the device; None: 1 each."""


class BlockLoss:
    """The loss of blocks of queries, given their scores.

    Attributes:
        sums: over the blocks so far.
    """

    def __init__(self, objective: Contrastive, candidates: Candidates, terms: BlockTerms, total: float) -> None:
        self._settings, self._candidates, self._total = objective.step_settings(), candidates, total
        self._terms = terms
        device = candidates.positive_index.device
        self.sums = InfoNCESums(*torch.zeros(len(InfoNCESums._fields), dtype=torch.float64, device=device))

    def add(self, scores: Tensor, first: int, last: int) -> None:
        """The loss of queries `first` to `last - 1`; [..., queries, candidates] `scores` become its gradient."""
        start, stop = torch.searchsorted(self._terms.query, torch.tensor([first, last])).tolist()
        if start == stop:
            return
        one_each, own = stop - start == last - first, self._terms.query_on_device[start:stop] - first
        rows = scores if one_each else scores[..., own, :]
        weights = self._terms.weights
        sums = self.gradients(rows, start, None if weights is None else weights[start:stop])
        self.sums = InfoNCESums(*(before + added for before, added in zip(self.sums, sums, strict=True)))
        if not one_each:
            scores.zero_().index_add_(scores.dim() - 2, own, rows)

    def gradients(self, scores: Tensor, first: int, weights: Tensor | None) -> InfoNCESums:
        """Sums over the terms from `first` on, whose [..., terms, candidates] scores become the gradient."""
        return similarity_gradients(scores, self._candidates, self._settings, first=first, total=self._total,
                                    weights=weights)

    def further(self, batch: EmbedBatch) -> Tensor | None:
        """[metrics, 2] float64 sums and divisors of metrics besides those of InfoNCE."""
        return None


class MultiVectorContrastive(Contrastive):
    """InfoNCE of each local query's positives against the documents of all data-parallel ranks, by MaxSim.

    Documents come in tiles, each twice: for the scores, from which the loss and its gradient with respect to them
    follow, and for the gradients of the vectors. Nothing holds all dot products, nor all documents' vectors.
    """

    block_loss = BlockLoss

    def on_host(self, batch: EmbedBatch) -> Tensor | None:
        """What `compared` needs on the device besides; None: nothing."""
        return None

    def compared(self, queries: TextVectors, batch: EmbedBatch, copied: Tensor | None) -> MaxSimQueries:
        """Some queries of the batch, as they are compared with documents; `copied`: what `on_host` gave, on the
        device."""
        return MaxSimQueries(queries)

    def counts(self, batch: EmbedBatch) -> Tensor:
        """[rows] int64 on the CPU, vectors of each row."""
        return vector_counts(batch)

    def whole(self, values: Tensor) -> Tensor:
        """Dot products, or sums of them, from those of the dimensions that this rank has: here, of all."""
        return values

    def __call__(self, embeddings: Tensor, batch: EmbedBatch, *, total: float) -> LossGradient:
        """See Objective; `embeddings` are the vectors of the queries, then of the documents.

        Per block of queries (one, unless it has more than MAXSIM_TILE_ELEMENTS scores) and round of documents two
        all-gathers of vectors and one reduce-scatter of their gradients over the data-parallel group; three small
        collectives (numbers of rows and text hashes; numbers of vectors; sums).
        """
        batch = replace(batch, vector_counts=self.counts(batch))
        ids = gather_ids(batch, self.dp_group, texts=self.mask_duplicates, document_queries=self.needs_document_queries)
        on_host = self._columns(batch, ids)
        columns, counts, copied = copy_to_device((on_host, vector_counts(batch), self.on_host(batch)),
                                                 embeddings.device)
        queries, documents = text_vectors(embeddings, batch, counts)
        gradient = torch.zeros_like(embeddings)
        grad_query, grad_document = text_vectors(gradient, batch, counts)
        tiles = DocumentTiles(documents, grad_document.vectors, ids.num_documents, batch.capacity.documents,
                              self.dp_group)
        loss = self.block_loss(self, columns.candidates(self.settings.directions), BlockTerms(
            query=on_host.terms.query, query_on_device=columns.terms.query, weights=columns.terms.weights), total)
        num_candidates = int(ids.num_documents.sum())
        size = max(1, MAXSIM_TILE_ELEMENTS // max(1, num_candidates))
        log_scale = torch.zeros((), dtype=torch.float64, device=embeddings.device)
        for first in range(0, int(ids.num_queries.max()), size):
            bounds = (min(first, batch.num_queries), min(first + size, batch.num_queries))
            part, grad_part = (texts.part(*bounds) for texts in (queries, grad_query))
            block = self.compared(part, batch, copied)
            scores = block.empty_scores(num_candidates)
            for turn in range(tiles.rounds):
                for tile in tiles.show(turn):
                    scores[..., tile.columns] = block.scores(tile.documents)
            scores = self.whole(scores)
            loss.add(scores, *bounds)
            _return_gradients(tiles, block, scores, grad_part.vectors)
            # Scores are linear in the lengths of a query's vectors.
            log_scale += (grad_part.vectors * part.vectors).sum(dtype=torch.float64)
        log_scale = self.whole(log_scale)
        scale = torch.stack([log_scale, torch.zeros_like(log_scale)])
        sums = self._sums([loss.sums], [scale], len(on_host.terms.query), batch, total, further=loss.further(batch))
        return LossGradient(sums=sums, embeddings=gradient)


def _return_gradients(tiles: DocumentTiles, block: MaxSimQueries, grad_scores: Tensor, grad_query: Tensor) -> None:
    """The documents' second trip: adds to the gradients of these queries, and returns each rank those of its documents.

    Args:
        grad_scores: [..., queries, candidates].
        grad_query: [vectors of these queries, dim], added to.
    """
    for turn in range(tiles.rounds):
        gradients = []
        for tile in tiles.show(turn):
            of_query, of_document = block.gradients(tile.documents, grad_scores[..., tile.columns])
            grad_query += of_query
            gradients.append((tile, of_document))
        tiles.return_gradients(turn, iter(gradients))


class MultiVectorDistillation(HardNegatives):
    """`margin_mse` and `kl_distillation` with MaxSim of each document and its query."""

    def _similarity(self, leaf: Tensor, batch: EmbedBatch, groups: Groups, matryoshka: MatryoshkaDim) -> Tensor:
        queries, documents = text_vectors(leaf, batch, copy_to_device(vector_counts(batch), leaf.device))
        return maxsim_pairs(queries, documents, batch.document_query, groups.document_query)
