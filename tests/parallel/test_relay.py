"""Where files are few, the ranks of a node reach the run's store through the relay of their local rank 0."""

import contextlib
import datetime
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import LostRankError, PreemptedError, UserError
from megatron_embed.parallel import heartbeat, relay, rendezvous
from megatron_embed.parallel.rendezvous import Rendezvous
from megatron_embed.platform import stop_signal as stop
from tests.helpers.ports import free_port
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve
from tests.helpers.toys import REPOSITORY, save_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sockets in Linux' abstract namespace")
PER_NODE = 2


@pytest.fixture
def store():
    """An agent's store."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def nodes(port):
    """Make this worker a rank of a run on nodes of two ranks, whose store is at the port."""
    rank, name = dist.get_rank(), relay._socket_name
    dist.destroy_process_group()
    os.environ |= {"LOCAL_RANK": str(rank % PER_NODE), "LOCAL_WORLD_SIZE": str(PER_NODE), "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with mock.patch.object(relay, "_SOFT_LIMIT", 100), mock.patch.object(
            relay, "_socket_name", lambda address: f"{name(address)}-{rank // PER_NODE}"):
        yield


def connections_to(port):
    """Connections of this process to a port of this machine."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as opened:
            count += opened.getpeername()[1:2] == (port,)
    return count


def sums_and_connections(port):
    """(sums of rank + 1 over each group of a layout, this process' connections to the store, why it stops)."""
    from megatron_embed.parallel.topology import initialize, shutdown

    rank = dist.get_rank()
    with nodes(port), stop.listening():
        topology = initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
                                             timeout_seconds=60))
        sums = []
        for group in (topology.groups.tp, topology.groups.pp, topology.dp_group, dist.new_group([1, 6]), None):
            if group is None or dist.get_rank(group) >= 0:
                sums.append(torch.tensor(rank + 1.0))
                dist.all_reduce(sums[-1], group=group)
        with pytest.raises(PreemptedError) as ended, stop.finishing(), mock.patch.object(
                heartbeat, "HEARTBEAT_SECONDS", 0.1), heartbeat.monitor_ranks(
                topology, lambda message, is_reporting_rank: None):
            time.sleep(0.3)
            dist.barrier()
            opened = connections_to(port)
            dist.barrier()
            if rank == 3:
                stop.request("asked on rank 3")
            deadline = time.monotonic() + 20
            while not stop.asked() and time.monotonic() < deadline:
                time.sleep(0.05)
            dist.barrier()
        shutdown()
    return [value.item() for value in sums], opened, str(ended.value)


def test_ranks_of_a_node_have_one_process_connected_to_the_store(store):
    """Eight ranks as four nodes: the sums of every group, with connections of local ranks 0 only; heartbeats pass a
    request to stop on."""
    results = run_on_ranks(sums_and_connections, 8, store.port)
    assert [sums for sums, _, _ in results] == [
        [3, 6, 4, 36], [3, 8, 6, 9, 36], [7, 10, 4, 36], [7, 12, 6, 36],
        [11, 6, 12, 36], [11, 8, 14, 36], [15, 10, 12, 9, 36], [15, 12, 14, 36]]
    assert [opened for _, opened, _ in results] == [3, 0] * 4
    reasons = [heartbeat.ASKED] * 3 + ["asked on rank 3"] + [heartbeat.ASKED] * 4
    assert [text for *_, text in results] == [f"stopped ({reason}); start the command again" for reason in reasons]


def lose_rank(port, lost, folder):
    """Collectives during which SIGKILL ends a rank; the others write their errors."""
    from megatron_embed.parallel.topology import initialize

    rank = dist.get_rank()

    def tell(message, is_reporting_rank):
        (folder / str(rank)).write_text(f"{message} {is_reporting_rank}")

    with nodes(port), mock.patch.multiple(heartbeat, HEARTBEAT_SECONDS=0.1, SUSPECT_SECONDS=1.5, GRACE_SECONDS=0.5):
        topology = initialize(ParallelConfig(timeout_seconds=60))
        try:
            with heartbeat.monitor_ranks(topology, tell):  # rank 0's collective only hangs
                for turn in range(10**6):
                    if turn == 3 and rank == lost:
                        time.sleep(0.5)
                        os.kill(os.getpid(), signal.SIGKILL)
                    dist.all_reduce(torch.ones(3), group=topology.dp_group)
        except LostRankError as error:
            tell(error, error.is_reporting_rank)


