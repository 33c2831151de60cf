import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_embed.config.schema import DataConfig, TrainFile
from megatron_embed.data.dataset import RecordSet, hold_out, open_records
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.mixture import build_sampler
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.records import text_id
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError
from tests.data.conftest import MINI_ZH

WriteRows = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir: str) -> RoleTokenizer:
    return RoleTokenizer(minilm_dir, add_eos=False, query_max_length=16, document_max_length=32)


@pytest.fixture(scope="module")
def mini_zh() -> RecordSet:
    return open_records((TrainFile(path=str(MINI_ZH)),))


def make(records: RecordSet, tokenizer: RoleTokenizer, *, size: int = 8, shuffle: bool = True, dp_rank: int = 0,
         dp_size: int = 1, micro_batch_size: int = 2, num_negatives: int = 1, num_positives: int = 1,
         seed: int | None = None) -> BatchLoader:
    sampler = GlobalBatchSampler(records, global_batch_size=size, shuffle=shuffle, seed=1)
    return BatchLoader(records, sampler, tokenizer, PackingSpec(micro_batch_size=micro_batch_size, alignment=8),
                       DocumentsPerQuery(negatives=num_negatives, positives=num_positives, seed=seed), dp_rank=dp_rank,
                       dp_size=dp_size)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_the_rows_of_a_step(mini_zh: RecordSet, tokenizer: RoleTokenizer, dp_size: int):
    with make(mini_zh, tokenizer) as whole:
        for step in (0, 1, 7):
            parts = []
            rows = []
            for rank in range(dp_size):
                with make(mini_zh, tokenizer, dp_rank=rank, dp_size=dp_size) as loader:
                    parts.append(loader.batch(step))
                    rows += loader.rows(step)
            assert rows == whole.rows(step)
            batch = whole.batch(step)
            assert batch.query_ids.tolist() == [text_id(mini_zh[row].query) for row in rows]
            for name in ("query_ids", "document_ids"):
                joined = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(joined, getattr(batch, name))
            assert {len(part.micro_batches) for part in parts} == {8 // dp_size // 2}
    assert loader_threads() == []


def test_any_step_of_three_epochs_has_the_same_rows_in_every_layout_without_replay(mini_zh: RecordSet,
                                                                                  tokenizer: RoleTokenizer):
    """A loader of a resumed run knows the rows of a late step at once, and shares no text within a batch."""
    seconds = []
    for step in np.random.default_rng(1).integers(0, 3 * 1000 // 8, 20).tolist():
        taken = {}
        for dp_size in (1, 2, 4):
            taken[dp_size] = []
            for rank in range(dp_size):
                with make(mini_zh, tokenizer, dp_rank=rank, dp_size=dp_size) as loader:
                    start = time.perf_counter()
                    taken[dp_size] += loader.rows(step)
                    seconds.append(time.perf_counter() - start)
        assert taken[1] == taken[2] == taken[4] and len(taken[1]) == 8
        texts = [text for row in taken[1] for text in (mini_zh[row].query, *mini_zh[row].positive)]
        assert len(texts) == len(set(texts))
    assert max(seconds) < 5  # milliseconds where the machine is idle


def test_steps_in_any_order_give_the_same_batches(mini_zh: RecordSet, tokenizer: RoleTokenizer):
    with make(mini_zh, tokenizer) as loader:
        forward = [loader.batch(step) for step in range(4)]
        total = sum(batch.num_truncated for batch in forward)
        assert total > 0
        again = {step: loader.batch(step) for step in (3, 1, 2, 0)}
    for step, batch in enumerate(forward):
        for ours, other in zip(batch.micro_batches, again[step].micro_batches, strict=True):
            assert torch.equal(ours.token_ids, other.token_ids)
    assert not torch.equal(forward[0].query_ids, forward[1].query_ids)


def test_the_next_step_is_prepared_in_the_background(mini_zh: RecordSet, tokenizer: RoleTokenizer,
                                                     monkeypatch: pytest.MonkeyPatch):
    built: list[tuple[int, str]] = []
    original = BatchLoader.prepare

    def build(self: BatchLoader, step: int):
        built.append((step, threading.current_thread().name))
        return original(self, step)

    monkeypatch.setattr(BatchLoader, "prepare", build)
    with make(mini_zh, tokenizer) as loader:
        for step in range(3):
            loader.batch(step)
    assert [step for step, _ in built][:3] == [0, 1, 2]
    assert len(built) <= 4  # nothing was built twice
    assert all(name.startswith("batch-loader") for _, name in built)


def test_messages_have_no_room_for_what_no_row_has(write_rows: WriteRows, tokenizer: RoleTokenizer):
    """The capacity is of the data, whichever file a step's rows are of."""
    short = write_rows([{"query": f"q{row}", "positive": f"p{row}", "negatives": ["n"]} for row in range(4)], "a.jsonl")
    long = write_rows([{"query": f"r{row}", "positive": ["p", "o"], "negatives": ["n1", "n2", "n3"]}
                       for row in range(4)], "b.jsonl")
    records = open_records((TrainFile(path=short), TrainFile(path=long)))
    assert records.most_negatives == 3
    kept, held = hold_out(records, 0.4, seed=1)
    assert held is not None and kept.most_negatives == held.most_negatives == 3
    for dp_rank in range(2):
        with make(records, tokenizer, size=4, dp_rank=dp_rank, dp_size=2, micro_batch_size=1, shuffle=False,
                  num_negatives=10**9, num_positives=10**9) as loader:
            batches = [loader.batch(step) for step in range(2)]
        assert [batch.num_documents for batch in batches] == [4, 10]
        assert {batch.capacity for batch in batches} == {(2, 10, 4)}
        assert {batch.micro_capacity for batch in batches} == {(1, 5, 2)}


def test_an_error_in_the_background_reaches_the_caller(write_rows: WriteRows, tokenizer: RoleTokenizer):
    path = write_rows([{"query": f"q{i}", "positive": f"p{i}"} for i in range(8)])
    records = open_records((TrainFile(path=path),))
    with make(records, tokenizer, size=2, shuffle=False) as loader:
        loader.batch(0)
        loader.batch(1)
        Path(path).write_text(json.dumps({"query": "other", "positive": "p"}) + "\n")
        with pytest.raises(DataError, match=r"rows\.jsonl:\d: the file was changed after it was checked"):
            for step in range(2, 4):
                loader.batch(step)
    assert loader_threads() == []


def test_batch_sizes_that_do_not_divide_are_refused(mini_zh: RecordSet, tokenizer: RoleTokenizer):
    message = (r"training.global_batch_size = 10 is not a multiple of micro_batch_size \* data_parallel_size = "
               r"2 \* 2 = 4; next valid: 12")
    with pytest.raises(ConfigError, match=message):
        make(mini_zh, tokenizer, size=10, dp_size=2)


def test_instructions_are_checked_before_the_first_step(write_rows: WriteRows, bpe_dir: str, tokenizer: RoleTokenizer,
                                                        caplog: pytest.LogCaptureFixture):
    rows = [{"query": "q", "positive": "p", "instruction": "find"}] * 3 + [{"query": "q", "positive": "p"}]
    path = write_rows(rows)
    filled = RoleTokenizer(bpe_dir, add_eos=False, query_prompt="{instruction} ", query_max_length=16,
                           document_max_length=16)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:4: data.query_prompt = '{instruction} ' needs an instruction"):
        make(open_records((TrainFile(path=path),)), filled, size=2)
    with make(open_records((TrainFile(path=path, instruction="other"),)), filled, size=2) as loader:
        assert loader.batch(0).num_queries == 2
    with caplog.at_level(logging.WARNING), make(open_records((TrainFile(path=path),)), tokenizer, size=2):
        assert "carry instructions that no prompt uses: data.query_prompt has no {instruction}" in caplog.text


def listed(rows: int, write_rows: WriteRows) -> RecordSet:
    """Rows of 3 positives and 5 negatives, with scores that tell them apart."""
    return open_records((TrainFile(path=write_rows([
        {"query": f"query {row}", "positive": [f"right {row} {index}" for index in range(3)],
         "negatives": [f"wrong {row} {index}" for index in range(5)],
         "teacher_scores": [float(10 * row + index) for index in range(8)],
         "positive_ids": [f"p{row}-{index}" for index in range(3)],
         "negative_ids": [f"n{row}-{index}" for index in range(5)]} for row in range(rows)])),))


def test_documents_are_sampled_again_from_seed_row_and_step(tokenizer: RoleTokenizer, write_rows: WriteRows):
    records = listed(8, write_rows)
    texts = {text_id(text): text for record in records for text in (*record.positive, *record.negatives)}
    scores = {text: score for record in records
              for text, score in zip((*record.positive, *record.negatives), record.teacher_scores or (), strict=True)}
    taken: dict[str, int] = dict.fromkeys(texts.values(), 0)
    with make(records, tokenizer, num_negatives=2, num_positives=2, seed=3) as loader:
        for step in range(60):
            batch, rows = loader.batch(step), loader.rows(step)
            assert batch.document_ids is not None and batch.teacher_scores is not None
            names = [texts[int(name)] for name in batch.document_ids.flatten().tolist() if int(name) in texts]
            assert len(names) == len(set(names)) == 8 * 4
            for index, row in enumerate(rows):
                mine = names[4 * index : 4 * index + 4]
                assert {text.rsplit(" ", 1)[0] for text in mine[:2]} == {f"right {row}"}
                assert {text.rsplit(" ", 1)[0] for text in mine[2:]} == {f"wrong {row}"}
            teacher_scores = batch.teacher_scores.flatten().tolist()
            assert [scores[name] for name in names] == teacher_scores[: len(names)]
            # All positives of the row are known as such, those that were not sampled, too.
            assert batch.positive_ids is not None
            known = {texts[int(name)] for name in batch.positive_ids.flatten().tolist() if int(name) in texts}
            assert known == {text for row in rows for text in records[row].positive}
            for name in names:
                taken[name] += 1
    for text, count in taken.items():  # 60 times 2 of 3, and 2 of 5
        assert (28 < count < 52) if text.startswith("right") else (12 < count < 38), (text, count)
    with make(records, tokenizer, num_negatives=2, num_positives=2, seed=3) as again, \
            make(records, tokenizer, num_negatives=2, num_positives=2, seed=4) as other:
        step = again.batch(7).document_ids
        assert step is not None and other.batch(7).document_ids is not None
        with make(records, tokenizer, num_negatives=2, num_positives=2, seed=3) as loader:
            assert torch.equal(step, loader.batch(7).document_ids)  # type: ignore[arg-type]
        assert not torch.equal(step, other.batch(7).document_ids)  # type: ignore[arg-type]


def test_any_document_of_a_row_may_be_sampled(mini_zh: RecordSet, write_rows: WriteRows):
    shared = [{"query": f"query {row}", "positive": [f"right {row}"], "negatives": [f"wrong {row}", "shared"]}
              for row in range(2)] + [
                  {"query": f"other {row}", "positive": [f"fine {row}"], "negatives": []} for row in range(2)]
    records = open_records((TrainFile(path=write_rows(shared)),))
    for sampling, apart in (("first", False), ("random", True)):
        sampler = build_sampler(records, DataConfig(num_negatives=1, document_sampling=sampling),
                                global_batch_size=2, seed=1)
        steps = [set(sampler.rows_of_step(step)) for step in range(40)]
        assert ({0, 1} not in steps) == apart
