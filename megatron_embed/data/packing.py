"""Token ids to packed micro-batches."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
import torch

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch
from megatron_embed.data.bins import bins_of_groups, bins_of_rows
from megatron_embed.data.prompts import Role, RoleTokenizer, TokenizedRows
from megatron_embed.data.record import Record, text_id
from megatron_embed.errors import DataError, TokenlessTextError

logger = logging.getLogger(__name__)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def pack(token_ids: Sequence[list[int]], rows: Sequence[int], is_query: Sequence[bool], *, tokens: int | None,
         alignment: int, pad_token_id: int, prompt_lengths: Sequence[int] | None = None,
         token_types: Sequence[list[int]] | None = None) -> MicroBatch:
    """One bin with the given sequences one after the other and padding at its end.

    Args:
        token_ids: per sequence, at least one token.
        rows: per sequence, its local row number.
        is_query: per sequence.
        tokens: size of the bin, padding included; None: the next multiple of `alignment`.
        alignment: tokens, >= 1; the bin is a multiple of it.
        pad_token_id: any id of the vocabulary; no sequence holds the padding.
        prompt_lengths: per sequence, leading tokens that pooling skips; None: 0 for all.
        token_types: per sequence, as long as its ids; None: 0 everywhere.
    Raises:
        ValueError: the sequences do not fit into `tokens`, or that is no multiple of `alignment`.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    assert lengths.size and lengths.all(), "a bin needs sequences, and a sequence needs tokens"
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    size = round_up(total, alignment) if tokens is None else tokens
    if size < total or size % alignment:
        raise ValueError(f"a bin of {size} tokens, alignment {alignment}, cannot hold {total} tokens")
    ids = np.full(size, pad_token_id, dtype=np.int64)
    ids[:total] = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=total)
    positions = np.zeros(size, dtype=np.int64)
    positions[:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
    types = None
    if token_types is not None:
        types = torch.zeros(size, dtype=torch.int64)
        types[:total] = torch.tensor(list(chain.from_iterable(token_types)), dtype=torch.int64)
    return MicroBatch(
        token_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        rows=torch.tensor(rows, dtype=torch.int64),
        is_query=torch.tensor(is_query, dtype=torch.bool),
        prompt_lengths=torch.tensor(prompt_lengths or [0] * len(lengths), dtype=torch.int64),
        token_types=types,
    )


def _pack_bins(bins: Sequence[Sequence[int]], token_ids: Sequence[list[int]], num_queries: int, *, alignment: int,
               constant_tokens: bool, pad_token_id: int, tokens: int | None = None) -> tuple[MicroBatch, ...]:
    """Bins of row numbers to micro-batches, of `tokens` each if given; rows before `num_queries` are queries."""
    largest = max((sum(len(token_ids[row]) for row in rows) for rows in bins), default=0)
    if tokens is None and constant_tokens:
        tokens = round_up(largest, alignment)
    return tuple(
        pack([token_ids[row] for row in rows], rows, [row < num_queries for row in rows], tokens=tokens,
             alignment=alignment, pad_token_id=pad_token_id)
        for rows in bins
    )


def build_embed_batch(records: Sequence[Record], tokenizer: RoleTokenizer, *, micro_batch_size: int, num_negatives: int,
                      alignment: int, constant_tokens: bool, most_positives: int = 1,
                      micro_batch_tokens: int | None = None, whole_groups: bool = False,
                      num_positives: int = 1, in_batch: torch.Tensor | None = None) -> EmbedBatch:
    """The batch of these records: one query each, up to `num_positives` positives, and up to `num_negatives` negatives.

    Without a token budget micro-batch m holds queries m*micro_batch_size ... and then all of their documents, in one
    bin. With one, each bin is padded to it, and any row may lie anywhere (data/bins.py).

    Args:
        records: this data-parallel rank's share of the step, in order.
        tokenizer: of the model that is trained.
        micro_batch_size: queries per micro-batch; the last one may be smaller. Not used with a token budget.
        num_negatives: hard negatives per query, in the row's order; a row with fewer contributes what it has.
        alignment: tokens; every bin is a multiple of it.
        constant_tokens: all bins get the size of the largest, for pipelines, whose messages have one shape.
        most_positives: of one row's positives this many are kept in `positive_ids`; the same on all ranks.
        micro_batch_tokens: tokens of every bin, a multiple of `alignment`, at least the longest row (or group); null:
            no budget.
        whole_groups: under a budget, a query shares the bin of its documents.
        num_positives: positives per query that are embedded, in the row's order.
        in_batch: [records] bool, whether a query has other negatives than its own; null: all have.
    Raises:
        ConfigError: the query prompt needs an instruction that a record lacks.
        DataError: a text has no tokens.
    """
    groups = [(*record.positive[:num_positives], *record.negatives[:num_negatives]) for record in records]
    documents = list(chain.from_iterable(groups))
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    first = np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(records)), sizes)

    queries = [record.query for record in records]
    instructions = [record.instruction for record in records]
    prompts = [record.query_prompt for record in records]
    query_tokens = tokenizer.tokenize(queries, "query", instructions, prompts)
    document_tokens = tokenizer.tokenize(documents, "document",
                                         prompts=[records[query].document_prompt for query in owner.tolist()])
    _refuse_empty(query_tokens, queries, [record.source for record in records])
    _refuse_empty(document_tokens, documents, [records[query].source for query in owner.tolist()])

    token_ids = query_tokens.token_ids + document_tokens.token_ids
    bins = _bins([len(ids) for ids in token_ids], sizes, micro_batch_size=micro_batch_size,
                 micro_batch_tokens=micro_batch_tokens, whole_groups=whole_groups)
    most_queries = max(sum(row < len(records) for row in bin_) for bin_ in bins)
    positives = [record.positive[:most_positives] for record in records]
    return EmbedBatch(
        micro_batches=_pack_bins(bins, token_ids, len(records), alignment=alignment, constant_tokens=constant_tokens,
                                 pad_token_id=tokenizer.pad_token_id, tokens=micro_batch_tokens),
        num_queries=len(records),
        num_documents=len(documents),
        positive_index=torch.from_numpy(first),
        is_positive=torch.tensor([place < len(record.positive[:num_positives])
                                  for record, size in zip(records, sizes, strict=True) for place in range(size)]),
        document_query=torch.from_numpy(owner),
        in_batch=in_batch,
        scores=_numbers([(record.score,) if record.score is not None else None for record in records]),
        teacher_scores=_numbers([_teacher_scores(record, num_positives, num_negatives) for record in records]),
        # With its prompt: the same words under another instruction ask for other documents.
        query_ids=_text_ids(tokenizer.fill_prompt("query", instruction, prompt) + query
                            for instruction, prompt, query in zip(instructions, prompts, queries, strict=True)),
        positive_query=torch.tensor([row for row, texts in enumerate(positives) for _ in texts], dtype=torch.int64),
        positive_ids=_text_ids(chain.from_iterable(positives)),
        document_ids=_text_ids(documents),
        num_truncated=query_tokens.num_truncated + document_tokens.num_truncated,
        capacity=_capacity(len(records), num_positives + num_negatives, most_positives),
        micro_capacity=_capacity(most_queries, num_positives + num_negatives, most_positives),
    )


