"""Token ids to packed micro-batches, which hold almost no padding."""

import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
import torch

from megatron_embed.batch import Capacity, EmbedBatch, MicroBatch
from megatron_embed.data.records import Record, text_id
from megatron_embed.data.repeated_texts import encoded_rows, first_rows
from megatron_embed.data.row_vectors import RowVectors
from megatron_embed.data.tokenized import TokenizedRows
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import NO_TOKENS, DataError, EmptyTextError
from megatron_embed.names import Role
from megatron_embed.rounding import round_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackingSpec:
    """How rows are packed into micro-batches."""

    micro_batch_size: int = 1
    """Queries per micro-batch; the last one of a step may have fewer. Not used with a token budget."""
    micro_batch_tokens: int | None = None
    """Token budget: tokens of every micro-batch, a multiple of `alignment`, at least the longest row (or group). None:
    no budget."""
    alignment: int = 1
    """Tokens, >= 1; the size of every micro-batch is a multiple of it."""
    uniform_size: bool = False
    """All micro-batches get the size of the largest, for pipelines, whose messages have one shape."""
    keep_groups_together: bool = False
    """Under a budget, a query shares the micro-batch of its documents."""
    encode_once: bool = False
    """A text that several queries or several documents of a share have is in one micro-batch alone."""


@dataclass(frozen=True, kw_only=True)
class DocumentsPerQuery:
    """Which of a row's documents are embedded."""

    positives: int = 1
    """At most this many per query, in the row's order."""
    negatives: int = 0
    """At most this many hard negatives per query, in the row's order."""
    most_positives: int = 1
    """At most this many positives of a row are kept in `positive_ids`; the same on all ranks."""
    seed: int | None = None
    """For sampling the documents, each step again, from seed, step and row alone; None: the first ones of the row."""
    embedded: bool = True
    """False: the model embeds queries alone; the documents have vectors already."""


