"""Rows in bins under a token budget, and bins brought to a number."""

import dataclasses
import random
from itertools import pairwise

import pytest
import torch

from megatron_embed.batch import Capacity
from megatron_embed.config.schema import TrainFile
from megatron_embed.data.bins import bin_sizes, merge, pad_to_sizes
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import (
    DocumentsPerQuery,
    PackingSpec,
    build_embed_batch,
    pack_groups_to_budget,
    pack_to_budget,
    padding_fraction,
    split_to_count,
)
from megatron_embed.data.tokenizer import RoleTokenizer
from tests.data.conftest import MINI_EN

BUDGET = 608


@pytest.fixture(scope="module")
def build(minilm_dir: str):
    tokenizer = RoleTokenizer(minilm_dir, add_eos=False, query_max_length=24, document_max_length=64)
    records = list(open_records((TrainFile(path=str(MINI_EN)),)))

    def build(rows=slice(0, 12), budget=BUDGET, keep_groups_together=False):
        packing = PackingSpec(alignment=8, uniform_size=True, micro_batch_tokens=budget,
                              keep_groups_together=keep_groups_together)
        return build_embed_batch(records[rows], tokenizer, packing, DocumentsPerQuery(negatives=2))

    return build


def sequences(batch):
    """Tokens by row index, of the micro-batches that count; each row once."""
    tokens_of_row = {}
    for micro in batch.micro_batches:
        if not micro.repeated:
            for row, (start, stop) in zip(micro.rows.tolist(), pairwise(micro.cu_seqlens.tolist()), strict=True):
                assert row not in tokens_of_row
                assert micro.position_ids[start:stop].tolist() == list(range(stop - start))
                tokens_of_row[row] = micro.token_ids[start:stop].tolist()
    return tokens_of_row


def queries_of(batch, micro):
    return {row if row < batch.num_queries else int(batch.document_query[row - batch.num_queries])
            for row in micro.rows.tolist()}


def test_rows_go_into_the_fullest_bin_that_holds_them():
    assert pack_to_budget([6, 2, 7, 3, 4], 10) == [[2, 3], [0, 4], [1]]
    assert pack_to_budget([10], 10) == [[0]]


def test_few_bins_are_wasted():
    numbers = random.Random(5)
    lengths = [numbers.randint(1, 60) for _ in range(400)]
    bins = pack_to_budget(lengths, 100)
    assert sorted(row for rows in bins for row in rows) == list(range(400))
    assert all(sum(lengths[row] for row in rows) <= 100 for rows in bins)
    assert len(bins) <= 1.03 * sum(lengths) / 100
    assert bins == pack_to_budget(lengths, 100)


def test_groups_stay_whole_and_in_order():
    lengths = [3, 3, 3, 4, 2, 5, 1]
    assert pack_groups_to_budget([[0, 3], [1, 4, 5], [2, 6]], lengths, 10) == [[0, 3], [1, 4, 5], [2, 6]]
    assert pack_groups_to_budget([[0, 3], [1, 4, 5], [2, 6]], lengths, 17) == [[0, 1, 3, 4, 5], [2, 6]]


@pytest.mark.parametrize("keep_groups_together", [False, True])
def test_bins_have_the_size_of_the_budget_and_hold_every_row(build, keep_groups_together):
    batch, by_size = build(keep_groups_together=keep_groups_together), build(budget=None)
    assert len(batch.micro_batches) > 2
    assert {micro.token_ids.numel() for micro in batch.micro_batches} == {BUDGET}
    assert sequences(batch) == sequences(by_size)
    assert padding_fraction(batch.micro_batches) < (0.5 if keep_groups_together else 0.25)
    for name in ("positive_index", "document_ids", "query_ids", "positive_ids"):
        assert torch.equal(getattr(batch, name), getattr(by_size, name))
    together = [queries_of(batch, micro) for micro in batch.micro_batches]
    assert (sum(map(len, together)) == 12) == keep_groups_together
    most = max(int((micro.rows < batch.num_queries).sum()) for micro in batch.micro_batches)
    assert batch.micro_capacity == (most, most * 3, most)
    assert batch.capacity == (12, 36, 12)


