"""Mask of candidates that are not negatives of a query because some row gives it their text as a positive."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def tile(self, first: int, last: int) -> Tensor:
        """[last - first, candidates] bool: rows first .. last - 1 of the mask."""
        counts = self.num_given[first:last]
        rows = torch.repeat_interleave(counts)
        within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        given = torch.zeros(last - first, self.num_texts, dtype=torch.bool, device=rows.device)
        given[rows, self.given_text[self.first_given[first:last][rows] + within]] = True
        return given[:, self.candidate_text].scatter_(1, self.positive_index[first:last, None], False)


def duplicate_mask(query_ids: Tensor, positive_index: Tensor, document_ids: Tensor, given: Tensor) -> DuplicateMask:
    """The mask of these queries over these candidates.

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
    return DuplicateMask(
        positive_index=positive_index, candidate_text=candidate_text, num_texts=len(texts), given_text=text[known],
        first_given=first, num_given=torch.searchsorted(queries, query_ids, right=True) - first)
