"""The batches that `data` hands to training. A row is one query or one document, for a reranker one pair of them.

A row's index is local to the rank. In an EmbedBatch the queries come first (0 .. num_queries-1), then the documents.
Documents of one query are contiguous, its positives first, its hard negatives after them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Capacity(NamedTuple):
    """The most rows that any data-parallel rank holds, equal on all of them: messages are padded to it."""

    queries: int
    documents: int
    positives: int
    """Positives of all queries together."""


@dataclass(frozen=True, kw_only=True)
class JointOutputs:
    """What a joint model gives for a text besides the vectors of its tokens."""

    dense_rows: int
    """Rows before those of the tokens, which hold the text's own vector."""
    unweighted: frozenset[int]
    """Ids of tokens without a weight: special ones."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed sequences, the same on every tensor-, context- and pipeline-parallel rank of a replica.

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
    """[sequences] int64, the local row index of each sequence."""
    token_types: Tensor | None = None
    """[tokens] int64, 0 in the padding; None: 0 everywhere."""
    vectors: Tensor | None = None
    """[tokens] int64, of a multi-vector model: the index, among all vectors of the rank's rows, of the vector that the
    token gives, -1 for none and in the padding; None: each sequence gives one vector."""
    joint: JointOutputs | None = None
    """A joint model's, whose texts' rows stand before those that `vectors` numbers; None: there are no such rows."""
    key_lengths: Tensor | None = None
    """[sequences] int32, tokens of each sequence that attention sees, its first ones; None: all of them."""
    repeated: bool = False
    """True if a micro-batch of the step is run again only so that all ranks run equally many: its embeddings are
    ignored and their gradient is zero."""

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

    @property
    def outputs(self) -> Tensor:
        """[outputs that count] int64, where each of them belongs: the row of a sequence, or the index of a vector; of a
        joint model those of the texts, then those of the tokens."""
        if self.vectors is None:
            return self.valid_rows
        if self.repeated:
            return self.vectors[:0]
        of_tokens = self.vectors[self.vectors >= 0]
        return of_tokens if self.joint is None else torch.cat([self._text_outputs(self.joint.dense_rows), of_tokens])

    def _text_outputs(self, dense_rows: int) -> Tensor:
        """[sequences * dense_rows] int64, indices of the rows before those of each text's tokens."""
        assert self.vectors is not None
        token = (self.vectors >= 0).nonzero()[:, 0]
        first = self.vectors[token[torch.searchsorted(token, self.cu_seqlens[:-1].to(torch.int64))]]
        return (first[:, None] + torch.arange(-dense_rows, 0)).flatten()


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One data-parallel rank's share of one optimizer step: the fields that every task has."""

    micro_batches: tuple[MicroBatch, ...]
    """In the order in which they are run. Every data-parallel rank has the same number of them."""
    num_truncated: int
    """Rows whose text was truncated to the maximum length."""
    data_set: str | None = None
    """Name of the data set that all rows of the global batch come from; None: there is only one, or they are mixed."""
    set_rows: Mapping[str, int] = field(default_factory=dict)
    """Rows of the global batch by the name of their data set; empty if there is only one."""
    row_ids: Tensor | None = None
    """[num_queries] int64, each query's row in the data; None: they come from no data set."""
    encoded_row: Tensor | None = None
    """[rows that the model encodes] int64, the row in the micro-batches that has each row's tokens: itself, or an
    earlier one of the same text, whose outputs it shares; None: each row itself."""

    @property
    def encoded_outputs(self) -> Tensor | None:
        """[outputs] int64, for each output of the rows the index of the one that the model gives for it; None: itself.
        See `encoded_row`."""
        return self.encoded_row

    @property
    def num_texts(self) -> int:
        """Rows that the model encodes, each repetition of a text counted, before ranks agree on micro-batches."""
        encoded = sum(micro.num_sequences for micro in self.micro_batches)
        return encoded if self.encoded_row is None else self.encoded_row.numel()