@pytest.mark.slow
def test_killed_relay_is_a_lost_rank_as_any_other(store, tmp_path):
    """The other rank of its node goes on without it: it sends heartbeats, and learns who is lost."""
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_on_ranks(lose_rank, 4, store.port, 2, tmp_path)
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(told) == ["0", "1", "3"], told
    assert all(text.startswith("rank 2 is gone: no sign of life for ") for text in told.values()), told
    assert [told[rank].endswith(" True") for rank in ("0", "1", "3")] == [True, False, False]


@pytest.fixture
def relayed(store, monkeypatch):
    """Makes stores behind one relay of this process, and ranks of a node out of threads."""
    address, ranks = ("127.0.0.1", store.port), threading.local()
    for name, value in {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1]), "RANK": "0", "WORLD_SIZE": "3",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(relay, "launched_rank", lambda: (ranks.rank, 3, ranks.rank))
    monkeypatch.setattr(relay, "is_needed", lambda world_size: True)
    monkeypatch.setattr(relay, "_relays", {})

    def open_store(seconds=20.0):
        return relay.RelayedStore(address, seconds)

    monkeypatch.setattr(relay, "_relayed_stores", [])
    open_store.server, open_store.ranks = relay.Relay(address), ranks
    yield open_store
    for client in relay._relayed_stores:
        if client._relay is not None:
            client._relay.close()
    open_store.server._linger()


def test_every_request_is_answered_as_by_the_store_itself(store, relayed):
    every_byte = bytes(range(256))
    for name, client in {"itself": store, "relayed": relayed(), "cloned": relayed().clone()}.items():
        own = dist.PrefixStore(name, client)
        assert not own.check(["a"])
        own.set("a", "x")
        own.append("a", "y")
        own.set("bytes", every_byte)
        own.multi_set(["b", "c"], ["2", "3"])
        assert own.check(["a", "b", "c"]) and own.get("bytes") == every_byte
        assert own.multi_get(["a", "c", "bytes"]) == [b"xy", b"3", every_byte]
        assert [own.add("sum", 2), own.add("sum", -5), own.get("sum")] == [2, -3, b"-3"]
        assert own.compare_set("new", "", "1") == b"1" and own.compare_set("new", "0", "2") == b"1"
        assert own.compare_set("new", every_byte, every_byte) == b"1"
        assert own.delete_key("b") and not own.check(["b"])
        start = time.monotonic()
        with pytest.raises(dist.DistStoreError, match=r"wait timeout after .*/none"):
            own.wait(["a", "none"], datetime.timedelta(seconds=0.3))
        assert 0.25 < time.monotonic() - start < 5


def test_rank_that_waits_does_not_block_the_others(store, relayed):
    waiting, other, found = relayed(), relayed(), []
    thread = threading.Thread(target=lambda: found.append(waiting.get("late")))
    thread.start()
    time.sleep(0.1)
    assert other.add("now", 1) == 1 and not found
    store.set("late", "here")
    thread.join()
    assert found == [b"here"]


def test_error_of_a_rank_reaches_those_behind_a_relay(relayed, monkeypatch):
    """Ranks 1 and 2 use the relay; 2 does not arrive."""
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 5.0)
    monkeypatch.setattr(rendezvous, "PRINT_SECONDS", 0.2)
    told = {}

    def run(rank):
        relayed.ranks.rank = rank
        barrier = Rendezvous(rank, 3)
        if rank == 2:
            told[rank] = barrier.report_error("rows.jsonl: no such file")
            return
        with pytest.raises(UserError) as caught:
            barrier.wait_for_all(20)
        told[rank] = str(caught.value)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {0: "rank 2: rows.jsonl: no such file", 1: "rank 2: rows.jsonl: no such file", 2: True}


@pytest.mark.parametrize("obstacle", ["no relay", "another user's", "hangs"])
def test_without_its_relay_a_rank_connects_directly(store, relayed, monkeypatch, obstacle):
    monkeypatch.setattr(relay, "ANSWER_SECONDS", 0.3)
    if obstacle == "no relay":
        monkeypatch.setattr(relay, "_socket_name", lambda address: "\0nobody listens here")
        client = relayed(0.5)
    elif obstacle == "another user's":
        name = f"\0of a stranger {os.getpid()}"
        monkeypatch.setattr(relay, "_socket_name", lambda address: name)
        monkeypatch.setattr(os, "getuid", lambda: 4711)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(name)
            stranger.listen()
            client = relayed(0.5)
            with stranger.accept()[0] as accepted:
                assert accepted.recv(100) == b"", "it is told nothing"
    else:
        client = relayed()
        with mock.patch.object(relay, "_perform", side_effect=lambda *request: time.sleep(1)):
            client._relay.send_bytes(b'["check", ["a"]]')
            time.sleep(0.1)
    store.set("a", "b")
    assert client.get("a") == b"b" and client._relay is None and isinstance(client._direct, dist.TCPStore)


