"""Worker processes that prepare batches: the same batches as in the rank itself, and nothing left behind."""

import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.data import DataConfig, TrainFile
from megatron_embed.data import batch_workers
from megatron_embed.data.batch_workers import AHEAD, BatchReceiver, ForkServer, accept, connect, listen
from megatron_embed.data.dataset import RecordSet, open_records
from megatron_embed.data.loader import BatchLoader
from megatron_embed.data.mixture import build_sampler
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError
from tests.data.conftest import MINI_ZH

FIRST = 3


@pytest.fixture(scope="module")
def tokenizer(minilm_dir: str) -> RoleTokenizer:
    return RoleTokenizer(minilm_dir, add_eos=False, query_max_length=16, document_max_length=32)


def loader_of(records: RecordSet, tokenizer: RoleTokenizer, dp_rank: int = 0, dp_size: int = 1) -> BatchLoader:
    sampler = build_sampler(records, DataConfig(num_negatives=1), global_batch_size=8, seed=1)
    return BatchLoader(records, sampler, tokenizer, PackingSpec(micro_batch_size=2, alignment=8),
                       DocumentsPerQuery(negatives=1, seed=5), dp_rank=dp_rank, dp_size=dp_size)


@contextmanager
def receivers(build_for: Callable[[int, int], Callable[[int], Any]], workers: int, ranks: int = 1, dp_rank: int = 0,
              dp_size: int = 1) -> Iterator[list[BatchReceiver]]:
    """What each of so many ranks of a replica takes its batches from."""
    with ForkServer(build_for) as server:
        pairs = [[socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(ranks)]
                 for _ in range(workers)]
        server.start(dp_rank=dp_rank, dp_size=dp_size, first_step=FIRST,
                     connections=[[theirs for _, theirs in own] for own in pairs])
        own = [BatchReceiver([pairs[worker][rank][0] for worker in range(workers)], FIRST) for rank in range(ranks)]
        yield own
        for receiver in own:
            receiver.close()


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit, in types and shapes."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif dataclasses.is_dataclass(one):
        assert type(one) is type(other)
        for field in dataclasses.fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_batches_are_the_same_as_those_of_the_rank_itself(tokenizer: RoleTokenizer, workers: int):
    records = open_records((TrainFile(path=str(MINI_ZH)), TrainFile(path=str(MINI_ZH), weight=2)))
    with loader_of(records, tokenizer, 1, 2) as plain, loader_of(records, tokenizer, 1, 2) as loader, \
            receivers(lambda dp_rank, dp_size: loader_of(records, tokenizer, dp_rank, dp_size).prepare, workers,
                      dp_rank=1, dp_size=2) as (receiver,):
        loader.receive_from(receiver)
        wanted = {step: plain.batch(step) for step in range(FIRST, FIRST + 9)}
        assert isinstance(wanted[FIRST], EmbedBatch) and len({batch.data_set for batch in wanted.values()}) == 2
        for step in range(FIRST, FIRST + 4):
            assert_equal(loader.batch(step), wanted[step])
        assert loader._next is None  # nothing was prepared here
        assert_equal(loader.batch(FIRST + 1), wanted[FIRST + 1])  # one that has been taken is prepared again, here
        for step in range(FIRST + 4, FIRST + 9):
            assert_equal(loader.batch(step), wanted[step])


def test_a_received_batch_may_be_written_to_and_outlives_the_worker(tokenizer: RoleTokenizer):
    records = open_records((TrainFile(path=str(MINI_ZH)),))
    with receivers(lambda *place: loader_of(records, tokenizer, *place).prepare, 1, 2) as (first, second):
        batch, same = first.take(), second.take()
    before = same.micro_batches[0].token_ids.clone()
    batch.micro_batches[0].token_ids.add_(1)
    assert torch.equal(same.micro_batches[0].token_ids, before)
    assert torch.equal(batch.micro_batches[0].token_ids, before + 1)