def pack(token_ids: Sequence[list[int]], rows: Sequence[int], *, tokens: int | None, alignment: int, pad_token_id: int,
         token_types: Sequence[list[int]] | None = None, vectors: RowVectors | None = None) -> MicroBatch:
    """One micro-batch with the given sequences one after the other and padding at its end.

    Args:
        token_ids: per sequence, at least one token.
        rows: per sequence, its local row index.
        tokens: size of the micro-batch, padding included; None: the next multiple of `alignment`.
        alignment: tokens, >= 1; the size is a multiple of it.
        pad_token_id: any id of the vocabulary; no sequence holds the padding.
        token_types: per sequence, as long as its ids; None: 0 everywhere.
        vectors: of all rows, of a multi-vector model; None: each sequence gives one.
    Raises:
        ValueError: the sequences do not fit into `tokens`, or that is not a multiple of `alignment`.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    assert lengths.size and lengths.all(), "a micro-batch needs sequences, and a sequence needs tokens"
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
        token_types=types,
        vectors=None if vectors is None else vectors.of_tokens(rows, size),
        key_lengths=None if vectors is None else vectors.key_lengths(rows),
        joint=None if vectors is None else vectors.joint,
    )


def pack_bins(bins: Sequence[Sequence[int]], token_ids: Sequence[list[int]], packing: PackingSpec, pad_token_id: int, *,
              token_types: Sequence[list[int]] | None = None, tokens: int | None = None,
              vectors: RowVectors | None = None) -> tuple[MicroBatch, ...]:
    """Bins of row indices to micro-batches, of `tokens` each if given."""
    if tokens is None and packing.uniform_size:
        largest = max((sum(len(token_ids[row]) for row in rows) for rows in bins), default=0)
        tokens = round_up(largest, packing.alignment)
    return tuple(
        pack([token_ids[row] for row in rows], rows, tokens=tokens, alignment=packing.alignment,
             pad_token_id=pad_token_id, vectors=vectors,
             token_types=None if token_types is None else [token_types[row] for row in rows])
        for rows in bins
    )


def build_embed_batch(records: Sequence[Record], tokenizer: RoleTokenizer, packing: PackingSpec,
                      documents: DocumentsPerQuery, *, in_batch: torch.Tensor | None = None) -> EmbedBatch:
    """The batch of these records: one query each with its documents.

    Without a token budget micro-batch m holds queries m*micro_batch_size ... and then all of their documents. With one,
    each micro-batch is padded to it, and any row may lie anywhere.

    Args:
        records: this data-parallel rank's share of the step, in order.
        tokenizer: that of the model in training.
        packing: how the rows are packed.
        documents: how many documents of a row; a row with fewer contributes all it has.
        in_batch: [records] bool, whether a query has other negatives than its own; None: all have.
    Raises:
        ConfigError: the query prompt needs an instruction that a record lacks.
        DataError: a text has no tokens.
    """
    groups = [(*record.positive[: documents.positives], *record.negatives[: documents.negatives]) for record in records]
    texts = list(chain.from_iterable(groups))
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    first = np.cumsum(sizes) - sizes
    document_query = np.repeat(np.arange(len(records)), sizes)
    query_tokens = _tokenize_queries(records, tokenizer)
    owners = [records[query] for query in document_query.tolist()] if documents.embedded else []
    document_tokens = _tokenize_documents(texts[: len(owners)], owners, tokenizer)
    token_ids = query_tokens.token_ids + document_tokens.token_ids
    vectors = RowVectors.of(query_tokens, document_tokens)
    lengths = [len(ids) for ids in token_ids]
    encoded = first_rows(query_tokens, document_tokens) if packing.encode_once else list(range(len(lengths)))
    bins = _bins(lengths, sizes * documents.embedded, packing, encoded)
    most_queries = max(sum(row < len(records) for row in rows) for rows in bins)
    positives = [record.positive[: documents.most_positives] for record in records]
    return EmbedBatch(
        micro_batches=pack_bins(bins, token_ids, packing, tokenizer.pad_token_id, tokens=packing.micro_batch_tokens,
                                vectors=vectors),
        vector_counts=None if vectors is None else vectors.counts, encoded_row=encoded_rows(encoded),
        dense_rows=0 if vectors is None else vectors.dense_rows,
        query_token_ids=None if vectors is None else vectors.weighted_ids(query_tokens.token_ids),
        num_queries=len(records), num_documents=len(texts), positive_index=torch.from_numpy(first),
        is_positive=torch.tensor([index < len(record.positive[: documents.positives])
                                  for record, size in zip(records, sizes, strict=True) for index in range(size)]),
        document_query=torch.from_numpy(document_query), in_batch=in_batch, embeds_documents=documents.embedded,
        scores=_flat([(record.score,) if record.score is not None else None for record in records]),
        teacher_scores=_flat([_teacher_scores(record, documents) for record in records]),
        # With its prompt: the same words under another instruction ask for other documents.
        query_ids=_text_ids(tokenizer.fill_prompt("query", record.instruction, record.query_prompt) + record.query
                            for record in records),
        positive_query=torch.tensor([row for row, group in enumerate(positives) for _ in group], dtype=torch.int64),
        positive_ids=_text_ids(chain.from_iterable(positives)),
        document_ids=_text_ids(texts),
        num_truncated=query_tokens.num_truncated + document_tokens.num_truncated,
        capacity=_capacity(len(records), documents), micro_capacity=_capacity(most_queries, documents),
    )


def _tokenize_queries(records: Sequence[Record], tokenizer: RoleTokenizer) -> TokenizedRows:
    queries = [record.query for record in records]
    tokenized = tokenizer.tokenize(queries, "query", [record.instruction for record in records],
                                   [record.query_prompt for record in records])
    _refuse_empty(tokenized, queries, records)
    return tokenized


def _tokenize_documents(texts: Sequence[str], records: Sequence[Record], tokenizer: RoleTokenizer) -> TokenizedRows:
    """Token ids of documents; `records`: for each text the record that it belongs to."""
    tokenized = tokenizer.tokenize(texts, "document", prompts=[record.document_prompt for record in records])
    _refuse_empty(tokenized, texts, records)
    return tokenized


def _bins(lengths: list[int], sizes: np.ndarray, packing: PackingSpec, encoded: list[int]) -> list[list[int]]:
    """Row indices of each micro-batch, for `build_embed_batch`.

    Args:
        lengths: tokens of every row: the queries, then their documents.
        sizes: [queries] int64, documents of each query.
        encoded: for each row the one that is encoded in its place, see `first_rows`; changed where a micro-batch would
            have no row left, whose first one then is encoded itself.
    """
    if packing.micro_batch_tokens is not None and not packing.keep_groups_together:
        own = [row for row, other in enumerate(encoded) if row == other]
        bins = pack_to_budget([lengths[row] for row in own], packing.micro_batch_tokens)
        return [[own[index] for index in rows] for rows in bins]
    ends = len(sizes) + np.cumsum(sizes)
    rows = [[row, *range(end - size, end)] for row, (end, size) in enumerate(zip(ends, sizes, strict=True))]
    bins = bins_of_groups(rows, lengths, packing)
    for whole in bins:
        if all(encoded[row] != row for row in whole):
            encoded[whole[0]] = whole[0]  # ranks agree on the number of micro-batches without a message
    return [[row for row in whole if encoded[row] == row] for whole in bins]


def bins_of_groups(groups: Sequence[Sequence[int]], lengths: Sequence[int], packing: PackingSpec) -> list[list[int]]:
    """Row indices of each micro-batch, whole groups (a query with its documents) in order: as many as fit into the
    budget, or `micro_batch_size`."""
    if packing.micro_batch_tokens is not None:
        return pack_groups_to_budget(groups, lengths, packing.micro_batch_tokens)
    return [sorted(chain.from_iterable(groups[start : start + packing.micro_batch_size]))
            for start in range(0, len(groups), packing.micro_batch_size)]


def pack_to_budget(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in bins of at most `tokens`: the longest first, each into the fullest bin that still holds it (best-fit
    decreasing).

    Args:
        lengths: tokens of each row, none above `tokens`.
        tokens: size of a bin.
    Returns:
        Row indices per bin, ascending; the same for the same lengths.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        position = bisect_left(free, (lengths[row], 0))
        left, index = free.pop(position) if position < len(free) else (tokens, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(row)
        insort(free, (left - lengths[row], index))
    return [sorted(rows) for rows in bins]


def pack_groups_to_budget(groups: Sequence[Sequence[int]], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Whole groups of rows in bins of at most `tokens`, in order: a bin ends where the next group does not fit.

    Not sorted by length, which would make the texts of a bin alike and so choose its negatives.
    """
    bins: list[list[int]] = []
    used = 0
    for group in groups:
        size = sum(lengths[row] for row in group)
        if not bins or used + size > tokens:
            bins.append([])
            used = 0
        bins[-1] += group
        used += size
    return [sorted(rows) for rows in bins]


