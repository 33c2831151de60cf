"""The queue: which texts are computed together, and what becomes of those that cannot be."""

import time

import numpy as np
import pytest

from megatron_embed.serving import batching
from megatron_embed.serving.batching import FIRST_TOKENS, Batcher, Tokens
from megatron_embed.serving.errors import RequestError
from tests.helpers.served import SECONDS, CountingEngine


@pytest.fixture
def batcher():
    made = Batcher(batch_tokens=8192)
    yield made
    assert made.close(SECONDS)


def submit(batcher, engine, lengths):
    return batcher.submit(engine, [Tokens([1] * length, None) for length in lengths], lengths)


def submit_behind(batcher, engine, *requests):
    """Futures of requests that wait together, while the engine computes another."""
    engine.gate.clear()
    first = submit(batcher, engine, [1])
    while batcher._requests:
        time.sleep(0.001)
    futures = [submit(batcher, engine, lengths) for lengths in requests]
    engine.gate.set()
    first.result(SECONDS)
    return futures


def test_rows_are_in_the_order_of_the_texts(batcher):
    lengths = list(np.random.default_rng(1).permutation(np.arange(1, 300)))
    rows = submit(batcher, CountingEngine(), lengths).result(SECONDS)
    assert rows[:, 0].tolist() == lengths


def test_waiting_requests_share_a_batch_within_the_budget(batcher):
    engine = CountingEngine()
    long, *short = submit_behind(batcher, engine, [200] * 30, [7], [8], [9, 10])
    assert [future.result(SECONDS)[0, 0] for future in short] == [7, 8, 9]
    long.result(SECONDS)
    # The short ones do not wait for the end of the long one, and the long one fills what they leave.
    first = engine.batches[1]
    assert {7, 8, 9, 10} < set(first)
    assert FIRST_TOKENS - 200 < sum(first) <= FIRST_TOKENS
    assert all(sum(batch) <= 8192 for batch in engine.batches)


def test_text_beyond_the_budget_is_a_batch_of_its_own(batcher):
    engine = CountingEngine()
    (future,) = submit_behind(batcher, engine, [9000, 5])
    assert future.result(SECONDS)[:, 0].tolist() == [9000, 5]
    assert [9000] in engine.batches


def test_models_take_turns(batcher):
    one, other = CountingEngine(), CountingEngine()
    futures = submit_behind(batcher, one, [600] * 3)
    futures.append(submit(batcher, other, [3]))
    assert [future.result(SECONDS).shape for future in futures] == [(3, 3), (1, 3)]
    assert other.batches == [[3]]


def test_budget_of_a_fast_model_grows(batcher):
    engine = CountingEngine()
    submit(batcher, engine, [100] * 300).result(SECONDS)
    assert [sum(batch) for batch in engine.batches[:5]] == [1000, 2000, 4000, 8100, 8100]


def test_budget_of_a_slow_model_shrinks(batcher, monkeypatch):
    monkeypatch.setattr(batching, "BATCH_SECONDS", 0.05)
    engine = CountingEngine(seconds_a_token=0.0001)  # 500 tokens in that time, or fewer on a busy machine
    submit(batcher, engine, [100] * 20).result(SECONDS)
    assert sum(engine.batches[0]) == 1000 and max(map(sum, engine.batches[1:])) <= 500


def test_abandoned_requests_leave_the_queue(batcher):
    engine = CountingEngine()
    engine.gate.clear()
    submit(batcher, engine, [1])
    while batcher._requests:
        time.sleep(0.001)
    before, other, behind = (submit(batcher, engine, lengths) for lengths in ([50] * 10, [2], [50] * 10))
    before.cancel()
    behind.cancel()
    engine.gate.set()
    assert other.result(SECONDS)[0, 0] == 2
    assert submit(batcher, engine, [3]).result(SECONDS)[0, 0] == 3
    assert engine.batches == [[1], [2], [3]]


def test_failing_request_fails_alone(batcher):
    engine = CountingEngine()
    engine.gate.clear()
    submit(batcher, engine, [1])
    while batcher._requests:
        time.sleep(0.001)
    bad = batcher.submit(engine, [Tokens([13], None)], [1])
    good = submit(batcher, engine, [4])
    engine.gate.set()
    assert good.result(SECONDS)[0, 0] == 4
    with pytest.raises(RequestError) as error:
        bad.result(SECONDS)
    assert error.value.status_code == 500
    assert submit(batcher, engine, [5]).result(SECONDS)[0, 0] == 5


def test_close_answers_what_is_left():
    batcher, engine = Batcher(batch_tokens=8192), CountingEngine()
    engine.gate.clear()
    running = submit(batcher, engine, [1])
    while batcher._requests:
        time.sleep(0.001)
    waiting = submit(batcher, engine, [2])
    assert not batcher.close(0.01)
    for future in (running, waiting):
        with pytest.raises(RequestError) as error:
            future.result(SECONDS)
        assert error.value.status_code == 503
    with pytest.raises(RequestError):
        submit(batcher, engine, [3])
    engine.gate.set()
    assert batcher.close(SECONDS)