def _bins(lengths: list[int], sizes: np.ndarray, *, micro_batch_size: int, micro_batch_tokens: int | None,
          whole_groups: bool) -> list[list[int]]:
    """Row numbers of each micro-batch, for `build_embed_batch`.

    Args:
        lengths: tokens of every row: the queries, then their documents.
        sizes: [queries] int64, documents of each query.
    """
    if micro_batch_tokens is not None and not whole_groups:
        return bins_of_rows(lengths, micro_batch_tokens)
    ends = len(sizes) + np.cumsum(sizes)
    rows = [[row, *range(end - size, end)] for row, (end, size) in enumerate(zip(ends, sizes, strict=True))]
    if micro_batch_tokens is not None:
        return bins_of_groups(rows, lengths, micro_batch_tokens)
    return [sorted(chain.from_iterable(rows[start : start + micro_batch_size]))
            for start in range(0, len(rows), micro_batch_size)]


def fill_bins(batch: EmbedBatch, count: int, micro_capacity: Capacity, *, whole_groups: bool) -> EmbedBatch:
    """The same rows in exactly `count` micro-batches of the same size.

    While there are too few, the one with the most tokens of those that can be divided is divided; if none can, the
    first is run again and marked `repeated`.

    Args:
        batch: of at most `count` micro-batches.
        count: agreed by all ranks.
        micro_capacity: of one micro-batch, agreed by all ranks.
        whole_groups: a query stays with its documents.
    """
    def unit_of(row: int) -> int:
        if not whole_groups:
            return row
        return row if row < batch.num_queries else int(batch.document_query[row - batch.num_queries])

    return replace(batch, micro_batches=divide_bins(batch.micro_batches, count, unit_of), micro_capacity=micro_capacity)


def divide_bins(micro_batches: Sequence[MicroBatch], count: int,
                unit_of: Callable[[int], int]) -> tuple[MicroBatch, ...]:
    """Exactly `count` >= their number of micro-batches, as `fill_bins` says.

    Args:
        unit_of: local row number -> what it must stay together with.
    """
    assert 0 < len(micro_batches) <= count
    divided = list(micro_batches)
    while len(divided) < count:
        divisible = [place for place, micro in enumerate(divided) if len(_units(micro, unit_of)) > 1]
        if not divisible:
            divided += [replace(divided[0], repeated=True)] * (count - len(divided))
            break
        largest = max(divisible, key=lambda place: (divided[place].num_tokens, -place))
        divided[largest : largest + 1] = _halves(divided[largest], unit_of)
    return tuple(divided)


