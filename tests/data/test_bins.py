"""Rows in bins under a token budget, and bins brought to a number."""

import random
from itertools import pairwise

import pytest
import torch

from megatron_embed.batch import Capacity
from megatron_embed.config.schema import TrainFile
from megatron_embed.data.bins import bins_of_groups, bins_of_rows
from megatron_embed.data.packing import build_embed_batch, fill_bins, padding_fraction
from megatron_embed.data.prompts import RoleTokenizer
from megatron_embed.data.records import open_records
from tests.data.conftest import MINI_EN

BUDGET = 608


@pytest.fixture(scope="module")
def build(minilm_dir: str):
    tokenizer = RoleTokenizer(minilm_dir, add_eos=False, query_max_length=24, document_max_length=64)
    records = list(open_records((TrainFile(path=str(MINI_EN)),)))

    def build(rows=slice(0, 12), budget=BUDGET, whole_groups=False):
        return build_embed_batch(records[rows], tokenizer, micro_batch_size=1, num_negatives=2, alignment=8,
                                 constant_tokens=True, micro_batch_tokens=budget, whole_groups=whole_groups)

    return build


def sequences(batch):
    """Tokens by row number, of the micro-batches that count; each row once."""
    found = {}
    for micro in batch.micro_batches:
        if not micro.repeated:
            for row, (start, stop) in zip(micro.rows.tolist(), pairwise(micro.cu_seqlens.tolist()), strict=True):
                assert row not in found
                assert bool(micro.is_query[micro.rows.tolist().index(row)]) == (row < batch.num_queries)
                assert micro.position_ids[start:stop].tolist() == list(range(stop - start))
                found[row] = micro.token_ids[start:stop].tolist()
    return found


def queries_of(batch, micro):
    return {row if row < batch.num_queries else int(batch.document_query[row - batch.num_queries])
            for row in micro.rows.tolist()}


def test_rows_go_into_the_fullest_bin_that_holds_them():
    assert bins_of_rows([6, 2, 7, 3, 4], 10) == [[2, 3], [0, 4], [1]]
    assert bins_of_rows([10], 10) == [[0]]


def test_few_bins_are_wasted():
    numbers = random.Random(5)
    lengths = [numbers.randint(1, 60) for _ in range(400)]
    bins = bins_of_rows(lengths, 100)
    assert sorted(row for rows in bins for row in rows) == list(range(400))
    assert all(sum(lengths[row] for row in rows) <= 100 for rows in bins)
    assert len(bins) <= 1.03 * sum(lengths) / 100
    assert bins == bins_of_rows(lengths, 100)


def test_groups_stay_whole_and_in_order():
    lengths = [3, 3, 3, 4, 2, 5, 1]
    assert bins_of_groups([[0, 3], [1, 4, 5], [2, 6]], lengths, 10) == [[0, 3], [1, 4, 5], [2, 6]]
    assert bins_of_groups([[0, 3], [1, 4, 5], [2, 6]], lengths, 17) == [[0, 1, 3, 4, 5], [2, 6]]


@pytest.mark.parametrize("whole_groups", [False, True])
def test_bins_have_the_size_of_the_budget_and_hold_every_row(build, whole_groups):
    batch, by_size = build(whole_groups=whole_groups), build(budget=None)
    assert len(batch.micro_batches) > 2
    assert {micro.token_ids.numel() for micro in batch.micro_batches} == {BUDGET}
    assert sequences(batch) == sequences(by_size)
    assert padding_fraction(batch.micro_batches) < (0.5 if whole_groups else 0.25)
    for name in ("positive_index", "document_ids", "query_ids", "positive_ids"):
        assert torch.equal(getattr(batch, name), getattr(by_size, name))
    together = [queries_of(batch, micro) for micro in batch.micro_batches]
    assert (sum(map(len, together)) == 12) == whole_groups
    most = max(int(micro.is_query.sum()) for micro in batch.micro_batches)
    assert batch.micro_capacity == (most, most * 3, most)
    assert batch.capacity == (12, 36, 12)


@pytest.mark.parametrize("whole_groups", [False, True])
def test_too_few_bins_are_divided(build, whole_groups):
    batch = build(whole_groups=whole_groups)
    before, agreed = len(batch.micro_batches), Capacity(7, 8, 9)
    for count in (before, before + 1, 11):
        filled = fill_bins(batch, count, agreed, whole_groups=whole_groups)
        assert len(filled.micro_batches) == count
        assert filled.micro_capacity == agreed
        assert not any(micro.repeated for micro in filled.micro_batches)
        assert {micro.token_ids.numel() for micro in filled.micro_batches} == {BUDGET}
        assert sequences(filled) == sequences(batch)
        if whole_groups:
            assert sum(len(queries_of(batch, micro)) for micro in filled.micro_batches) == 12
    assert min(micro.num_tokens for micro in filled.micro_batches) > 15  # the largest was divided, about in the middle


def test_bins_that_cannot_be_divided_are_repeated(build):
    batch = build(slice(0, 2), whole_groups=True)
    filled = fill_bins(batch, 5, Capacity(2, 6, 2), whole_groups=True)
    assert [micro.repeated for micro in filled.micro_batches] == [False, False, True, True, True]
    assert sequences(filled) == sequences(batch)
    for micro in filled.micro_batches[2:]:
        assert torch.equal(micro.token_ids, filled.micro_batches[0].token_ids)
        assert micro.num_tokens > 0
        assert micro.valid_rows.numel() == 0
    assert filled.micro_batches[0].valid_rows.numel() > 0
    rows = batch.num_rows
    filled = fill_bins(build(slice(0, 2)), rows + 2, Capacity(2, 6, 2), whole_groups=False)
    assert [micro.repeated for micro in filled.micro_batches] == [False] * rows + [True] * 2
