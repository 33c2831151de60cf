import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

import megatron_embed.data.batch_queue as queue_module
import megatron_embed.data.sampler as sampler_module
from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import RecordSet, open_records
from megatron_embed.data.epoch_sampler import EpochSampler
from megatron_embed.data.permutation import Permutation, mixed
from megatron_embed.data.records import Record
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.errors import ConfigError
from tests.data.conftest import MINI_ZH

WriteRows = Callable[..., str]


@pytest.fixture(scope="module")
def mini_zh() -> RecordSet:
    return open_records((TrainFile(path=str(MINI_ZH)),))


@pytest.fixture
def shared_passages(write_rows: WriteRows) -> RecordSet:
    """1,000 real questions on 250 real passages; every twentieth question comes twice."""
    rows = [json.loads(line) for line in MINI_ZH.read_text(encoding="utf-8").splitlines()]
    return open_records((TrainFile(path=write_rows(
        [{"query": rows[i - 1 if i % 20 == 10 else i]["query"], "positive": rows[i // 4]["positive"]}
         for i in range(1000)])),))


def texts_of(record: Record, num_negatives: int) -> set[str]:
    return {record.query, *record.positive, *record.negatives[:num_negatives]}


def num_repeated(records: Sequence[Record], rows: Sequence[int], num_negatives: int = 0) -> int:
    """Rows of a batch with a text that an earlier row of it has."""
    seen: set[str] = set()
    repeated = 0
    for row in rows:
        texts = texts_of(records[row], num_negatives)
        repeated += not seen.isdisjoint(texts)
        seen |= texts
    return repeated


def sampler_of(records: RecordSet, size: int, *, shuffle: bool = True, seed: int = 3,
               num_negatives: int = 0) -> GlobalBatchSampler:
    return GlobalBatchSampler(records, global_batch_size=size, shuffle=shuffle, seed=seed, num_negatives=num_negatives)


def test_without_shuffling_rows_come_in_file_order_and_wrap_round(mini_zh: RecordSet):
    sampler = sampler_of(mini_zh, 300, shuffle=False)
    assert sampler.rows_of_step(0) == list(range(300))
    assert sampler.rows_of_step(2) == list(range(600, 900))
    assert sampler.rows_of_step(3) == [*range(900, 1000), *range(200)]
    assert sampler.rows_of_step(10) == list(range(300))


def test_steps_of_epochs(mini_zh: RecordSet):
    for size, per_epoch, of_three in [(50, 20, 60), (300, 4, 10), (999, 2, 4), (1000, 1, 3)]:
        for shuffle in (False, True):
            sampler = sampler_of(mini_zh, size, shuffle=shuffle)
            assert sampler.steps_of_epochs(1) == per_epoch
            assert sampler.steps_of_epochs(3) == of_three
    assert sampler_of(mini_zh, 50).steps_of_epochs(0.3) == 6
    assert sampler_of(mini_zh, 50).steps_of_epochs(0.0001) == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_larger_than_the_data_is_refused(mini_zh: RecordSet, shuffle: bool):
    with pytest.raises(ConfigError, match="global_batch_size = 1001 is larger than the 1000 rows of data.train"):
        sampler_of(mini_zh, 1001, shuffle=shuffle)


def test_shuffled_epochs_are_permutations_that_differ(mini_zh: RecordSet):
    sampler = sampler_of(mini_zh, 50)
    epochs = [[row for step in range(20 * e, 20 * e + 20) for row in sampler.rows_of_step(step)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1000))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(1000))
    assert sampler_of(mini_zh, 50, seed=4).rows_of_step(0) != sampler.rows_of_step(0)
    # Rows that share nothing come in the order of the keyed permutation itself.
    assert epochs[1] == Permutation(1000, 3, 1)(np.arange(1000)).tolist()
    before = EpochSampler(mini_zh, global_batch_size=50, seed=3)  # the order of runs that began with an old version
    order = np.random.Generator(np.random.PCG64([3, 0])).permutation(1000)
    assert [row for step in range(20) for row in before.rows_of_step(step)] == order.tolist()


def test_a_row_left_over_does_not_meet_itself_in_the_next_epoch(mini_zh: RecordSet):
    sampler = sampler_of(mini_zh, 300)
    batches = [sampler.rows_of_step(step) for step in range(20)]
    assert [len(set(rows)) for rows in batches] == [300] * 20
    # The hundred rows left after three batches come first in the fourth.
    assert len(set(batches[3][:100]).intersection(*[set(range(1000)).difference(rows) for rows in batches[:3]])) == 100
    used = Counter(row for rows in batches[:17] for row in rows)  # five epochs, and what fills the batch after them
    assert set(used.values()) == {5, 6}
    assert sum(used.values()) == 17 * 300


@pytest.mark.parametrize("size", [50, 64, 200])
def test_no_text_comes_twice_in_a_batch_and_no_row_is_lost(shared_passages: RecordSet, size: int):
    sampler = sampler_of(shared_passages, size)
    records = list(shared_passages)
    plain = Permutation(1000, 3, 0)(np.arange(size)).tolist()
    assert num_repeated(records, plain) > 0  # the permutation alone would repeat passages
    used = Counter[int]()
    num_steps = 1000 * 6 // size
    for step in range(num_steps):
        rows = sampler.rows_of_step(step)
        assert len(rows) == len(set(rows)) == size
        assert num_repeated(records, rows) == 0
        used.update(rows)
    assert sampler.num_duplicates == 0
    counts = [used[row] for row in range(1000)]
    mean = num_steps * size / 1000
    assert mean - 2 < min(counts) <= mean <= max(counts) < mean + 2


def test_negatives_count_as_texts_up_to_the_number_in_use(write_rows: WriteRows):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}", f"p{(i + 1) % 60}"]} for i in range(60)]
    records = open_records((TrainFile(path=write_rows(rows)),))
    for num_negatives, expect_repeats in [(1, True), (2, False)]:
        sampler = sampler_of(records, 20, num_negatives=num_negatives)
        repeats = sum(num_repeated(list(records), sampler.rows_of_step(step), 2) for step in range(30))
        assert (repeats > 0) == expect_repeats
        assert sampler.num_duplicates == 0