def _units(micro: MicroBatch, unit_of: Callable[[int], int]) -> list[list[int]]:
    """Places in the micro-batch of what must stay together."""
    units: dict[int, list[int]] = {}
    for place, row in enumerate(micro.rows.tolist()):
        units.setdefault(unit_of(row), []).append(place)
    return list(units.values())


def _halves(micro: MicroBatch, unit_of: Callable[[int], int]) -> list[MicroBatch]:
    """Two micro-batches of about as many tokens each, padded to the size of the one they came from."""
    units, lengths = _units(micro, unit_of), micro.cu_seqlens.diff().tolist()
    sums = list(accumulate(sum(lengths[place] for place in unit) for unit in units))
    cut = min(range(1, len(units)), key=lambda number: abs(2 * sums[number - 1] - sums[-1]))
    return [_part(micro, sorted(chain.from_iterable(part))) for part in (units[:cut], units[cut:])]


def _part(micro: MicroBatch, places: list[int]) -> MicroBatch:
    bounds = micro.cu_seqlens.tolist()
    spans = [slice(bounds[place], bounds[place + 1]) for place in places]
    types = None if micro.token_types is None else [micro.token_types[span].tolist() for span in spans]
    return pack([micro.token_ids[span].tolist() for span in spans], micro.rows[places].tolist(),
                micro.is_query[places].tolist(), tokens=micro.token_ids.numel(), alignment=1, pad_token_id=0,
                prompt_lengths=micro.prompt_lengths[places].tolist(), token_types=types)


def _text_ids(texts: Iterable[str]) -> torch.Tensor:
    return torch.tensor([text_id(text) for text in texts], dtype=torch.int64)


def _numbers(rows: Sequence[tuple[float, ...] | None]) -> torch.Tensor | None:
    """[numbers] float64 of all rows, null if a row has none."""
    given = [row for row in rows if row is not None]
    return torch.tensor(list(chain.from_iterable(given)), dtype=torch.float64) if len(given) == len(rows) else None


def _teacher_scores(record: Record, num_positives: int, num_negatives: int) -> tuple[float, ...] | None:
    """Those of the documents that are embedded."""
    scores, split = record.teacher_scores, len(record.positive)
    return None if scores is None else (*scores[:split][:num_positives], *scores[split:][:num_negatives])


def _capacity(queries: int, num_documents: int, most_positives: int) -> Capacity:
    return Capacity(queries, queries * num_documents, queries * most_positives)


def _refuse_empty(rows: TokenizedRows, texts: Sequence[str], sources: Sequence[str]) -> None:
    for ids, text, source in zip(rows.token_ids, texts, sources, strict=True):
        if not ids:
            raise DataError(f"{source}: the text {text[:40]!r} has no tokens in this tokenizer; remove the row")


def build_encode_batches(texts: Sequence[str], role: Role, tokenizer: RoleTokenizer, *, micro_batch_tokens: int,
                         alignment: int, constant_tokens: bool, sort: bool = True,
                         instruction: str | None = None) -> tuple[MicroBatch, ...]:
    """Bins for inference; `rows` are the texts' indices.

    Args:
        texts: all of one role. They are tokenized at once: hand over a part at a time of a large corpus.
        role: whose prompt and length apply.
        tokenizer: of the model.
        micro_batch_tokens: tokens of a bin, padding included; a text that is longer has a bin of its own.
        alignment: tokens; every bin is a multiple of it.
        constant_tokens: all bins get the size of the largest.
        sort: longest first, so that equally long texts meet and memory peaks at once; else the texts' order.
        instruction: for a prompt with a place for it; null: the tokenizer's.
    Raises:
        TokenlessTextError: for the first text without tokens.
    """
    tokenized = tokenizer.tokenize(texts, role, [instruction] * len(texts))
    lengths = [len(ids) for ids in tokenized.token_ids]
    if tokenized.num_truncated:
        logger.info("%d of %d %s texts cut to the maximum length", tokenized.num_truncated, len(texts), role)
    order = sorted(range(len(texts)), key=lambda row: -lengths[row]) if sort else list(range(len(texts)))
    room = micro_batch_tokens // alignment * alignment
    bins: list[list[int]] = []
    filled = 0
    for row in order:
        if not lengths[row]:
            raise TokenlessTextError(row, f"{role} text number {row + 1}", texts[row])
        if not bins or filled + lengths[row] > room:
            bins.append([])
            filled = 0
        bins[-1].append(row)
        filled += lengths[row]
    return _pack_bins(bins, tokenized.token_ids, len(texts) if role == "query" else 0, alignment=alignment,
                      constant_tokens=constant_tokens, pad_token_id=tokenizer.pad_token_id)


def padding_fraction(micro_batches: Sequence[MicroBatch]) -> float:
    """Share of the bins' tokens that is padding, 0 to 1."""
    total = sum(micro_batch.token_ids.numel() for micro_batch in micro_batches)
    return 1 - sum(micro_batch.num_tokens for micro_batch in micro_batches) / total if total else 0.0
