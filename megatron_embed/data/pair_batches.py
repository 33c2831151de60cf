"""Rows of labelled documents to packed micro-batches of pairs; a query's documents share one micro-batch."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
import torch

from megatron_embed.batch import MicroBatch, RerankBatch
from megatron_embed.data.number_checks import check_labels, check_teacher
from megatron_embed.data.packing import (
    PackingSpec,
    bins_of_groups,
    pack_bins,
    pack_longest_first,
    round_up,
    split_micro_batches,
)
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.data.records import RerankRecord
from megatron_embed.errors import ConfigError, DataError, EmptyTextError

_SAMPLING = 0x5A17
"""Sets the draw of negatives apart from other uses of the run's seed."""


def sample_negatives(record: RerankRecord, num_negatives: int, seed: Sequence[int] | None) -> RerankRecord:
    """The record with at most `num_negatives` of its documents that are not relevant (label 0 or less).

    Every relevant document stays, and the order. 0: all negatives stay.

    Args:
        seed: of the draw; equal numbers, equal negatives. null: the first of the row.
    """
    negatives = [place for place, label in enumerate(record.labels) if label <= 0]
    if not num_negatives or len(negatives) <= num_negatives:
        return record
    drawn = set(negatives[:num_negatives])
    if seed is not None:
        generator = np.random.Generator(np.random.PCG64([_SAMPLING, *seed]))
        drawn = set(generator.choice(negatives, num_negatives, replace=False).tolist())
    kept = [place for place, label in enumerate(record.labels) if label > 0 or place in drawn]
    teacher = record.teacher_scores
    return replace(record, documents=tuple(record.documents[place] for place in kept),
                   labels=tuple(record.labels[place] for place in kept), document_ids=None,
                   teacher_scores=None if teacher is None else tuple(teacher[place] for place in kept))


def group_size(record: RerankRecord, num_negatives: int) -> int:
    """Documents that `sample_negatives` leaves."""
    positives = sum(label > 0 for label in record.labels)
    negatives = len(record.labels) - positives
    return positives + (min(negatives, num_negatives) if num_negatives else negatives)


def pairs_of(record: RerankRecord) -> list[Pair]:
    """What the model judges of a row."""
    return [Pair(query=record.query, document=document, instruction=record.instruction, source=record.source)
            for document in record.documents]


def check_rerank_records(records: Sequence[RerankRecord], tokenizer: PairTokenizer, *, loss: str, temperature: float,
                         num_negatives: int, micro_batch_tokens: int | None, alignment: int) -> None:
    """Refuses, before the first step, rows that training could not use. No communication.

    Args:
        temperature: of the loss; divides a teacher's scores in kl_distillation.
    Raises:
        DataError: beginning FILE:LINE, for labels or teacher scores that the loss cannot take, or a query that leaves
            no room for a document.
        ConfigError: a group may not fit into `training.micro_batch_tokens`.
    """
    for record in records:
        _check_numbers(record, loss, temperature)
        tokenizer.check_room(pairs_of(record)[:1], strict=True)
        largest = round_up(group_size(record, num_negatives) * tokenizer.max_length, alignment)
        if micro_batch_tokens is not None and largest > micro_batch_tokens:
            raise ConfigError(f"training.micro_batch_tokens = {micro_batch_tokens} may not hold the "
                              f"{group_size(record, num_negatives)} documents of {record.source}, which stay in one "
                              f"micro-batch, at {tokenizer.max_length} tokens each; raise it to {largest}, or set "
                              "data.num_negatives", key="training.micro_batch_tokens")


def _check_numbers(record: RerankRecord, loss: str, temperature: float) -> None:
    check_labels(record.labels, loss, record.source)
    if loss != "kl_distillation":
        return
    if record.teacher_scores is None:
        raise DataError(f"{record.source}: teacher_scores is missing; objective.loss = kl_distillation needs one score "
                        "per document")
    check_teacher(record.teacher_scores, loss, temperature, record.source)


def build_rerank_batch(records: Sequence[RerankRecord], tokenizer: PairTokenizer, packing: PackingSpec) -> RerankBatch:
    """The batch of these rows, each a query with all of its documents.

    Args:
        records: this data-parallel rank's share of the step, in order; negatives are sampled already.
        tokenizer: that of the model in training.
        packing: how the pairs are packed; a query's documents always share a micro-batch.
    Raises:
        DataError: a query leaves no room for its document.
    """
    sizes = [len(record.documents) for record in records]
    tokenized = tokenizer.tokenize(list(chain.from_iterable(pairs_of(record) for record in records)))
    lengths = [len(ids) for ids in tokenized.token_ids]
    groups = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    teachers = [record.teacher_scores for record in records]
    return RerankBatch(
        micro_batches=pack_bins(bins_of_groups(groups, lengths, packing), tokenized.token_ids, packing,
                                tokenizer.pad_token_id, token_types=tokenized.token_types,
                                tokens=packing.micro_batch_tokens),
        num_queries=len(records), num_documents=sum(sizes), group_sizes=tuple(sizes),
        labels=torch.tensor([label for record in records for label in record.labels], dtype=torch.float32),
        teacher_scores=None if any(scores is None for scores in teachers) else torch.tensor(
            [score for scores in teachers for score in scores or ()], dtype=torch.float32),
        num_truncated=tokenized.num_truncated)


def split_rerank_to_count(batch: RerankBatch, count: int) -> RerankBatch:
    """The same rows in exactly `count` micro-batches of the same size, agreed by all ranks; a query stays whole.

    As `split_to_count`: large micro-batches are split, and if none can be, the first is run again.
    """
    query_of_row = [query for query, size in enumerate(batch.group_sizes) for _ in range(size)]
    return replace(batch, micro_batches=split_micro_batches(batch.micro_batches, count, query_of_row.__getitem__))


def build_score_batches(pairs: Sequence[Pair], tokenizer: PairTokenizer,
                        packing: PackingSpec) -> tuple[MicroBatch, ...]:
    """Micro-batches for inference, longest pairs first; `rows` are the pairs' indices.

    Args:
        packing: with a token budget; a pair that is longer has a micro-batch of its own.
    Raises:
        DataError: a query leaves no room for its document.
        EmptyTextError: for the first pair without tokens.
    """
    tokenized = tokenizer.tokenize(pairs)
    lengths = [len(ids) for ids in tokenized.token_ids]
    for row, length in enumerate(lengths):
        if not length:
            raise EmptyTextError(row, f"pair number {row + 1}", pairs[row].document)
    return pack_bins(pack_longest_first(lengths, packing), tokenized.token_ids, packing, tokenizer.pad_token_id,
                     token_types=tokenized.token_types)
