"""One data set per global batch: shares, turns, resumption, and the settings that it refuses."""

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_embed.config.schema import DataConfig, ModelConfig, RunConfig, TrainFile, TrainingConfig
from megatron_embed.data.dataset import RecordSet, open_records
from megatron_embed.data.mixture import MixtureSampler, build_sampler, turn_shares
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.data.turns import EarliestDeadline, FurthestBehind
from megatron_embed.errors import ConfigError
from megatron_embed.run.preflight import number_of_steps
from tests.data.conftest import MINI_EN, MINI_ZH

WriteRows = Callable[..., str]


@pytest.fixture
def sets(write_rows: WriteRows) -> list[str]:
    """1,000, 300 and 100 real rows."""
    english = MINI_EN.read_text(encoding="utf-8").splitlines()
    return [str(MINI_ZH), write_rows(english[:300], "b.jsonl"), write_rows(english[300:400], "c.jsonl")]


def opened(paths: list[str], weights: list[float] | None = None) -> RecordSet:
    return open_records(tuple(TrainFile(path=path, weight=weight)
                              for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)))


def sampler_of(records: RecordSet, size: int = 20, **settings: object) -> MixtureSampler:
    sampler = build_sampler(records, DataConfig(train=tuple(file.file for file in records.files), **settings),
                            global_batch_size=size, seed=5)
    assert isinstance(sampler, MixtureSampler)
    return sampler


def test_shares_by_weight_and_temperature():
    assert turn_shares([300, 100], [1.0, 1.0], 1.0) == pytest.approx([0.75, 0.25])
    assert turn_shares([300, 100], [1.0, 3.0], 1.0) == pytest.approx([0.5, 0.5])
    root = 3**0.5
    assert turn_shares([300, 100], [1.0, 1.0], 2.0) == pytest.approx([root / (1 + root), 1 / (1 + root)])
    assert turn_shares([300, 100], [1.0, 1.0], 1e9) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("weights", "temperature"), [([1, 1, 1], 1.0), ([1, 5, 0.3], 1.0), ([1, 1, 1], 3.0)])
def test_every_step_is_of_one_set_and_each_has_its_share_all_along(sets: list[str], weights: list[float],
                                                                  temperature: float):
    records = opened(sets, weights)
    sampler = sampler_of(records, sampling_temperature=temperature)
    shares = turn_shares([1000, 300, 100], weights, temperature)
    turns = Counter[int]()
    for step in range(280):
        rows = sampler.rows_of_step(step)
        (data_set,) = {records.file_of(row) for row in rows}
        assert data_set == sampler.set_of_step(step)
        assert len(set(rows)) == 20
        turns[data_set] += 1
        assert all(abs(turns[n] - share * (step + 1)) < 1 for n, share in enumerate(shares))
    assert min(turns.values()) >= 3


def largest_deviations(sets: NDArray[np.int64], shares: Sequence[float], window: int) -> tuple[float, float]:
    """Largest deviation of a set's number of turns from its share: after any step, and in any `window` steps."""
    taken = np.zeros((len(sets) + 1, len(shares)), dtype=np.int64)
    taken[np.arange(1, len(sets) + 1), sets] = 1
    counts = taken.cumsum(axis=0)
    from_start = np.abs(counts - np.arange(len(sets) + 1)[:, None] * np.array(shares)).max()
    return float(from_start), float(np.abs(counts[window:] - counts[:-window] - window * np.array(shares)).max())


@pytest.mark.parametrize("kind", ["sizes over six orders of magnitude", "one large",
                                  pytest.param("equal", marks=pytest.mark.slow),
                                  pytest.param("by rank", marks=pytest.mark.slow)])
