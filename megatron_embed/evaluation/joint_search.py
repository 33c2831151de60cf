"""Exact search with a joint model: by each of its scores and by their weighted sum, in one pass over the documents."""

import torch
from torch import Tensor

from megatron_embed.batch import TextVectors
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.evaluation.maxsim_search import BlockPairs, BlockSearch
from megatron_embed.losses.joint import JointTexts, columns_of, joint_pair_scores, joint_scores
from megatron_embed.names import JOINT_SCORES

PREFIXES = ("", *(f"{score}/" for score in JOINT_SCORES))
"""Before the names of metrics: by the sum, then by each score."""


class JointSearch:
    """The best documents of each query by the sum and by each score; see BlockSearch.

    Attributes:
        searches: by the prefix of their metrics.
    """

    def __init__(self, queries: TextVectors, joint: JointFormat, k: int, *, excluded: Tensor | None = None) -> None:
        device = queries.vectors.device
        self._queries, self._joint = JointTexts(queries, joint.dense_rows), joint
        self._columns = columns_of(self._queries.weights.ids)
        self._weights = torch.tensor(joint.score_weights, device=device)
        self.searches = {prefix: BlockSearch(len(queries.counts), k, device, excluded=excluded) for prefix in PREFIXES}

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Search further documents; `indices`: [documents] int64 of any order."""
        with torch.no_grad():
            scores = joint_scores(self._queries, JointTexts(documents, self._joint.dense_rows), self._columns)
            total = torch.tensordot(self._weights, scores, dims=1)
        for search, values in zip(self.searches.values(), (total, *scores), strict=True):
            search.add_scores(values, indices)


class JointPairs(BlockPairs):
    """By the sum of the scores."""

    def __init__(self, queries: TextVectors, joint: JointFormat, query_of: Tensor, document_of: Tensor) -> None:
        super().__init__(query_of, document_of)
        self._queries, self._joint = JointTexts(queries, joint.dense_rows), joint
        self._columns = columns_of(self._queries.weights.ids)
        self._weights = torch.tensor(joint.score_weights, device=queries.vectors.device)

    def add(self, documents: TextVectors, indices: Tensor) -> None:
        """Score the pairs of further documents; `indices`: [documents] int64."""
        rows, pairs = self.pairs_with(indices)
        if len(pairs):
            chosen = JointTexts(documents.pick(rows), self._joint.dense_rows)
            with torch.no_grad():
                scores = joint_pair_scores(self._queries, chosen, self._columns, self._query_of[pairs])
                self._scores[pairs] = torch.tensordot(self._weights, scores, dims=1).cpu()