@pytest.mark.parametrize("step", [0, 1, 19, 37, 83])
def test_any_step_can_be_asked_first(shared_passages: RecordSet, step: int):
    in_order = sampler_of(shared_passages, 64)
    expected = [in_order.rows_of_step(k) for k in range(step + 1)][-1]
    assert sampler_of(shared_passages, 64).rows_of_step(step) == expected
    in_order.rows_of_step(100)
    assert in_order.rows_of_step(step) == expected  # back over blocks that are no longer kept
    assert len(in_order._blocks) <= 2


def test_a_text_of_too_many_rows_is_spread_evenly_and_reported_once(mini_zh: RecordSet,
                                                                    caplog: pytest.LogCaptureFixture):
    """One negative of mini_zh belongs to 180 of its 1,000 rows: 20 batches of 50 cannot keep those apart."""
    sampler = sampler_of(mini_zh, 50, num_negatives=1)
    records = list(mini_zh)
    hub, rows_of_hub = Counter(record.negatives[0] for record in records if record.negatives).most_common(1)[0]
    assert rows_of_hub == 179  # and it is the positive of one more
    with caplog.at_level(logging.WARNING):
        batches = [sampler.rows_of_step(step) for step in range(60)]
    per_batch = [sum(hub in records[row].negatives for row in rows) for rows in batches]
    assert max(per_batch) <= 9
    repeated = [num_repeated(records, rows, 1) for rows in batches]
    assert 60 * 8 <= sum(repeated) <= 60 * 12  # 8 cannot be avoided
    assert sampler.num_duplicates == sum(repeated)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "drawn rows share a global batch with an equal text (one text is in 180 rows)" in warnings[0]
    assert warnings[0].endswith("they are each other's negatives unless objective.mask_duplicates is true")
    assert "step" not in warnings[0]  # the run may end before the block
    used = Counter(row for rows in batches for row in rows)
    assert {used[row] for row in range(1000)} <= {2, 3, 4}


@pytest.mark.parametrize(("rows", "size"), [(40, 40), (41, 40), (60, 7)])
def test_data_that_can_only_repeat_still_fills_every_batch(write_rows: WriteRows, rows: int, size: int):
    records = open_records((TrainFile(path=write_rows(
        [{"query": f"q{i}", "positive": "always the same"} for i in range(rows)])),))
    sampler = sampler_of(records, size)
    used = Counter(row for step in range(3 * rows) for row in sampler.rows_of_step(step))
    assert sampler.num_duplicates > 0
    assert sum(used.values()) == 3 * rows * size
    assert max(used.values()) - min(used[row] for row in range(rows)) <= 2