def test_two_hundred_sets_have_their_shares_in_any_thousand_steps(kind: str):
    sizes = {"sizes over six orders of magnitude": np.random.default_rng(1).lognormal(9, 2.5, 200).astype(int) + 1,
             "equal": np.full(200, 1000), "one large": np.array([10**6] + [5000] * 199),
             "by rank": (10**6 / np.arange(1, 201)).astype(int)}[kind]
    shares = turn_shares(sizes.tolist(), [1.0] * 200, 1.0)
    turns = EarliestDeadline(shares)
    sets = np.array([turns.of_step(step)[0] for step in range(20_000)])
    from_start, in_window = largest_deviations(sets, shares, 1000)
    assert from_start < 1 and in_window < 2  # what Tijdeman proves
    assert in_window < 1.5  # what is seen
    before = FurthestBehind(shares)
    assert [before.of_step(step)[0] for step in range(1000)] != sets[:1000].tolist() or kind in ("equal", "one large")


def test_a_set_ends_after_its_epochs_and_the_others_take_its_share(sets: list[str]):
    files = [TrainFile(path=path, max_epochs=epochs) for path, epochs in zip(sets, (None, 0.5, 2.0), strict=True)]
    records = open_records(tuple(files))
    sampler = sampler_of(records, sampling_cap=500)
    steps = [sampler.set_of_step(step) for step in range(200)]
    assert sampler.num_steps is None and Counter(steps)[1] == 7 and Counter(steps)[2] == 10
    shares = turn_shares([1000, 300, 100], [1, 1, 1], 1.0, 500)
    assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9])
    ends = [max(step for step, data_set in enumerate(steps) if data_set == index) + 1 for index in (1, 2)]
    assert ends[0] < ends[1]
    assert largest_deviations(np.array(steps[:ends[0]]), shares, 5)[0] < 1
    between = np.array(steps[ends[0]:ends[1]])
    assert largest_deviations(between, [5 / 6, 0, 1 / 6], 5)[0] < 1
    assert set(steps[ends[1]:]) == {0}
    rows = [row for step, data_set in enumerate(steps) if data_set == 2 for row in sampler.rows_of_step(step)]
    assert Counter(Counter(rows).values()) == {2: 100}
    all_end = open_records(tuple(TrainFile(path=path, max_epochs=1) for path in sets))
    limited = sampler_of(all_end)
    assert limited.num_steps == 70
    assert Counter(row for step in range(70) for row in limited.rows_of_step(step)) == dict.fromkeys(range(1400), 1)
    with pytest.raises(ConfigError, match="data.train.max_epochs: no data set has rows left after 70 steps"):
        limited.rows_of_step(70)
    config = RunConfig(model=ModelConfig(path="x"), training=TrainingConfig(train_steps=71))
    with pytest.raises(ConfigError, match=r"max_epochs: every data set has one, and together they have rows for 70 "):
        number_of_steps(config, limited)


def test_runs_of_order_2_keep_their_turns(sets: list[str]):
    records = opened(sets, [1, 5, 0.3])
    shares = turn_shares([1000, 300, 100], [1, 5, 0.3], 1.0)
    kept = MixtureSampler(records, shares=shares, global_batch_size=20, seed=5, order=2)
    taken, expected = np.zeros(3), []
    for step in range(100):
        data_set = int(np.argmax(np.round(np.array(shares) * (step + 1) - taken, 9)))
        taken[data_set] += 1
        expected.append(data_set)
    assert [kept.set_of_step(step) for step in range(100)] == expected


def test_an_epoch_takes_every_row_of_every_set_once(sets: list[str]):
    records = opened(sets)
    sampler = sampler_of(records)
    assert sampler.steps_of_epochs(1) == 70
    used = Counter(row for step in range(70) for row in sampler.rows_of_step(step))
    assert len(used) == 1400
    assert set(used.values()) == {1}
    assert [sampler.rows_of_step(step) for step in range(70)] != [sampler.rows_of_step(step) for step in range(70, 140)]


@pytest.mark.parametrize("step", [0, 7, 69, 70, 133])
def test_any_step_can_be_asked_first(sets: list[str], step: int):
    records = opened(sets, [1, 2, 1])
    in_order = sampler_of(records)
    expected = [in_order.rows_of_step(k) for k in range(step + 1)][-1]
    assert sampler_of(records).rows_of_step(step) == expected


