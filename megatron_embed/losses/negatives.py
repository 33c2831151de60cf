"""The columns of InfoNCE that are not negatives of a row: by the query a document was given for, and by equal texts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.losses.info_nce import MaskTile
from megatron_embed.names import Direction


@dataclass(frozen=True, kw_only=True)
class IgnoredColumns:
    """The columns that were never meant as negatives, from the query that each document was given for.

    Queries are numbered over all ranks, in the order of the ranks. A row is a query with one of its positives.
    """

    row_query: Tensor
    """[rows] int64, index of each row's query."""
    positive_index: Tensor
    """[rows] int64, column of each row's positive."""
    document_query: Tensor
    """[candidates] int64, ascending, index of the query that each document was given for."""
    is_positive: Tensor
    """[candidates] bool, true for the positives."""
    num_queries: int
    directions: tuple[Direction, ...]
    private: bool
    """Hard negatives are negatives of their own query alone."""
    own_negatives_only: Tensor | None
    """[rows] bool, true where only the query's own hard negatives are negatives; None: nowhere."""

    def own(self, first: int, last: int) -> Tensor:
        """[last - first, candidates] bool, true where the document was given for the row's query."""
        return self.document_query == self.row_query[first:last, None]

    def tile(self, first: int, last: int) -> Tensor:
        """[last - first, columns] bool: other positives of the query, the query itself as a column of queries, its own
        documents as columns of its positive; others' hard negatives if they are private; all but its own hard
        negatives where only these count."""
        own, rows = self.own(first, last), torch.arange(last - first, device=self.document_query.device)
        document = own & self.is_positive
        if self.private:
            document |= ~own & ~self.is_positive
        own_query = torch.arange(self.num_queries, device=own.device) == self.row_query[first:last, None]
        other_query = torch.zeros_like(own_query)
        if self.own_negatives_only is not None:
            own_only = self.own_negatives_only[first:last, None]
            document |= ~own & own_only
            other_query = ~own_query & own_only
        parts = {"query_to_document": document.index_put((rows, self.positive_index[first:last]),
                                                         torch.zeros((), dtype=torch.bool, device=own.device)),
                 "query_to_query": own_query | other_query, "document_to_document": document | own,
                 "document_to_query": other_query}
        return torch.cat([parts[direction] for direction in self.directions], dim=1)

    @property
    def first_positive(self) -> Tensor:
        """[queries] int64, column of each query's first document, which is its first positive."""
        return torch.searchsorted(self.document_query,
                                  torch.arange(self.num_queries, device=self.document_query.device))


@dataclass(frozen=True, kw_only=True)
class DuplicateMask:
    """The mask of some query rows over all candidates, made tile by tile; memory beyond a tile is O(rows + candidates).

    A candidate is excluded if its text is among the positives of any query of the same text, and it is not the row's
    own positive itself.
    """

    positive_index: Tensor
    """[rows] int64, candidate that is each row's positive; never excluded."""
    candidate_text: Tensor
    """[candidates] int64 >= 0, index of each candidate's text: equal text, equal index."""
    num_texts: int
    given_text: Tensor
    """[given] int64, indices of the texts given as positives, those of one query text together."""
    first_given: Tensor
    """[rows] int64, first position in `given_text` of the texts of each row's query."""
    num_given: Tensor
    """[rows] int64, how many there are."""
    given_before: list[int]
    """Per row, how many there are for all rows before it; at the end, for all rows. Sizes of tiles' intermediate
    results, which the host must know without waiting for the device."""

    def tile(self, first: int, last: int) -> Tensor:
        """[last - first, candidates] bool: rows first .. last - 1 of the mask."""
        counts = self.num_given[first:last]
        rows = torch.repeat_interleave(counts, output_size=self.given_before[last] - self.given_before[first])
        within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        given = torch.zeros(last - first, self.num_texts, dtype=torch.bool, device=rows.device)
        given.index_put_((rows, self.given_text[self.first_given[first:last][rows] + within]),
                         torch.ones((), dtype=torch.bool, device=rows.device))
        return given[:, self.candidate_text].scatter_(1, self.positive_index[first:last, None], False)