@dataclass(frozen=True, kw_only=True)
class EmbedBatch(StepBatch):
    """Queries with their positives and hard negatives."""

    num_queries: int
    num_documents: int
    positive_index: Tensor
    """[num_queries] int64, local document index (0 .. num_documents-1) of each query's (first) positive."""
    is_positive: Tensor
    """[num_documents] bool, true for the positives, which are the first documents of each query."""
    document_query: Tensor
    """[num_documents] int64, local index of the query that each document belongs to."""
    query_ids: Tensor
    """[num_queries] int64, hash of each query's text: equal text, equal id, on every rank."""
    positive_query: Tensor
    """[positives] int64, local index of the query that each positive belongs to, ascending."""
    positive_ids: Tensor
    """[positives] int64, hash of each positive's text, including positives that are not embedded."""
    document_ids: Tensor
    """[num_documents] int64, hash of each document's text."""
    in_batch: Tensor | None = None
    """[num_queries] bool, false for a query that has only its own hard negatives; None: true everywhere."""
    scores: Tensor | None = None
    """[num_queries] float64, the label of each pair of a query with its document; None: the rows are not pairs."""
    teacher_scores: Tensor | None = None
    """[num_documents] float64, a teacher's score of each document for its query; None: the rows have none."""
    vector_counts: Tensor | None = None
    """[num_rows] int64, vectors of each row of a multi-vector model, the queries' first; None: one each."""
    dense_rows: int = 0
    """How many of each row's vectors, its first, hold the text's own vector in a joint model; see JointTexts."""
    query_token_ids: Tensor | None = None
    """[ids] int64, ascending: the tokens of the vocabulary that some of the queries contain and that have weights in a
    joint model, and maybe others; None: another model."""
    embeds_documents: bool = True
    """False: the micro-batches hold the queries alone, since the documents have vectors already."""
    capacity: Capacity
    """Capacity of the whole batch."""
    micro_capacity: Capacity
    """Capacity of one micro-batch."""

    @property
    def num_rows(self) -> int:
        return self.num_queries + self.num_documents

    @property
    def encoded_outputs(self) -> Tensor | None:
        return None if self.encoded_row is None else self.outputs_of(self.encoded_row)

    def outputs_of(self, rows: Tensor) -> Tensor:
        """[outputs] int64, the indices of what the model gives for these rows, row after row: a vector each, or each
        row's vectors.

        Args:
            rows: [rows] int64, the queries' from 0, then the documents'.
        """
        if self.vector_counts is None:
            return rows
        starts, counts = self.vector_counts.cumsum(0) - self.vector_counts, self.vector_counts[rows]
        within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return torch.repeat_interleave(starts[rows], counts) + within


@dataclass(frozen=True, kw_only=True)
class RerankBatch(StepBatch):
    """Queries with labelled documents. A row is a query with one document; the rows of a query are contiguous and share
    a micro-batch."""

    num_queries: int
    num_documents: int
    group_sizes: tuple[int, ...]
    """Number of documents of each query, in order; each >= 1."""
    labels: Tensor
    """[num_documents] float32, larger is better."""
    teacher_scores: Tensor | None
    """[num_documents] float32; None: the rows have none."""

    @property
    def num_rows(self) -> int:
        return self.num_documents


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """The vectors that a multi-vector model gives for some texts, text after text."""

    vectors: Tensor
    """[vectors, dim]."""
    counts: Tensor
    """[texts] int64 on the CPU, vectors of each text, >= 1."""
    counts_on_device: Tensor | None = None
    """The same on the vectors' device; None: copied when it is needed, for which the host waits."""

    @property
    def device_counts(self) -> Tensor:
        """[texts] int64 on the vectors' device."""
        return self.counts.to(self.vectors.device) if self.counts_on_device is None else self.counts_on_device

    @property
    def text_of(self) -> Tensor:
        """[vectors] int64 on the vectors' device, the text of each vector."""
        return owners(self.device_counts, len(self.vectors))

    def pick(self, rows: Tensor) -> "TextVectors":
        """Some texts, in any order; `rows`: [texts] int64 on the CPU."""
        starts, counts = (self.counts.cumsum(0) - self.counts)[rows], self.counts[rows]
        within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        index = torch.repeat_interleave(starts, counts) + within
        return TextVectors(vectors=self.vectors[index.to(self.vectors.device)], counts=counts)

    def part(self, first: int, last: int) -> "TextVectors":
        """Texts `first` to `last - 1`; views."""
        start, stop = int(self.counts[:first].sum()), int(self.counts[:last].sum())
        there = None if self.counts_on_device is None else self.counts_on_device[first:last]
        return TextVectors(vectors=self.vectors[start:stop], counts=self.counts[first:last], counts_on_device=there)


def owners(counts: Tensor, total: int) -> Tensor:
    """[total] int64 on the counts' device: 0 as often as the first count says, then 1, and so on.

    As `repeat_interleave`, without a wait for the device, whose sum of the counts the host knows.

    Args:
        counts: [texts] int64.
        total: their sum.
    """
    return torch.searchsorted(counts.cumsum(0), torch.arange(total, device=counts.device), right=True)
