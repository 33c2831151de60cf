"""Anyone who reaches the run's port can write into its store: texts not signed with the run's secret are ignored."""

import datetime
import threading
import time

import pytest
import torch.distributed as dist

from megatron_embed.errors import LostRankError, UserError
from megatron_embed.parallel import heartbeat, rendezvous
from megatron_embed.parallel.heartbeat import HeartbeatMonitor
from megatron_embed.parallel.rendezvous import ALL_ARRIVED, Rendezvous, listening_socket
from megatron_embed.parallel.signing import SECRET_VARIABLE, Signer
from tests.helpers.ports import free_port

SECRET = "0123456789abcdef" * 4


@pytest.fixture
def port(monkeypatch):
    """Three ranks with a secret, whose store torchrun's agent would host."""
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "3",
              "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_USE_AGENT_STORE": "True", SECRET_VARIABLE: SECRET}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(rendezvous, "PRINT_SECONDS", 1.0)
    return int(values["MASTER_PORT"])


@pytest.fixture
def agent(port):
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                         timeout=datetime.timedelta(seconds=10))


def ranks_that_arrive(timeout_seconds=60, ranks=(0, 1, 2)):
    """How each ended, in threads."""
    answers = {}

    def arrive(rank):
        try:
            Rendezvous(rank, 3).wait_for_all(timeout_seconds)
            answers[rank] = "went on"
        except (UserError, LostRankError) as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in ranks]


