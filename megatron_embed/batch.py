"""The values that the data room hands to training. A row is one query or one document, for a reranker one pair of them;
rows are numbered per rank.

Local row numbers of an EmbedBatch: the queries come first (0 .. num_queries-1), then the documents. Documents of one
query are contiguous, its positives first, its hard negatives after them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Capacity(NamedTuple):
    """The most that any data-parallel rank holds, equal on all of them: messages are padded to it."""

    queries: int
    documents: int
    positives: int
    """Texts given as positives, of all queries together."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One bin of packed sequences, the same on every tensor-, context- and pipeline-parallel rank of a replica.

    `token_ids` is right-padded: tokens from `cu_seqlens[-1]` on are padding and belong to no sequence.
    Every tensor lives on the CPU until the model moves it.
    """

    token_ids: Tensor
    """[tokens] int64, padding included."""
    position_ids: Tensor
    """[tokens] int64, restarting at 0 in each sequence; 0 in the padding."""
    cu_seqlens: Tensor
    """[sequences + 1] int32, cumulative sequence lengths, from 0."""
    rows: Tensor
    """[sequences] int64, the local row number of each sequence."""
    token_types: Tensor | None = None
    """[tokens] int64, 0 in the padding; null: 0 everywhere."""
    repeated: bool = False
    """True where a micro-batch of the step is run again only so that ranks run equally many: its embeddings are ignored
    and their gradient is zero."""

    @property
    def num_sequences(self) -> int:
        return self.rows.numel()

    @property
    def valid_rows(self) -> Tensor:
        """The rows whose embeddings count: all, or none of a repeated micro-batch."""
        return self.rows[:0] if self.repeated else self.rows

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.cu_seqlens[-1])


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One data-parallel rank's share of one optimizer step: what every task needs. Objectives know the rest."""

    micro_batches: tuple[MicroBatch, ...]
    """In the order of both passes. Every data-parallel rank has the same number of them."""
    num_truncated: int
    """Rows whose text was cut to the maximum length."""
    data_set: str | None = None
    """The one of several data sets that all rows of the global batch are of; null: there is one, or they are mixed."""


@dataclass(frozen=True, kw_only=True)
class EmbedBatch(StepBatch):
    """Queries and the documents that they were given."""

    num_queries: int
    num_documents: int
    positive_index: Tensor
    """[num_queries] int64, local document number (0 .. num_documents-1) of each query's (first) positive."""
    is_positive: Tensor
    """[num_documents] bool, true for the documents that a query was given as positives: its first ones."""
    document_query: Tensor
    """[num_documents] int64, local query number that each document was given for."""
    query_ids: Tensor
    """[num_queries] int64, hash of each query's text: equal text, equal id, on every rank."""
    positive_query: Tensor
    """[positives] int64, local query number that each positive was given for, ascending."""
    positive_ids: Tensor
    """[positives] int64, hash of each positive's text, those of a row that are no candidates included."""
    document_ids: Tensor
    """[num_documents] int64, hash of each document's text."""
    in_batch: Tensor | None = None
    """[num_queries] bool, false where nothing but a query's own hard negatives are negatives; null: true everywhere."""
    scores: Tensor | None = None
    """[num_queries] float64, the label of each pair of a query with its document; null: the rows are no pairs."""
    teacher_scores: Tensor | None = None
    """[num_documents] float64, a teacher's score of each document for its query; null: the rows have none."""
    capacity: Capacity
    """Of the whole batch."""
    micro_capacity: Capacity
    """Of one micro-batch."""

    @property
    def num_rows(self) -> int:
        return self.num_queries + self.num_documents


@dataclass(frozen=True, kw_only=True)
class RerankBatch(StepBatch):
    """Queries with labelled documents. A row is a query with one document; those of a query are contiguous and lie in
    one micro-batch."""

    num_queries: int
    num_documents: int
    group_sizes: tuple[int, ...]
    """Documents of each query, in order; each >= 1."""
    labels: Tensor
    """[num_documents] float32, larger is better."""
    teacher_scores: Tensor | None
    """[num_documents] float32; null: the rows have none."""

    @property
    def num_rows(self) -> int:
        return self.num_documents