def pack_longest_first(lengths: Sequence[int], packing: PackingSpec) -> list[list[int]]:
    """Rows in bins of the budget, the longest first, so that equally long rows meet and memory peaks at once; a row
    that is longer than the budget has a bin of its own. For inference."""
    assert packing.micro_batch_tokens is not None
    budget = packing.micro_batch_tokens // packing.alignment * packing.alignment
    bins: list[list[int]] = []
    used = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not bins or used + lengths[row] > budget:
            bins.append([])
            used = 0
        bins[-1].append(row)
        used += lengths[row]
    return bins


def split_to_count(batch: EmbedBatch, count: int, micro_capacity: Capacity, *,
                   keep_groups_together: bool) -> EmbedBatch:
    """The same rows in exactly `count` micro-batches of the same size.

    While there are too few, the one with the most tokens of those that can be split is split; if none can, the first is
    run again and marked `repeated`.

    Args:
        batch: of at most `count` micro-batches.
        count: agreed by all ranks.
        micro_capacity: of one micro-batch, agreed by all ranks.
        keep_groups_together: a query stays with its documents.
    """
    def unit_of(row: int) -> int:
        if not keep_groups_together:
            return row
        return row if row < batch.num_queries else int(batch.document_query[row - batch.num_queries])

    return replace(batch, micro_batches=split_micro_batches(batch.micro_batches, count, unit_of),
                   micro_capacity=micro_capacity)


def split_micro_batches(micro_batches: Sequence[MicroBatch], count: int,
                        unit_of: Callable[[int], int]) -> tuple[MicroBatch, ...]:
    """Exactly `count` >= their number of micro-batches, as `split_to_count` says.

    Args:
        unit_of: local row index -> the unit that it must stay together with.
    """
    assert 0 < len(micro_batches) <= count
    split = list(micro_batches)
    while len(split) < count:
        divisible = [index for index, micro in enumerate(split) if len(_units(micro, unit_of)) > 1]
        if not divisible:
            split += [replace(split[0], repeated=True)] * (count - len(split))
            break
        largest = max(divisible, key=lambda index: (split[index].num_tokens, -index))
        split[largest : largest + 1] = _halves(split[largest], unit_of)
    return tuple(split)


def _units(micro: MicroBatch, unit_of: Callable[[int], int]) -> list[list[int]]:
    """Positions in the micro-batch of the rows that must stay together."""
    units: dict[int, list[int]] = {}
    for position, row in enumerate(micro.rows.tolist()):
        units.setdefault(unit_of(row), []).append(position)
    return list(units.values())