@pytest.mark.parametrize("keep_groups_together", [False, True])
def test_too_few_bins_are_divided(build, keep_groups_together):
    batch = build(keep_groups_together=keep_groups_together)
    before, agreed = len(batch.micro_batches), Capacity(7, 8, 9)
    for count in (before, before + 1, 11):
        filled = split_to_count(batch, count, agreed, keep_groups_together=keep_groups_together)
        assert len(filled.micro_batches) == count
        assert filled.micro_capacity == agreed
        assert not any(micro.repeated for micro in filled.micro_batches)
        assert {micro.token_ids.numel() for micro in filled.micro_batches} == {BUDGET}
        assert sequences(filled) == sequences(batch)
        if keep_groups_together:
            assert sum(len(queries_of(batch, micro)) for micro in filled.micro_batches) == 12
    assert min(micro.num_tokens for micro in filled.micro_batches) > 15  # the largest was divided, about in the middle


def test_bins_that_cannot_be_divided_are_repeated(build):
    batch = build(slice(0, 2), keep_groups_together=True)
    filled = split_to_count(batch, 5, Capacity(2, 6, 2), keep_groups_together=True)
    assert [micro.repeated for micro in filled.micro_batches] == [False, False, True, True, True]
    assert sequences(filled) == sequences(batch)
    for micro in filled.micro_batches[2:]:
        assert torch.equal(micro.token_ids, filled.micro_batches[0].token_ids)
        assert micro.num_tokens > 0
        assert micro.valid_rows.numel() == 0
    assert filled.micro_batches[0].valid_rows.numel() > 0
    rows = batch.num_rows
    filled = split_to_count(build(slice(0, 2)), rows + 2, Capacity(2, 6, 2), keep_groups_together=False)
    assert [micro.repeated for micro in filled.micro_batches] == [False] * rows + [True] * 2


def test_sizes_are_the_eighths_of_the_budget():
    assert bin_sizes(7168, 4) == [896 * eighth for eighth in range(1, 9)]
    assert bin_sizes(608, 8) == [80, 152, 232, 304, 384, 456, 536, 608]
    assert bin_sizes(24, 8) == [8, 16, 24]
    assert bin_sizes(5, 1) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("uniform", [False, True])
def test_micro_batches_get_the_next_size(build, uniform):
    batch, sizes = build(slice(0, 5)), bin_sizes(BUDGET, 8)
    halves = split_to_count(batch, len(batch.micro_batches) + 3, Capacity(5, 15, 5), keep_groups_together=False)
    padded = pad_to_sizes(halves.micro_batches, sizes, uniform=uniform)
    expected = [min(size for size in sizes if size >= micro.num_tokens) for micro in halves.micro_batches]
    assert len(set(expected)) > 1 and min(expected) < BUDGET
    assert [micro.token_ids.numel() for micro in padded] == ([max(expected)] * len(padded) if uniform else expected)
    for micro in padded:
        assert micro.position_ids.numel() == micro.token_ids.numel()
        assert not micro.position_ids[micro.num_tokens :].any()
    assert sequences(dataclasses.replace(batch, micro_batches=padded)) == sequences(batch)
    larger = pad_to_sizes(padded, [2 * BUDGET], uniform=uniform)
    assert {micro.token_ids.numel() for micro in larger} == {2 * BUDGET}
    assert sequences(dataclasses.replace(batch, micro_batches=larger)) == sequences(batch)


def test_merged_micro_batches_have_all_their_sequences_and_no_padding(build):
    batch = build()
    types = [dataclasses.replace(micro, token_types=micro.token_ids % 2) for micro in batch.micro_batches]
    merged = merge([*types, dataclasses.replace(types[0], repeated=True)])
    assert not merged.repeated and merged.num_tokens == merged.token_ids.numel() == merged.position_ids.numel()
    assert merged.cu_seqlens.dtype == torch.int32
    assert torch.equal(merged.token_types, merged.token_ids % 2)
    assert sequences(dataclasses.replace(batch, micro_batches=(merged,))) == sequences(batch)
    again = merge([dataclasses.replace(types[0], repeated=True)] * 2)
    assert again.repeated and again.num_tokens == types[0].num_tokens == again.token_ids.numel()