def test_rows_of_a_set_come_as_if_it_were_alone(sets: list[str]):
    records = opened(sets)
    sampler = sampler_of(records)
    alone = GlobalBatchSampler(records.files[1], global_batch_size=20, shuffle=True, seed=5)
    mine = [sampler.rows_of_step(step) for step in range(70) if sampler.set_of_step(step) == 1]
    assert [[row - 1000 for row in rows] for rows in mine] == [alone.rows_of_step(k) for k in range(15)]


def test_mixed_batches_and_file_order_take_rows_of_all_sets(sets: list[str]):
    records = opened(sets)
    for settings in ({"mixed_batches": True}, {"shuffle": False}):
        sampler = build_sampler(records, DataConfig(**settings), global_batch_size=1100, seed=5)
        assert isinstance(sampler, GlobalBatchSampler)
        assert len({records.file_of(row) for row in sampler.rows_of_step(0)}) > 1


def test_a_set_smaller_than_a_batch_is_refused_by_name(sets: list[str]):
    with pytest.raises(ConfigError, match=r"training.global_batch_size = 120 is larger than the 100 rows of .*c\.jsonl"
                                          ", and a global batch is of one data set; lower it, add rows, or set "
                                          "data.mixed_batches: true"):
        sampler_of(opened(sets), 120)


def test_documents_of_one_id_do_not_meet(write_rows: WriteRows):
    rows = [{"query": f"q{i}", "positive": f"text {i}", "positive_ids": [f"d{i % 40}"]} for i in range(80)]
    records = open_records((TrainFile(path=write_rows(rows)),))
    sampler = GlobalBatchSampler(records, global_batch_size=20, shuffle=True, seed=0)
    for step in range(16):
        ids = [records[row].document_ids for row in sampler.rows_of_step(step)]
        assert len(set(ids)) == 20
    plain = open_records((TrainFile(path=write_rows(
        [{key: row[key] for key in ("query", "positive")} for row in rows])),))
    sampler = GlobalBatchSampler(plain, global_batch_size=20, shuffle=True, seed=0)
    batches = [[json.dumps(row % 40) for row in sampler.rows_of_step(step)] for step in range(16)]
    assert any(len(set(batch)) < 20 for batch in batches)  # without ids nothing keeps them apart


@pytest.mark.parametrize(("settings", "words"), [
    ({"train": (TrainFile(path="a.jsonl", weight=2),), "mixed_batches": True}, r"data.train.weight = 2: has no effect"),
    ({"train": (TrainFile(path="a.jsonl", weight=2),), "shuffle": False}, r"data.train.weight = 2: has no effect"),
    ({"sampling_temperature": 2.0, "shuffle": False}, r"data.sampling_temperature = 2.0: has no effect"),
    ({"sampling_cap": 5, "mixed_batches": True}, r"data.sampling_cap = 5: has no effect"),
    ({"sampling_cap": 0}, r"data.sampling_cap = 0: must be >= 1"),
    ({"train": (TrainFile(path="a.jsonl", max_epochs=2),)}, r"data.train.max_epochs = 2: needs a mixture of several"),
    ({"validation": (TrainFile(path="a.jsonl", max_epochs=2),)}, r"data.validation.max_epochs = 2: has no effect"),
    ({"sampling_temperature": 0.5}, r"data.sampling_temperature = 0.5: must be >= 1")])
def test_settings_without_effect_are_refused(settings: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**settings)


@pytest.mark.parametrize(("settings", "words"), [
    ({"rows": 3}, r"data.train.rows = 3: has no effect without streaming"),
    ({"rows": 0, "streaming": True}, r"data.train.rows = 0: must be >= 1 or null"),
    ({"weight": 0.0}, r"data.train.weight = 0.0: must be > 0"), ({"max_epochs": 0.0}, "max_epochs = 0.0: must be > 0"),
    ({"weight": -1.0}, "must be > 0"),
    ({"document_prompt": "{instruction}: "}, r"data.train.document_prompt = .*only a query prompt can contain")])
def test_settings_of_an_entry_are_checked(settings: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        TrainFile(path="a.jsonl", **settings)
