"""Rows held out of training: which ones, and how ranks share them."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_embed.config.schema import DataConfig, TrainFile
from megatron_embed.data.dataset import RecordSet, hold_out, open_records, validation_shares
from megatron_embed.data.records import text_id
from megatron_embed.errors import ConfigError
from tests.data.conftest import MINI_EN, MINI_ZH

WriteRows = Callable[..., str]


@pytest.fixture(scope="module")
def sets() -> RecordSet:
    return open_records((TrainFile(path=str(MINI_EN)), TrainFile(path=str(MINI_ZH))))


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
def test_a_share_of_each_set_is_held_out_and_nothing_is_lost(sets: RecordSet, fraction: float):
    kept, held = hold_out(sets, fraction, seed=3)
    assert held is not None
    for whole, train, validation in zip(sets.files, kept.files, held.files, strict=True):
        assert len(validation) == pytest.approx(fraction * len(whole), abs=3)
        assert sorted(record.source for record in [*train, *validation]) == sorted(record.source for record in whole)
        numbers = [int(record.source.rpartition(":")[2]) for record in train]
        assert numbers == sorted(numbers)
    assert kept.digest == sets.digest
    assert (kept.most_positives, kept.instructions) == (sets.most_positives, sets.instructions)


def test_queries_of_a_part_have_the_ids_of_their_texts(sets: RecordSet):
    for part in (part for share in hold_out(sets, 0.3, seed=3) if share is not None for part in share.files):
        ids = [text_id(record.query) for record in part]
        for first, last in ((0, len(part)), (3, 11), (5, 5)):
            assert part.query_ids(first, last).tolist() == ids[first:last]


def test_the_split_follows_from_the_seed_and_the_queries_alone(sets: RecordSet, write_rows: WriteRows):
    def held_queries(records: RecordSet, seed: int) -> set[str]:
        held = hold_out(records, 0.1, seed)[1]
        assert held is not None
        return {record.query for record in held}

    assert held_queries(sets, 3) == held_queries(sets, 3) != held_queries(sets, 4)
    lines = MINI_EN.read_text(encoding="utf-8").splitlines()
    first = open_records((TrainFile(path=write_rows(lines, "a.jsonl")),))
    turned = open_records((TrainFile(path=write_rows(lines[::-1], "b.jsonl")),))
    assert held_queries(first, 3) == held_queries(turned, 3)


def test_rows_of_one_query_stay_together(write_rows: WriteRows):
    records = open_records((TrainFile(path=write_rows(
        [{"query": f"q{row_id % 50}", "positive": f"p{row_id}"} for row_id in range(200)])),))
    kept, held = hold_out(records, 0.2, seed=1)
    assert held is not None
    assert len(held) == 40
    assert not {record.query for record in kept} & {record.query for record in held}


def test_without_a_fraction_nothing_changes(sets: RecordSet):
    assert hold_out(sets, 0.0, seed=1) == (sets, None)


def test_sets_that_cannot_be_divided_are_refused(write_rows: WriteRows):
    records = open_records((TrainFile(path=write_rows([{"query": "q", "positive": f"p{n}"} for n in range(9)])),))
    with pytest.raises(ConfigError, match=r"data.validation_fraction = 0.1: .* has 9 rows and 1 different queries"):
        hold_out(records, 0.1, seed=1)
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"data.validation_fraction = .* must be in \[0, 1\)"):
            DataConfig(validation_fraction=fraction)


@pytest.mark.parametrize(("size", "dp_size", "batches"), [(16, 1, 8), (16, 4, 8), (64, 4, 2), (200, 3, 2), (8, 8, 14)])
def test_ranks_share_every_batch_evenly(sets: RecordSet, size: int, dp_size: int, batches: int):
    held = hold_out(sets, 0.06, seed=3)[1]
    assert held is not None
    ranks = [validation_shares(held, global_batch_size=size, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert {len(shares) for shares in ranks} == {batches}
    together = [[row for share in shares for row in share] for shares in zip(*ranks, strict=True)]
    assert [row for batch in together for row in batch] == list(range(len(held)))
    for shares in zip(*ranks, strict=True):
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) > 0
        assert sum(lengths) <= max(size, 2 * dp_size)
        assert len({held.file_of(row) for share in shares for row in share}) == 1
    sizes = [len(batch) for batch in together]
    assert np.ptp(sizes) <= 2


def test_fewer_rows_than_ranks_are_refused(sets: RecordSet):
    held = hold_out(sets, 0.002, seed=3)[1]
    assert held is not None
    with pytest.raises(ConfigError, match=r"2 rows of .* are held out for validation, fewer than the 4"):
        validation_shares(held, global_batch_size=8, dp_rank=0, dp_size=4)