def _halves(micro: MicroBatch, unit_of: Callable[[int], int]) -> list[MicroBatch]:
    """Two micro-batches of about as many tokens each, padded to the size of the one they came from."""
    units, lengths = _units(micro, unit_of), micro.cu_seqlens.diff().tolist()
    sums = list(accumulate(sum(lengths[position] for position in unit) for unit in units))
    middle = min(range(1, len(units)), key=lambda index: abs(2 * sums[index - 1] - sums[-1]))
    return [_part(micro, sorted(chain.from_iterable(part))) for part in (units[:middle], units[middle:])]


def _part(micro: MicroBatch, positions: list[int]) -> MicroBatch:
    bounds = micro.cu_seqlens.tolist()
    spans = [slice(bounds[position], bounds[position + 1]) for position in positions]
    types = None if micro.token_types is None else [micro.token_types[span].tolist() for span in spans]
    part = pack([micro.token_ids[span].tolist() for span in spans], micro.rows[positions].tolist(),
                tokens=micro.token_ids.numel(), alignment=1, pad_token_id=0, token_types=types)
    if micro.vectors is None:
        return part
    vectors = torch.cat([micro.vectors[span] for span in spans])
    return replace(part, vectors=torch.nn.functional.pad(vectors, (0, micro.token_ids.numel() - len(vectors)),
                                                         value=-1), joint=micro.joint,
                   key_lengths=None if micro.key_lengths is None else micro.key_lengths[positions])


def _text_ids(texts: Iterable[str]) -> torch.Tensor:
    return torch.tensor([text_id(text) for text in texts], dtype=torch.int64)


def _flat(rows: Sequence[tuple[float, ...] | None]) -> torch.Tensor | None:
    """[values] float64 of all rows, None if a row has none."""
    given = [row for row in rows if row is not None]
    return torch.tensor(list(chain.from_iterable(given)), dtype=torch.float64) if len(given) == len(rows) else None


def _teacher_scores(record: Record, documents: DocumentsPerQuery) -> tuple[float, ...] | None:
    """Teacher scores of the documents that are embedded."""
    scores, split = record.teacher_scores, len(record.positive)
    return None if scores is None else (*scores[:split][: documents.positives],
                                        *scores[split:][: documents.negatives])


def _capacity(num_queries: int, documents: DocumentsPerQuery) -> Capacity:
    return Capacity(num_queries, num_queries * (documents.positives + documents.negatives),
                    num_queries * documents.most_positives)


def _refuse_empty(rows: TokenizedRows, texts: Sequence[str], records: Sequence[Record]) -> None:
    for ids, text, record in zip(rows.token_ids, texts, records, strict=True):
        if not ids:
            raise DataError(f"{record.source}: the text {text[:40]!r} {NO_TOKENS}; remove the row")


def build_encode_batches(texts: Sequence[str], role: Role, tokenizer: RoleTokenizer, packing: PackingSpec, *,
                         instruction: str | None = None) -> tuple[MicroBatch, ...]:
    """Micro-batches for inference, the longest texts first; `rows` are the texts' indices.

    Args:
        texts: all of one role. They are tokenized at once: pass a part at a time of a large corpus.
        role: whose prompt and length apply.
        tokenizer: that of the model.
        packing: with a token budget; a text that is longer has a micro-batch of its own.
        instruction: for a prompt that needs one; None: the tokenizer's.
    Raises:
        EmptyTextError: for the first text without tokens.
    """
    tokenized = tokenizer.tokenize(texts, role, [instruction] * len(texts))
    notice = f"{tokenized.num_truncated} of {len(texts)} {role} texts truncated to the maximum length"
    if tokenized.num_truncated and notice not in tokenizer.notices:  # every evaluation of a run would repeat it
        tokenizer.notices.add(notice)
        logger.info(notice)
    lengths = [len(ids) for ids in tokenized.token_ids]
    for row, length in enumerate(lengths):
        if not length:
            raise EmptyTextError(row, f"{role} text number {row + 1}", texts[row])
    return pack_bins(pack_longest_first(lengths, packing), tokenized.token_ids, packing, tokenizer.pad_token_id,
                     vectors=RowVectors.of(tokenized))


def padding_fraction(micro_batches: Sequence[MicroBatch]) -> float:
    """Share of the bins' tokens that is padding, 0 to 1."""
    total = sum(micro_batch.token_ids.numel() for micro_batch in micro_batches)
    return 1 - sum(micro_batch.num_tokens for micro_batch in micro_batches) / total if total else 0.0