def duplicate_mask(query_ids: Tensor, positive_index: Tensor, document_ids: Tensor, given: Tensor) -> DuplicateMask:
    """The mask of these queries over these candidates. All on the CPU; the mask may then be copied to the device.

    Args:
        query_ids: [rows] int64, hash of each local query's text.
        positive_index: [rows] int64, row of each query's positive in `document_ids`.
        document_ids: [candidates] int64, hash of each candidate's text, over all ranks.
        given: [pairs, 2] int64, hashes of a query's text and of a text that some row gives it as positive, over all
            ranks; in any order, repeated or not.
    """
    texts, candidate_text = torch.unique(document_ids, return_inverse=True)
    pairs = torch.unique(given, dim=0)  # sorted by query, then by text
    text = torch.searchsorted(texts, pairs[:, 1].contiguous()).clamp(max=max(0, len(texts) - 1))
    known = texts[text] == pairs[:, 1]  # other positives of a row need not be among the candidates
    queries = pairs[known, 0]
    first = torch.searchsorted(queries, query_ids)
    num_given = torch.searchsorted(queries, query_ids, right=True) - first
    return DuplicateMask(
        positive_index=positive_index, candidate_text=candidate_text, num_texts=len(texts), given_text=text[known],
        first_given=first, num_given=num_given, given_before=[0, *num_given.cumsum(0).tolist()])


def duplicates_over(directions: tuple[Direction, ...], documents: DuplicateMask, first_positive: Tensor,
                    answers: DuplicateMask | None) -> MaskTile:
    """The mask of duplicates over the columns of all directions.

    A query is excluded if it shares its positive with the row's query (a query of the same text always does), or, as a
    column of the row's positive, if some row gives it that positive.

    Args:
        directions: as in `ContrastiveSettings`.
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
    """The queries that have a row's positive as a positive, apart from the row's own query.

    Args:
        row_text: [rows] int64, hash of the text of each row's positive.
        row_query: [rows] int64, index of each row's query.
        query_ids: [queries] int64, hash of each query's text, over all ranks.
        given: [pairs, 2] int64, hashes of a query's text and of a text given to it as positive.
    """
    return duplicate_mask(row_text, row_query, query_ids, given.flip(1))


@dataclass(frozen=True, kw_only=True)
class GuidedMask:
    """The columns that a guide, another model, finds too similar to be negatives (GISTEmbed, Solatorio 2024,
    arXiv:2402.16829).

    A column is excluded if the guide's similarity to the row's anchor exceeds that of the row's query and its positive
    by more than a margin; the row's positive itself, and its own query as a column of its positive, are not.
    """

    query: Tensor
    """[rows, dim], the guide's vectors of the rows' queries; dot products are similarities."""
    document: Tensor
    """[candidates, dim]."""
    queries: Tensor | None
    """[queries, dim], of all ranks; needed by the directions to queries."""
    positive_index: Tensor
    """[rows] int64, column of each row's positive."""
    query_index: Tensor
    """[rows] int64, each row's own query in `queries`."""
    directions: tuple[Direction, ...]
    margin: float
    relative: bool
    """The margin is a share of the positive's similarity (its absolute value)."""

    def tile(self, first: int, last: int) -> Tensor:
        """[last - first, columns] bool."""
        positives = self.positive_index[first:last]
        anchors, parts = {"query": self.query[first:last], "document": self.document[positives]}, []
        own = (anchors["query"] @ self.document.T).gather(1, positives[:, None])
        highest = own + self.margin * (own.abs() if self.relative else 1.0)
        for direction in self.directions:
            anchor, _, column = direction.partition("_to_")
            keys = self.document if column == "document" else self.queries
            assert keys is not None, "directions to queries need the queries"
            similar = anchors[anchor] @ keys.T > highest
            if direction in ("query_to_document", "document_to_query"):
                protected = positives if column == "document" else self.query_index[first:last]
                similar.scatter_(1, protected[:, None], False)
            parts.append(similar)
        return torch.cat(parts, dim=1)


def either(one: MaskTile | None, other: MaskTile | None) -> MaskTile | None:
    """The mask of the columns that one of two masks excludes."""
    if one is None or other is None:
        return one or other
    return lambda first, last: one(first, last) | other(first, last)
