"""Which columns of InfoNCE are no negatives of a row: by whom a document was given, and by equal texts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.losses.duplicates import DuplicateMask, duplicate_mask
from megatron_embed.losses.info_nce import Direction, MaskTile


@dataclass(frozen=True, kw_only=True)
class Owners:
    """For which query each document was given, and what follows: the columns that never were meant as negatives.

    Queries are numbered over all ranks, in the order of the ranks. A row is a query with one of its positives.
    """

    row_query: Tensor
    """[rows] int64, number of each row's query."""
    positive_index: Tensor
    """[rows] int64, column of each row's positive."""
    owner: Tensor
    """[candidates] int64, ascending, number of the query that each document was given for."""
    is_positive: Tensor
    """[candidates] bool, true for the positives."""
    num_queries: int
    directions: tuple[Direction, ...]
    private: bool
    """Hard negatives are negatives of their own query alone."""
    alone: Tensor | None
    """[rows] bool, true where nothing but the query's own hard negatives are negatives; null: nowhere."""

    def own(self, first: int, last: int) -> Tensor:
        """[last - first, candidates] bool, true where the document was given for the row's query."""
        return self.owner == self.row_query[first:last, None]

    def left_out(self, first: int, last: int) -> Tensor:
        """[last - first, columns] bool: other positives of the query, the query itself as a column of queries, its own
        documents as columns of its positive; others' hard negatives if they are private; all but its own hard
        negatives if it is alone."""
        own, rows = self.own(first, last), torch.arange(last - first, device=self.owner.device)
        document = own & self.is_positive
        if self.private:
            document |= ~own & ~self.is_positive
        own_query = torch.arange(self.num_queries, device=own.device) == self.row_query[first:last, None]
        other_query = torch.zeros_like(own_query)
        if self.alone is not None:
            alone = self.alone[first:last, None]
            document |= ~own & alone
            other_query = ~own_query & alone
        parts = {"query_to_document": document.index_put((rows, self.positive_index[first:last]),
                                                         torch.zeros((), dtype=torch.bool, device=own.device)),
                 "query_to_query": own_query | other_query, "document_to_document": document | own,
                 "document_to_query": other_query}
        return torch.cat([parts[direction] for direction in self.directions], dim=1)

    @property
    def first_positive(self) -> Tensor:
        """[queries] int64, column of each query's first document, which is its first positive."""
        return torch.searchsorted(self.owner, torch.arange(self.num_queries, device=self.owner.device))


def duplicates_over(directions: tuple[Direction, ...], documents: DuplicateMask, first_positive: Tensor,
                    answers: DuplicateMask | None) -> MaskTile:
    """The mask of duplicates over the columns of all directions.

    A query is excluded if it shares its positive with the row's query (a query of the same text always does), or, as a
    column of the row's positive, if some row gives it that positive.

    Args:
        directions: as in `Contrast`.
        documents: rows against documents.
        first_positive: [queries] int64, column of each query's first positive.
        answers: rows' positives against queries; needed by `document_to_query`.
    """
    by_direction: dict[Direction, Callable[[int, int, Tensor], Tensor]] = {
        "query_to_document": lambda first, last, mask: mask,
        "query_to_query": lambda first, last, mask: mask[:, first_positive],
        "document_to_document": lambda first, last, mask: mask}
    if answers is not None:
        by_direction["document_to_query"] = lambda first, last, mask: answers.tile(first, last)

    def tile(first: int, last: int) -> Tensor:
        mask = documents.tile(first, last)
        return torch.cat([by_direction[direction](first, last, mask) for direction in directions], dim=1)

    return tile


def answered_queries(row_text: Tensor, row_query: Tensor, query_ids: Tensor, given: Tensor) -> DuplicateMask:
    """Which queries have a row's positive as a positive, the row's own query apart.

    Args:
        row_text: [rows] int64, hash of the text of each row's positive.
        row_query: [rows] int64, number of each row's query.
        query_ids: [queries] int64, hash of each query's text, over all ranks.
        given: [pairs, 2] int64, hashes of a query's text and of a text given to it as positive.
    """
    return duplicate_mask(row_text, row_query, query_ids, given.flip(1))
