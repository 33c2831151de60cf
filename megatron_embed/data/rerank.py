"""Rows of labelled documents to packed micro-batches of pairs; a query's documents share one micro-batch."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
import torch

from megatron_embed.batch import MicroBatch, RerankBatch
from megatron_embed.data.bins import bins_of_groups
from megatron_embed.data.numbers import check_labels, check_teacher
from megatron_embed.data.packing import divide_bins, pack, round_up
from megatron_embed.data.pairs import Pair, PairTokenizer, TokenizedPairs
from megatron_embed.data.record import RerankRecord
from megatron_embed.errors import ConfigError, DataError, TokenlessTextError

_SAMPLING = 0x5A17
"""Sets the draw of negatives apart from other uses of the run's seed."""


def choose_negatives(record: RerankRecord, num_negatives: int, seed: Sequence[int] | None) -> RerankRecord:
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
    """Documents that `choose_negatives` leaves."""
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
        tokenizer.check_room(pairs_of(record)[:1])
        largest = round_up(group_size(record, num_negatives) * tokenizer.max_length, alignment)
        if micro_batch_tokens is not None and largest > micro_batch_tokens:
            raise ConfigError(f"training.micro_batch_tokens = {micro_batch_tokens} may not hold the "
                              f"{group_size(record, num_negatives)} documents of {record.source}, which stay in one "
                              f"micro-batch, at {tokenizer.max_length} tokens each; raise it to {largest}, or set "
                              "data.num_negatives")


def _check_numbers(record: RerankRecord, loss: str, temperature: float) -> None:
    check_labels(record.labels, loss, record.source)
    if loss != "kl_distillation":
        return
    if record.teacher_scores is None:
        raise DataError(f"{record.source}: teacher_scores is missing; objective.loss = kl_distillation needs one score "
                        "per document")
    check_teacher(record.teacher_scores, loss, temperature, record.source)


def build_rerank_batch(records: Sequence[RerankRecord], tokenizer: PairTokenizer, *, micro_batch_size: int,
                       alignment: int, constant_tokens: bool, micro_batch_tokens: int | None = None) -> RerankBatch:
    """The batch of these rows, each a query with all of its documents.

    Args:
        records: this data-parallel rank's share of the step, in order; negatives are sampled already.
        tokenizer: of the model that is trained.
        micro_batch_size: queries per micro-batch; the last one may be smaller. Not used with a token budget.
        alignment: tokens; every bin is a multiple of it.
        constant_tokens: all bins get the size of the largest, for pipelines, whose messages have one shape.
        micro_batch_tokens: tokens of every bin; null: no budget.
    Raises:
        DataError: a query leaves no room for its document.
    """
    sizes = [len(record.documents) for record in records]
    tokenized = tokenizer.tokenize(list(chain.from_iterable(pairs_of(record) for record in records)))
    lengths = [len(ids) for ids in tokenized.token_ids]
    groups = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    if micro_batch_tokens is None:
        bins = [list(chain.from_iterable(groups[start : start + micro_batch_size]))
                for start in range(0, len(groups), micro_batch_size)]
    else:
        bins = bins_of_groups(groups, lengths, micro_batch_tokens)
    teachers = [record.teacher_scores for record in records]
    return RerankBatch(
        micro_batches=pack_pairs(bins, tokenized, alignment=alignment, constant_tokens=constant_tokens,
                                 pad_token_id=tokenizer.pad_token_id, tokens=micro_batch_tokens),
        num_queries=len(records), num_documents=sum(sizes), group_sizes=tuple(sizes),
        labels=torch.tensor([label for record in records for label in record.labels], dtype=torch.float32),
        teacher_scores=None if any(scores is None for scores in teachers) else torch.tensor(
            [score for scores in teachers for score in scores or ()], dtype=torch.float32),
        num_truncated=tokenized.num_truncated)


def fill_rerank_bins(batch: RerankBatch, count: int) -> RerankBatch:
    """The same rows in exactly `count` micro-batches of the same size, agreed by all ranks; a query stays whole.

    As `fill_bins`: large micro-batches are divided, and if none can be, the first is run again.
    """
    owner = [query for query, size in enumerate(batch.group_sizes) for _ in range(size)]
    return replace(batch, micro_batches=divide_bins(batch.micro_batches, count, owner.__getitem__))


def pack_pairs(bins: Sequence[Sequence[int]], pairs: TokenizedPairs, *, alignment: int, constant_tokens: bool,
               pad_token_id: int, tokens: int | None = None) -> tuple[MicroBatch, ...]:
    """Bins of pair numbers to micro-batches, of `tokens` each if given."""
    if tokens is None and constant_tokens:
        tokens = round_up(max(sum(len(pairs.token_ids[row]) for row in rows) for rows in bins), alignment)
    return tuple(
        pack([pairs.token_ids[row] for row in rows], rows, [False] * len(rows), tokens=tokens, alignment=alignment,
             pad_token_id=pad_token_id,
             token_types=None if pairs.token_types is None else [pairs.token_types[row] for row in rows])
        for rows in bins)


def build_score_batches(pairs: Sequence[Pair], tokenizer: PairTokenizer, *, micro_batch_tokens: int, alignment: int,
                        constant_tokens: bool) -> tuple[MicroBatch, ...]:
    """Bins for inference, longest pairs first; `rows` are the pairs' numbers.

    Args:
        micro_batch_tokens: tokens of a bin, padding included; a pair that is longer has a bin of its own.
        alignment, constant_tokens: as in `build_rerank_batch`.
    Raises:
        DataError: a query leaves no room for its document.
        TokenlessTextError: for the first pair without tokens.
    """
    tokenized = tokenizer.tokenize(pairs)
    lengths = [len(ids) for ids in tokenized.token_ids]
    room = micro_batch_tokens // alignment * alignment
    bins: list[list[int]] = []
    filled = 0
    for row in sorted(range(len(pairs)), key=lambda row: -lengths[row]):
        if not lengths[row]:
            raise TokenlessTextError(row, f"pair number {row + 1}", pairs[row].document)
        if not bins or filled + lengths[row] > room:
            bins.append([])
            filled = 0
        bins[-1].append(row)
        filled += lengths[row]
    return pack_pairs(bins, tokenized, alignment=alignment, constant_tokens=constant_tokens,
                      pad_token_id=tokenizer.pad_token_id)
