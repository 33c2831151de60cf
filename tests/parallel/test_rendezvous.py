"""An error that one rank meets before the process group exists ends all ranks, and one of them prints it."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import ConfigError, LostRankError, UserError
from megatron_embed.parallel import rendezvous
from megatron_embed.parallel.rendezvous import Rendezvous
from megatron_embed.platform.launcher import run_name
from tests.helpers.ports import free_port
from tests.helpers.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def address(monkeypatch):
    """An address at which nothing listens yet; and shorter timeouts."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    for name in ("USE_AGENT_STORE", "RUN_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(rendezvous, "PRINT_SECONDS", 10.0)
    return f"127.0.0.1:{port}"


def rank_that(rank, refuses=None, after=0.0, timeout_seconds=60, held=None):
    """Open the rendezvous, wait for a while, then arrive or report an error. Returns what the rank prints.

    One that arrives keeps the store, in `held`: the process group would need it.
    """
    barrier = Rendezvous(rank, 3)
    time.sleep(after)
    message = refuses
    if message is None:
        try:
            held.append(barrier)
            barrier.wait_for_all(timeout_seconds)
            return "went on"
        except UserError as error:
            message = str(error)
        except LostRankError as error:
            return f"lost: {error}"
    printed = [message] if rank == 0 else []
    return printed + ([f"rank {rank}: {message}"] if barrier.report_error(message) else [])


def together(*ranks):
    """The answers of ranks that run at once, and how long the last one took."""
    answers, held, start = {}, [], time.monotonic()
    threads = [threading.Thread(target=lambda rank=rank, settings=settings: answers.__setitem__(
        rank, rank_that(rank, held=held, **settings))) for rank, settings in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers.get(rank) for rank in range(len(ranks))], time.monotonic() - start


def test_all_arrive():
    assert together({"after": 0.2}, {}, {})[0] == ["went on"] * 3


def test_error_of_another_rank_reaches_all_at_once():
    answers, seconds = together({}, {"refuses": "rows.jsonl: no such file"}, {"after": 0.3})
    assert answers == [["rank 1: rows.jsonl: no such file"], [], []]
    assert seconds < 9


def test_error_of_all_is_printed_once():
    answers, seconds = together(*[{"refuses": "training.seed = -1"}] * 3)
    assert answers == [["training.seed = -1"], [], []]
    assert seconds < 9


def test_rank_prints_what_rank_0_does_not_know_yet(monkeypatch):
    """A launcher may end the others as soon as this one ends."""
    monkeypatch.setattr(rendezvous, "PRINT_SECONDS", 0.5)
    answers, _ = together({"after": 4.0}, {"refuses": "no such file"}, {})
    assert answers[1] == ["rank 1: no such file"]
    assert answers[0] == ["rank 1: no such file"] and answers[2] == []


def test_rank_prints_where_there_is_no_rank_0():
    assert rank_that(2, refuses="no such file") == ["rank 2: no such file"]


def test_who_did_not_come_is_named(address):
    answers, _ = together({"timeout_seconds": 2}, {"timeout_seconds": 2})
    assert all(answer.startswith(f"lost: not all of 3 ranks (torchrun's WORLD_SIZE) met at {address} within "
                                 "parallel.timeout_seconds = 2 (without rank 2)") for answer in answers), answers


def agent_store(monkeypatch, address):
    """A store that no rank hosts, as torchrun's."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return dist.TCPStore("127.0.0.1", int(address.rpartition(":")[2]), is_master=True, wait_for_workers=False)


def test_runs_that_share_a_store_do_not_take_each_others_word(monkeypatch, address):
    store = agent_store(monkeypatch, address)
    for name, restart in (("a", "0"), ("b", "0"), ("a", "1")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        # Somebody is missing: those who came for another run, or before, do not count.
        answers, _ = together({"timeout_seconds": 1}, {"timeout_seconds": 1})
        assert all("(without rank 2)" in answer for answer in answers), (name, restart, answers)
        # And then it comes.
        assert together({}, {}, {})[0][2] == "went on"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c")
    assert together({}, {"refuses": "no rows"}, {})[0][0] == ["rank 1: no rows"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "d")
    assert together({}, {}, {})[0] == ["went on"] * 3
    del store


def groups_of_two_runs(port):
    """Ranks 0 and 1 are one run, 2 and 3 another, at one store: (sum over the run, its world size)."""
    from megatron_embed.parallel.topology import initialize, shutdown

    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank % 2), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RUN_ID": f"run {rank // 2}"}
    topology, value = initialize(ParallelConfig(timeout_seconds=60)), torch.tensor([10.0 ** rank])
    dist.all_reduce(value, group=topology.dp_group)
    shutdown()
    return value.item(), topology.world_size


def test_process_groups_of_two_runs_at_one_store():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_on_ranks(groups_of_two_runs, 4, store.port) == [(11.0, 2)] * 2 + [(1100.0, 2)] * 2


def port_is_taken(port):
    """(error of rank 0, whether it is in the store) of ranks started by hand and by srun; what one that waits is told.

    In a worker, which has Megatron loaded. A store of this process would be shared, not refused: hence the mock.
    """
    from unittest import mock

    from megatron_embed.parallel.topology import _init_process_group

    dist.destroy_process_group()
    other = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    original, told = rendezvous._store_at, []

    def store_at(address, hosts, timeout_seconds, listener=None):
        if hosts:
            raise dist.DistNetworkError("listen: EADDRINUSE, message: address already in use")
        return original(address, hosts, timeout_seconds, listener)

    def start():
        with pytest.raises(ConfigError) as caught:
            _init_process_group(0, 3, 20, torch.device("cpu"))
        return str(caught.value), other.check([f"rendezvous/{run_name()}/outcome"])

    def wait():
        try:
            Rendezvous(1, 3).wait_for_all(20)
        except UserError as error:
            told.append(str(error))

    os.environ["MASTER_PORT"] = str(port)
    with mock.patch.object(rendezvous, "_store_at", store_at):
        by_hand = start()
        del os.environ["RANK"]
        os.environ["SLURM_JOB_ID"] = "12"
        waiting = threading.Thread(target=wait)
        waiting.start()
        by_srun = start()
        waiting.join()
    return by_hand, by_srun, told


def test_port_of_another_run_is_told_to_all(address):
    """Under srun, whose rank 0 hosts the store: the others wait in the other run's, which hears nothing of it."""
    port = int(address.rpartition(":")[2])
    words = (f"MASTER_PORT = {port}: another process of 127.0.0.1 listens there, perhaps another run's; choose another "
             "port for this run, or wait for the end of the other")
    assert run_on_ranks(port_is_taken, 1, port) == [((words, False), (words, True), [words])]