def test_words_are_of_one_place_run_and_secret(monkeypatch, port):
    signed = Signer().sign("heartbeat/1", "5 alive")
    assert Signer().verify("heartbeat/1", signed.encode()) == "5 alive"
    for raw in (b"5 alive", b"", b"\xff\x00", signed.replace("5 alive", "6 alive").encode(), signed[1:].encode(),
                ("ä" * 64 + "5 alive").encode()):
        assert Signer().verify("heartbeat/1", raw) is None
    assert Signer().verify("heartbeat/2", signed.encode()) is None
    prefix = Signer().key_prefix("heartbeats")
    assert prefix.startswith("heartbeats/torchrun-a-0/") and SECRET not in prefix + signed
    for name, value in ((SECRET_VARIABLE, SECRET + "0"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert Signer().verify("heartbeat/1", signed.encode()) is None
            assert Signer().key_prefix("heartbeats") != prefix
    monkeypatch.delenv(SECRET_VARIABLE)
    assert Signer().sign("a", "b") == "b"
    assert Signer().verify("a", b"b") == "b" and Signer().verify("a", b"\xff") is None
    assert Signer().key_prefix("heartbeats") == "heartbeats/torchrun-a-0"


@pytest.mark.parametrize("outcome", [b"rank 2: rows.jsonl: no such file", b"all arrived", b"\xff\xfe",
                                     b"x" * 64 + b"all"])
def test_strangers_outcome_is_overwritten(agent, outcome):
    """At the very key, which a stranger must first have listed."""
    part = dist.PrefixStore(Signer().key_prefix("rendezvous"), agent)
    part.set("outcome", outcome)
    part.set("arrived/1", b"no rank")
    part.set("arrived", b"7")
    assert ranks_that_arrive() == ["went on"] * 3
    assert Signer().verify("outcome", part.get("outcome")) == ALL_ARRIVED


def test_strangers_word_of_an_error_does_not_end_the_run(agent):
    """In the name of the run, as a rank without the secret would write it."""
    for prefix in ("rendezvous/torchrun-a-0", Signer().key_prefix("rendezvous")):
        dist.PrefixStore(prefix, agent).set("outcome", "asked to stop")
    assert ranks_that_arrive() == ["went on"] * 3


def test_stranger_does_not_stand_for_a_rank(agent):
    part = dist.PrefixStore(Signer().key_prefix("rendezvous"), agent)
    part.set("arrived/2", "arrived")
    answers = ranks_that_arrive(timeout_seconds=1, ranks=(0, 1))
    assert all("not signed with this run's MEGATRON_EMBED_SECRET" in answer for answer in answers), answers


def test_error_of_a_rank_of_the_run_is_heard(agent):
    printed = []
    threading.Thread(target=lambda: printed.append(Rendezvous(1, 3).report_error("no rows"))).start()
    assert ranks_that_arrive(ranks=(0, 2)) == ["rank 1: no rows"] * 2


def test_other_secret_on_one_rank_is_told(monkeypatch, agent):
    answers = {}

    def arrive(rank, secret):
        monkeypatch.setenv(SECRET_VARIABLE, secret)
        barrier = Rendezvous(rank, 2)
        prefix = Signer().key_prefix("rendezvous")
        monkeypatch.setattr(barrier, "_open", lambda seconds, listener=None: dist.PrefixStore(prefix, dist.TCPStore(
            *barrier._address, None, False, wait_for_workers=False, timeout=datetime.timedelta(seconds=seconds))))
        try:
            barrier.wait_for_all(1)
        except LostRankError as error:
            answers[rank] = str(error)

    arrive(0, SECRET)
    arrive(1, SECRET + "0")
    assert all("is MEGATRON_EMBED_SECRET the same on every rank?" in text for text in answers.values())
    assert len(answers) == 2


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SUSPECT_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 1.0)


def test_strangers_signs_of_life_are_ignored(agent, port, fast):
    """Neither the news that a rank failed or that the run stops, nor, of a silent rank, an old sign again and again."""
    losses = []
    monitors = [HeartbeatMonitor("127.0.0.1", port, rank=rank, world_size=3, silence_seconds=4.0,
                         on_loss=lambda *loss: losses.append(loss)) for rank in (0, 1, 2)]
    time.sleep(0.5)
    part = dist.PrefixStore(Signer().key_prefix("heartbeats"), agent)
    old = part.get("heartbeat/2")
    for _ in range(10):
        for text in ("9999999999999999 failed OutOfMemoryError", "9999999999999999 left", "\udcff"):
            part.set("heartbeat/1", text.encode("utf-8", "surrogateescape"))
            part.set("summary", f"{text}|0|left|rank 1 is gone".encode("utf-8", "surrogateescape"))
            time.sleep(0.02)
    assert not losses and all(monitor._loss is None and not monitor._rank_0_is_done for monitor in monitors)
    monitors[2]._state = heartbeat.ALIVE
    monitors[2]._exchange = lambda store: None  # it hangs
    deadline = time.monotonic() + 10
    while monitors[0]._loss is None and time.monotonic() < deadline:
        part.set("heartbeat/2", old)
        time.sleep(0.1)
    assert monitors[0]._loss[0].startswith("rank 2 is gone: no sign of life for ")
    for monitor in monitors:
        monitor.close(heartbeat.DONE)


def listening(port):
    """Addresses, as the kernel writes them, at which somebody listens at this port."""
    addresses = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}", encoding="ascii") as file:
            rows = [line.split() for line in file.read().splitlines()[1:]]
        addresses += [row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    return addresses


@pytest.mark.parametrize("address, environment, alone", [
    ("127.0.0.1", {}, True), ("localhost", {"LOCAL_WORLD_SIZE": "3"}, True), ("localhost", {}, False),
    ("localhost", {"LOCAL_WORLD_SIZE": "1"}, False)])
def test_store_of_rank_0_listens_at_the_address_alone_where_all_ranks_find_it_there(
        monkeypatch, port, address, environment, alone):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    for name, value in {"MASTER_ADDR": address, **environment}.items():
        monkeypatch.setenv(name, value)
    held = [Rendezvous(0, 3), Rendezvous(0, 3)]  # the second shares it
    loopback = {"0100007F", "00000000000000000000000001000000"}
    addresses = listening(port)
    assert addresses and all((listening_address in loopback) == alone for listening_address in addresses)
    assert ranks_that_arrive() == ["went on"] * 3
    del held


def test_address_that_is_not_this_nodes_is_left_to_torch(port):
    assert listening_socket("192.0.2.1", port) is None
    assert listening_socket("2001:db8::1", port) is None
