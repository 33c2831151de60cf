"""Fingerprints of what a step trains on, equal under every layout: hashes of rows, token ids and labels.

Each is a sum, modulo 2^64, of a hash for every row or text of the global batch, so data-parallel ranks add theirs. The
one in order hashes each with its place in the global batch, the one of the set does not. From the difference of two
sets follows which row is missing or too many.
"""

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed.batch import EmbedBatch, RerankBatch, StepBatch
from megatron_embed.data.permutation import mixed

HASHES = ("row_set", "row_order", "query_set", "query_order", "document_set", "document_order", "labels")
"""Hashes of a step: of its rows' indices in the data, of the token ids of its queries and of its documents (of a
reranker: of its pairs), and of what says which documents are positives: labels, scores, equal texts."""
COUNTS = ("rows", "queries", "documents", "query_tokens", "document_tokens", "truncated")
FIELDS = HASHES + COUNTS
_MOST_DOCUMENTS = 1 << 20
_ROWS, _PLACES, _TOKENS, _LABELS = 1, 2, 3, 4
Hashes = NDArray[np.uint64]


def fingerprint(batch: StepBatch, first_query: int) -> NDArray[np.uint64]:
    """[FIELDS] of one data-parallel rank's share of a step. No communication.

    Args:
        first_query: place in the global batch of this rank's first row.
    """
    assert isinstance(batch, EmbedBatch | RerankBatch)
    places = _places(batch, first_query)
    texts, lengths = text_hashes(batch)
    queries = batch.num_queries if isinstance(batch, EmbedBatch) else 0
    rows = np.zeros(0, np.uint64) if batch.row_ids is None else row_hashes(batch.row_ids.numpy())
    sums = [rows.sum(), in_order(rows, np.arange(first_query, first_query + len(rows)))]
    for part in (slice(0, queries), slice(queries, None)):
        sums += [_finished(texts[part]).sum(), in_order(texts[part], places[part])]
    counts = [len(rows), queries, len(places) - queries, int(lengths[:queries].sum()), int(lengths[queries:].sum()),
              batch.num_truncated]
    return np.array([*sums, _labels(batch, places), *counts], dtype=np.uint64)


def as_signed(values: NDArray[np.uint64]) -> Tensor:
    """The same bits as int64, which torch and gloo add modulo 2^64."""
    return torch.from_numpy(values.view(np.int64).copy())


def named(values: Sequence[int]) -> dict[str, str | int]:
    """The fields of a summed fingerprint as a log holds them: hashes in hexadecimal."""
    return {name: f"{value % 2**64:016x}" if name in HASHES else value
            for name, value in zip(FIELDS, values, strict=True)}


def hash_of(logged: Mapping[str, str | int], name: str) -> int:
    """A hash of a log's record."""
    return int(str(logged[name]), 16)


def row_hashes(rows: NDArray[np.int64]) -> Hashes:
    """[rows] of row indices."""
    return mixed(rows.astype(np.uint64), _ROWS)


def in_order(hashes: Hashes, places: NDArray[np.int64]) -> np.uint64:
    """The sum of hashes, each mixed with its place."""
    total: np.uint64 = mixed(hashes ^ mixed(places.astype(np.uint64), _PLACES), _PLACES).sum()
    return total


def text_hashes(batch: EmbedBatch | RerankBatch) -> tuple[Hashes, NDArray[np.int64]]:
    """([rows] hash of each text's token ids, token types and positions, [rows] its tokens), by local row index; 0 where
    no micro-batch has the row or the one that it shares its text with."""
    hashes, lengths = np.zeros(batch.num_rows, np.uint64), np.zeros(batch.num_rows, np.int64)
    for micro in batch.micro_batches:
        if micro.repeated:
            continue
        bounds = micro.cu_seqlens.numpy().astype(np.int64)
        values = micro.token_ids.numpy()[: bounds[-1]].astype(np.uint64)
        values |= micro.position_ids.numpy()[: bounds[-1]].astype(np.uint64) << np.uint64(32)
        if micro.token_types is not None:
            values |= micro.token_types.numpy()[: bounds[-1]].astype(np.uint64) << np.uint64(62)
        rows = micro.rows.numpy()
        # Added, so that a row which is there twice has another hash.
        np.add.at(hashes, rows, np.add.reduceat(mixed(values, _TOKENS), bounds[:-1]))
        np.add.at(lengths, rows, np.diff(bounds))
    if batch.encoded_row is not None:
        encoded = batch.encoded_row.numpy()
        hashes[: len(encoded)], lengths[: len(encoded)] = hashes[encoded], lengths[encoded]
    return hashes, lengths


def set_hashes(texts: Hashes) -> Hashes:
    """Each text's summand of the hash of a set of texts."""
    return _finished(texts)


def _finished(texts: Hashes) -> Hashes:
    return mixed(texts, _TOKENS)


def _places(batch: EmbedBatch | RerankBatch, first_query: int) -> NDArray[np.int64]:
    """[rows] place of each local row in the global batch: of a query its own, of a document its query's and its own
    number among that query's documents."""
    if isinstance(batch, EmbedBatch):
        query = batch.document_query.numpy()
        number = np.arange(batch.num_documents) - np.searchsorted(query, query)
        queries = np.arange(batch.num_queries, dtype=np.int64) + first_query
        return np.concatenate([queries * _MOST_DOCUMENTS, (query + first_query) * _MOST_DOCUMENTS + number + 1])
    sizes = np.array(batch.group_sizes, dtype=np.int64)
    query = np.repeat(np.arange(len(sizes)), sizes)
    number = np.arange(len(query)) - (np.cumsum(sizes) - sizes)[query]
    places: NDArray[np.int64] = (query + first_query) * _MOST_DOCUMENTS + number + 1
    return places


def _labels(batch: EmbedBatch | RerankBatch, places: NDArray[np.int64]) -> np.uint64:
    """The hash of all that says which documents are relevant to which query."""
    if isinstance(batch, RerankBatch):
        per_row = [batch.labels, batch.teacher_scores]
        parts = [(places, values) for values in per_row if values is not None]
    else:
        queries, documents = places[: batch.num_queries], places[batch.num_queries :]
        positives = queries[batch.positive_query.numpy()]
        parts = [(documents, batch.is_positive), (queries, batch.query_ids), (documents, batch.document_ids),
                 (positives, batch.positive_ids), (queries, batch.document_ids[batch.positive_index])]
        parts += [(queries, values) for values in (batch.in_batch, batch.scores) if values is not None]
        parts += [] if batch.teacher_scores is None else [(documents, batch.teacher_scores)]
    total = np.uint64(0)
    for number, (keys, values) in enumerate(parts):
        hashes = mixed(_bits(values), _LABELS + number)
        total = np.add(total, in_order(hashes, keys), dtype=np.uint64, casting="unsafe")
    return total


def _bits(values: Tensor) -> Hashes:
    """[values] uint64 of numbers of any dtype: float32 and float64 of equal value are equal."""
    return values.double().numpy().view(np.uint64) if values.is_floating_point() else values.numpy().astype(np.uint64)


def float_bits(value: float) -> int:
    """A float64 as an int64 of the same bits, to travel among integers."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def bits_float(bits: int) -> float:
    """The reverse of `float_bits`."""
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value