def test_crowded_data_costs_no_more_than_its_rows(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch):
    """Every batch of 64 needs 256 different documents of 300: far more rows collide than fit."""
    generator = np.random.default_rng(0)
    rows = [{"query": f"q{i}", "positive": f"d{generator.integers(300)}",
             "negatives": [f"d{d}" for d in generator.integers(300, size=3)]} for i in range(3000)]
    records = open_records((TrainFile(path=write_rows(rows)),))
    num_looked_at = 0
    original = queue_module.BatchQueue._place_unless_blocked

    def count(queue: queue_module.BatchQueue, row: int) -> int | None:
        nonlocal num_looked_at
        num_looked_at += 1
        return original(queue, row)

    monkeypatch.setattr(queue_module.BatchQueue, "_place_unless_blocked", count)
    monkeypatch.setattr(queue_module, "_PATIENCE", 1)
    sampler = sampler_of(records, 64, num_negatives=3)
    num_steps = 3 * sampler.steps_of_epochs(1)
    used = Counter(row for step in range(num_steps) for row in sampler.rows_of_step(step))
    assert {used[row] for row in range(3000)} <= {1, 2, 3, 4, 5}
    assert sampler.num_duplicates > 0
    # Each row once when it is fresh; per batch 64 waiting texts, and at most 64 that a placed row is followed by.
    assert 3000 < num_looked_at <= (num_steps + 47) * 64 * 3


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_a_permutation_has_every_number_once_and_each_position_alone(size: int):
    whole = Permutation(size, 5, 7)(np.arange(size))
    assert sorted(whole.tolist()) == list(range(size))
    assert [int(Permutation(size, 5, 7)(np.array([position]))[0]) for position in range(0, size, 97)] == [
        int(number) for number in whole[::97]]
    if size > 3:
        assert whole.tolist() != Permutation(size, 5, 8)(np.arange(size)).tolist()


def test_permutations_of_few_rows_are_as_even_as_drawn_ones():
    """Chi-square of where 16 rows of 4,000 epochs stand, and of what follows row 0; 240 and 14 degrees of freedom."""
    orders = np.stack([Permutation(16, 1, epoch)(np.arange(16)) for epoch in range(4000)])
    for counts in (np.stack([np.bincount(column, minlength=16) for column in orders.T]),
                   np.bincount(orders[:, 1:][orders[:, :-1] == 0], minlength=16)[1:]):
        expected = counts.sum() / counts.size
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi - counts.size) < 5 * (2 * counts.size) ** 0.5
    bits = np.unpackbits(mixed(np.arange(2000, dtype=np.uint64), 3).view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.01


def test_blocks_of_a_long_epoch_hold_every_row_once(shared_passages: RecordSet, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 32 steps in epochs of 100; 20 steps of them asked in any order."""
    monkeypatch.setattr(sampler_module, "_BLOCK_ROWS", 1)
    in_order = sampler_of(shared_passages, 10)
    assert {in_order._block_of(step) for step in range(100)} == {range(33), range(33, 66), range(66, 100)}
    batches = [in_order.rows_of_step(step) for step in range(100)]
    assert sorted(row for rows in batches for row in rows) == list(range(1000))
    records = list(shared_passages)
    assert sum(num_repeated(records, rows) for rows in batches) == in_order.num_duplicates == 0
    for step in np.random.default_rng(0).permutation(100)[:20].tolist():
        assert sampler_of(shared_passages, 10).rows_of_step(step) == batches[step]


def test_rows_of_the_last_batch_change_places_with_rows_of_others(write_rows: WriteRows):
    """Two queries of a text for each of 64 texts: without exchange some pairs would be left for the last batch."""
    records = open_records((TrainFile(path=write_rows(
        [{"query": f"q{i}", "positive": f"p{i // 8}"} for i in range(160)])),))
    for seed in range(10):
        sampler = sampler_of(records, 16, seed=seed)
        assert sum(num_repeated(list(records), sampler.rows_of_step(step)) for step in range(20)) == 0