def test_ranks_of_a_replica_have_one_worker_that_is_only_so_far_ahead(tmp_path: Path):
    def build_for(dp_rank: int, dp_size: int) -> Callable[[int], Any]:
        def build(step: int) -> Any:
            with (tmp_path / "built").open("a") as file:
                file.write(f"{step} {os.getpid()}\n")
            return torch.tensor([step, dp_rank, dp_size]), torch.zeros(0), "text"
        return build

    with receivers(build_for, 1, 3, dp_rank=2, dp_size=4) as (first, second, third):
        end = time.monotonic() + 10
        while not (tmp_path / "built").exists() or (tmp_path / "built").read_text().count("\n") < AHEAD:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)
        steps, processes = zip(*(line.split() for line in (tmp_path / "built").read_text().splitlines()), strict=True)
        assert list(map(int, steps)) == list(range(FIRST, FIRST + AHEAD)) and len(set(processes)) == 1
        for step in range(FIRST, FIRST + 20):
            if step == FIRST + 5:
                third.close()  # a rank that is gone holds nobody up
            for receiver in (first, second, third) if step < FIRST + 5 else (first, second):
                numbers, empty, text = receiver.take()
                assert (numbers.tolist(), empty.shape, text) == ([step, 2, 4], (0,), "text")


def test_an_error_reaches_every_rank(tmp_path: Path, tokenizer: RoleTokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"q{row}", "positive": f"p{row}"}) + "\n" for row in range(32)))
    records = open_records((TrainFile(path=str(path)),))
    with receivers(lambda *place: loader_of(records, tokenizer, *place).prepare, 2, 2) as both:
        for receiver in both:
            receiver.take()
        path.write_text("{}\n")
        for receiver in both:
            with pytest.raises(DataError, match=r"rows\.jsonl:\d+: the file was changed after it was checked"):
                for _ in range(2 * AHEAD + 1):
                    receiver.take()


def test_another_error_comes_with_its_traceback():
    with receivers(lambda *_: lambda step: 1 // (FIRST + 1 - step), 1) as (receiver,):
        assert receiver.take() == 1
        with pytest.raises(RuntimeError, match=r"(?s)batch of step 5 cannot be prepared.*ZeroDivisionError"):
            receiver.take()


def test_a_worker_that_was_killed_is_said_on_every_rank():
    with receivers(lambda *_: lambda step: (step, os.getpid()), 1, 2) as (first, second):
        _, worker = first.take()
        os.kill(worker, signal.SIGKILL)
        for receiver in (first, second):
            with pytest.raises(ConfigError, match=r"data.workers: a process that prepares batches is gone before that"):
                for _ in range(AHEAD + 2):
                    receiver.take()


def test_workers_end_with_a_rank_that_is_killed(tmp_path: Path):
    rank = os.fork()
    if not rank:
        with receivers(lambda *_: lambda step: os.getpid(), 2) as (receiver,):
            (tmp_path / "pids").write_text(f"{receiver.take()} {receiver.take()}")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(rank, 0)
    workers = [int(process) for process in (tmp_path / "pids").read_text().split()]
    assert len(set(workers)) == 2
    end = time.monotonic() + 10
    while any(is_running(process) for process in workers) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(is_running(process) for process in workers)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_outlive_the_signals_of_a_launcher():
    with receivers(lambda *_: lambda step: os.getpid(), 1) as (receiver,):
        worker = receiver.take()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, signum)
        assert [receiver.take() for _ in range(5)] == [worker] * 5
    assert not is_running(worker)


def test_other_ranks_connect_by_name_and_other_users_are_refused(monkeypatch: pytest.MonkeyPatch):
    with listen() as listener:
        mine = [connect(listener.getsockname(), worker, 5.0) for worker in (1, 0)]
        theirs = accept(listener, 2, 1, 5.0)
        for worker, connection in zip((1, 0), mine, strict=True):
            connection.send(bytes([worker]))
            assert theirs[worker][0].recv(1) == bytes([worker])
        monkeypatch.setattr(batch_workers.os, "getuid", lambda: -5)
        with pytest.raises(PermissionError, match="a process of user"):
            connect(listener.getsockname(), 0, 5.0)
        for connection in (*mine, theirs[0][0], theirs[1][0]):
            connection.close()


def test_a_number_of_workers_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"data.workers = -1: must be 0 to 64 or null"):
        DataConfig(workers=-1)