def test_another_users_process_gets_no_answer(relayed, monkeypatch):
    name = relay._socket_name(relayed.server._address)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with Client(name, "AF_UNIX") as stranger, pytest.raises((EOFError, OSError)):
        stranger.send_bytes(b'["open", 5]')
        stranger.recv_bytes()


def test_relay_ends_after_those_that_use_it(relayed):
    client, start = relayed(), time.monotonic()
    threading.Timer(0.4, client._relay.close).start()
    relayed.server._linger()
    assert 0.3 < time.monotonic() - start < 5
    assert relay._connect_to_relay(relayed.server._address, 0.0) is None
    relay.Relay(relayed.server._address)._linger()  # of the next run


def test_fork_of_the_relays_process_holds_no_connection(relayed):
    client = relayed()
    assert client.add("a", 1) == 1
    descriptors = {os.readlink(f"/proc/self/fd/{connection.fileno()}") for connection in relayed.server._clients}
    assert descriptors <= open_sockets()
    child = os.fork()
    if child == 0:
        gc.freeze()  # or a collection ends the parent's stores, whose threads are not here
        os._exit(len(descriptors & open_sockets()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.add("a", 1) == 2


def open_sockets():
    """Names of this process' sockets."""
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return {os.readlink(path) for path in paths if os.path.lexists(path)}


@pytest.mark.parametrize(("soft", "hard", "agent", "local_world_size", "needed"), [
    (1024, 1024, "False", "8", True),
    (1024, 4096, "False", "8", False),  # raised to the hard limit
    (1024, 4096, "True", "8", True),  # not by torchrun's agent
    (2148, 2148, "False", "8", False),
    (2147, 2147, "False", "8", True),
    (1024, 1024, "False", "1024", False),  # a single node
    (-1, -1, "True", "8", False),  # unlimited
])
def test_relay_is_used_only_where_files_are_too_few(monkeypatch, soft, hard, agent, local_world_size, needed):
    for name, value in {"RANK": "3", "WORLD_SIZE": "1024", "LOCAL_WORLD_SIZE": local_world_size,
                        "TORCHELASTIC_USE_AGENT_STORE": agent}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(relay, "_SOFT_LIMIT", soft)
    monkeypatch.setattr(relay, "_HARD_LIMIT", hard)
    assert relay.is_needed(1024) == needed
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert not relay.is_needed(1024), "the local rank is not known"


@pytest.mark.slow
def test_training_with_few_open_files_has_the_same_curve(tmp_path):
    """Plain processes as two nodes of two ranks, with a hard limit of 107 files; four ranks ask for 108 without relays.
    Both nodes are this machine, so that one relay serves them."""
    model, curves = save_model(tmp_path / "model", "bert", tokenizer=True), []
    for files in (107, 4096):
        run, port, named = tmp_path / str(files), free_port(), False
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration(model, run, train_steps=4)))
        environment = os.environ | {
            "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        logs = [(tmp_path / f"{files}.{rank}.log").open("w") for rank in range(4)]
        ranks = [subprocess.Popen(
            [sys.executable, "-m", "megatron_embed", "train", str(tmp_path / "run.yaml")], cwd=REPOSITORY,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}, stdout=subprocess.DEVNULL,
            preexec_fn=lambda files=files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
            stderr=log) for rank, log in enumerate(logs)]
        try:
            while any(rank.poll() is None for rank in ranks):
                with open("/proc/net/unix", encoding="ascii", errors="replace") as sockets:
                    named |= "@megatron-embed-" in sockets.read()
                time.sleep(0.2)
            assert [rank.returncode for rank in ranks] == [0] * 4, (tmp_path / f"{files}.0.log").read_text()[-2000:]
        finally:
            for rank, log in zip(ranks, logs, strict=True):
                rank.kill()
                rank.wait()
                log.close()
        assert named == (files == 107)
        curves.append(curve(run))
    assert curves[0] == curves[1] and len(curves[0]) == 4
